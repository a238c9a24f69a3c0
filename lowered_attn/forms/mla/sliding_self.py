"""Sliding-window causal self-attention over latents as a pre-norm block: a token sees the `window_size` latest."""

from __future__ import annotations

from custom_ops.forms import FORMS
from lowered_attn.checks import check_int
from lowered_attn.forms.mla.blocks import LatentBlock, latent_self_attention
from lowered_attn.layers import ROPE_BASE


class SlidingSelf(LatentBlock):
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
        head_dim: int | None = None,
        kv_comp_dim: int | None = None,
        q_comp_dim: int | None = None,
        retr_dim: int | None = None,
        rope_base: float = ROPE_BASE,
    ) -> None:
        check_int("SlidingSelf", "window_size", window_size, 1)
        attention = latent_self_attention(
            FORMS["sliding_self"], d_model, n_heads, backend, head_dim, kv_comp_dim, q_comp_dim, retr_dim, rope_base
        )
        super().__init__(d_model, ffn_dim_multiplier, attention, window=window_size)
