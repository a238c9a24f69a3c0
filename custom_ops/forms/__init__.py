"""The attention forms, one file each. A new form is one file here plus one line below."""

from custom_ops.form import Form
from custom_ops.forms.bidirectional import FORM as BIDIRECTIONAL
from custom_ops.forms.causal_from import FORM as CAUSAL_FROM
from custom_ops.forms.document import FORM as DOCUMENT
from custom_ops.forms.document_causal import FORM as DOCUMENT_CAUSAL
from custom_ops.forms.full_self import FORM as FULL_SELF
from custom_ops.forms.prefix_lm import FORM as PREFIX_LM
from custom_ops.forms.segment_cross import FORM as SEGMENT_CROSS
from custom_ops.forms.sliding_self import FORM as SLIDING_SELF

FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        FULL_SELF, SLIDING_SELF, SEGMENT_CROSS, BIDIRECTIONAL, DOCUMENT, DOCUMENT_CAUSAL, PREFIX_LM, CAUSAL_FROM
    )
}  # fmt: skip
"""Every form by the name of its op."""

__all__ = [
    "BIDIRECTIONAL",
    "CAUSAL_FROM",
    "DOCUMENT",
    "DOCUMENT_CAUSAL",
    "FORMS",
    "FULL_SELF",
    "PREFIX_LM",
    "SEGMENT_CROSS",
    "SLIDING_SELF",
]
