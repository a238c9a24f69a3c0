"""The pre-norm block of latent self-attention: the regular forms' own, and a cache to stream through."""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops.form import Form
from lowered_attn.checks import check_tokens
from lowered_attn.forms.mla.cache import LatentCache
from lowered_attn.forms.mla.latent import Absorbable, LatentSizes, MultiHeadLatentAttention
from lowered_attn.layers import PreNormBlock, self_head_dim


class LatentBlock(Absorbable, PreNormBlock):
    """Pre-norm transformer block around latent self-attention."""

    def forward(self, x: Tensor, *, key_padding: Tensor | None = None, cache: LatentCache | None = None) -> Tensor:
        """Return the block's output [B, S, d_model] for x [B, S, d_model].

        key_padding bool [B, S], True = hidden from every query; a token that sees nothing gets the residual
        alone. Without a cache, positions are 0..S-1. With one (see `make_cache`), x are the tokens that come
        next: their latents are appended and they attend to all stored ones, so that a stream in pieces of any
        sizes gives what one pass over it gives. Keys are projected from all of the cache's capacity at each step,
        since RoPE stands between them and the queries. ValueError where a shape or dtype does not fit, or the
        cache is full.
        """
        if cache is None:
            return super().forward(x, key_padding=key_padding)
        check_tokens(type(self).__name__, "x", x, self.d_model, "d_model")
        normed = self.attention_norm(x)
        start = cache.append(self.attention.kv_down(normed), key_padding)
        operands = {**self.int_operands, "key_padding": cache.key_padding, "q_start": start}
        positions = start.unsqueeze(1) + torch.arange(x.shape[1], device=x.device)
        slots = torch.arange(cache.capacity, device=x.device)
        return self._add(x, self.attention.attend(normed, cache.data, operands, positions, slots))


def latent_self_attention(
    form: Form,
    d_model: int,
    n_heads: int,
    backend: str,
    head_dim: int | None,
    kv_comp_dim: int | None,
    q_comp_dim: int | None,
    retr_dim: int | None,
    rope_base: float,
) -> MultiHeadLatentAttention:
    """Return a block's latent self-attention; head_dim None means d_model // n_heads. ValueError on bad sizes."""
    head_dim = self_head_dim(form.name, d_model, n_heads, head_dim)
    sizes = LatentSizes.of(form.name, n_heads, head_dim, kv_comp_dim, q_comp_dim, retr_dim)
    sizes.check_rope(form.name)
    return MultiHeadLatentAttention(form, d_model, d_model, sizes, backend, rope_base)
