"""Full causal self-attention as a pre-norm block: each token sees itself and every earlier one."""

from __future__ import annotations

from custom_ops.forms import FORMS
from lowered_attn.layers import ROPE_BASE, PreNormBlock, self_attention


class FullSelf(PreNormBlock):
    """Pre-norm transformer block, [B, S, d_model] to the same, over `torch.ops.lowered_attn.full_self`.

    `backend`: "lowered", "sdpa", "flex" or "reference". `n_kv_heads` (default n_heads) divides n_heads;
    `head_dim` (default d_model // n_heads) is even; `rope_base` sets RoPE's longest wavelength, in tokens /
    (2 pi).
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        ffn_dim_multiplier: int = 4,
        backend: str = "lowered",
        *,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_base: float = ROPE_BASE,
    ) -> None:
        attention = self_attention(FORMS["full_self"], d_model, n_heads, backend, n_kv_heads, head_dim, rope_base)
        super().__init__(d_model, ffn_dim_multiplier, attention)
