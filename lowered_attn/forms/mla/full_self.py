"""Full causal self-attention over latents as a pre-norm block: each token sees itself and every earlier one."""

from __future__ import annotations

from custom_ops.forms import FORMS
from lowered_attn.forms.mla.blocks import LatentBlock, latent_self_attention
from lowered_attn.layers import ROPE_BASE


class FullSelf(LatentBlock):
    """Pre-norm transformer block, [B, S, d_model] to the same, over `torch.ops.lowered_attn.full_self`.

    Keys and values come from one latent of `kv_comp_dim` elements a token (default 4 * head_dim, at most 512), queries
    through `q_comp_dim` (default 12 * head_dim), and scores live in `retr_dim` (default head_dim; even, at most 256):
    DeepSeek-V2's ratios, https://arxiv.org/abs/2405.04434. `head_dim` (default d_model // n_heads) is the width of a
    head's output. `backend`: "lowered", "sdpa", "flex", "reference", or "fallback", which is "reference". `rope_base`
    sets RoPE's longest wavelength, in tokens / (2 pi).
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        ffn_dim_multiplier: int = 4,
        backend: str = "lowered",
        *,
        head_dim: int | None = None,
        kv_comp_dim: int | None = None,
        q_comp_dim: int | None = None,
        retr_dim: int | None = None,
        rope_base: float = ROPE_BASE,
    ) -> None:
        attention = latent_self_attention(
            FORMS["full_self"], d_model, n_heads, backend, head_dim, kv_comp_dim, q_comp_dim, retr_dim, rope_base
        )
        super().__init__(d_model, ffn_dim_multiplier, attention)
