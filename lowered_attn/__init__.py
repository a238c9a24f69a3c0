"""Attention for torch.compile: a model says what it attends to, a form; the compiler decides how."""

import lowered_attn._siblings  # noqa: F401  # first: it checks that custom_ops and inductor_passes are ours
from lowered_attn.backends import UnsupportedBackendError
from lowered_attn.config import AttentionConfig
from lowered_attn.explain import Explanation, explain
from lowered_attn.factory import make_full_self_block, make_segment_cross, make_sliding_self_block
from lowered_attn.forms import regular

__all__ = [
    "AttentionConfig",
    "Explanation",
    "UnsupportedBackendError",
    "explain",
    "make_full_self_block",
    "make_segment_cross",
    "make_sliding_self_block",
    "regular",
]
