"""Attention for torch.compile: a model says what it attends to, a form; the compiler decides how."""

import lowered_attn._siblings  # noqa: F401  # first: it checks that custom_ops and inductor_passes are ours
from lowered_attn.aoti import aoti_compile_and_package
from lowered_attn.attn_impl import (
    Attention,
    reference_torch_attention,
    triton_attention,
    triton_grouped_attention,
)
from lowered_attn.backends import UnsupportedBackendError
from lowered_attn.block_diffusion import BlockDiffusionMetaData
from lowered_attn.config import AttentionConfig
from lowered_attn.explain import Explanation, explain
from lowered_attn.factory import make_full_self_block, make_segment_cross, make_sliding_self_block
from lowered_attn.forms import mla, regular
from lowered_attn.forms.mla.cache import LatentCache
from lowered_attn.forms.mla.deepseek import DeepSeekAttention
from lowered_attn.latent_attention import LatentAttention
from lowered_attn.metadata import (
    AttnMetaDataBase,
    CausalMetaData,
    fetch_attn_metadata,
    is_warming_up,
    reset_warming_up,
    set_debug,
    set_fetch_fn_for_attn_metadata,
    set_warming_up,
)

__all__ = [
    "Attention",
    "AttentionConfig",
    "AttnMetaDataBase",
    "BlockDiffusionMetaData",
    "CausalMetaData",
    "DeepSeekAttention",
    "Explanation",
    "LatentAttention",
    "LatentCache",
    "UnsupportedBackendError",
    "aoti_compile_and_package",
    "explain",
    "fetch_attn_metadata",
    "is_warming_up",
    "make_full_self_block",
    "make_segment_cross",
    "make_sliding_self_block",
    "mla",
    "reference_torch_attention",
    "regular",
    "reset_warming_up",
    "set_debug",
    "set_fetch_fn_for_attn_metadata",
    "set_warming_up",
    "triton_attention",
    "triton_grouped_attention",
]
