"""What an attention form computes: masks, ops, references and kernels.

Importing this package registers the ops in ``torch.ops.lowered_attn`` and never imports triton: kernels load at the
first CUDA call.
"""

from custom_ops import epilogue_op as _epilogue_op  # noqa: F401  (registers attention with an epilogue)
from custom_ops import grouped as _grouped  # noqa: F401  (registers the grouped ops)
from custom_ops import paged as _paged  # noqa: F401  (registers the paged ops)
from custom_ops.forms import FORMS
from custom_ops.masks import Mask

__all__ = ["FORMS", "Mask"]
