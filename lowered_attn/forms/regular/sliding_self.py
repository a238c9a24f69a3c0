"""Sliding-window causal self-attention as a pre-norm block: a token sees the `window_size` latest tokens."""

from __future__ import annotations

from custom_ops.forms import FORMS
from lowered_attn.checks import check_int
from lowered_attn.layers import ROPE_BASE, PreNormBlock, self_attention


class SlidingSelf(PreNormBlock):
    """Pre-norm transformer block, [B, S, d_model] to the same, over `torch.ops.lowered_attn.sliding_self`.

    `window_size` counts keys, the query's own included, and is at least 1; the other arguments are
    FullSelf's.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        window_size: int,
        ffn_dim_multiplier: int = 4,
        backend: str = "lowered",
        *,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_base: float = ROPE_BASE,
    ) -> None:
        check_int("SlidingSelf", "window_size", window_size, 1)
        attention = self_attention(FORMS["sliding_self"], d_model, n_heads, backend, n_kv_heads, head_dim, rope_base)
        super().__init__(d_model, ffn_dim_multiplier, attention, window=window_size)
