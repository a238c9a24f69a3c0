"""The attention forms, one file each. A new form is one file here plus one line below."""

from custom_ops.form import Form
from custom_ops.forms.full_self import FORM as FULL_SELF
from custom_ops.forms.segment_cross import FORM as SEGMENT_CROSS
from custom_ops.forms.sliding_self import FORM as SLIDING_SELF

FORMS: dict[str, Form] = {form.name: form for form in (FULL_SELF, SLIDING_SELF, SEGMENT_CROSS)}
"""Every form by the name of its op."""

__all__ = ["FORMS", "FULL_SELF", "SEGMENT_CROSS", "SLIDING_SELF"]
