"""Attention over a paged cache of latents: multi-head latent attention as a served model computes it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from custom_ops.checks import VALUE_DIMS
from custom_ops.paged.checks import ROTARY_DIMS
from custom_ops.paged.layout import CacheSizes
from lowered_attn.checks import check_int, check_size, fail
from lowered_attn.metadata import AttnMetaDataBase
from lowered_attn.paged_layer import PagedLayer, Step, attend, check_page_size, new_tokens


class LatentAttention(PagedLayer):
    """Attention of one layer over latents: stores the step's, then attends through the cache, with absorbed weights.

    A token has one latent for all `num_heads` heads, `latent_dim + rotary_dim` elements: what keys and values are made
    of, then the key's rotary part. Queries come projected into that space (see `DeepSeekAttention`), so that the latent
    is the key as it is, and its first `latent_dim` elements are the value: each is read once, for both products. The
    query part that no position turns comes first, and `rotary_dim` may be 0.

    Scores are multiplied by `scale`. It has no default: it belongs to the key that a latent stands for (1 / sqrt(192)
    with DeepSeek's 128 + 64 elements a head), and 1 / sqrt(latent_dim + rotary_dim) would be another model.
    `attn_impl`, `sliding_window` and `softcap` are `Attention`'s, as are the step's metadata and the fetch hook; its
    kv_cache_layout says nothing here, since latents have one layout.

    Inference only: run it under torch.no_grad() or torch.inference_mode(). ValueError for sizes that do not fit.
    Source: DeepSeek-AI, "DeepSeek-V2", section 2.1, https://arxiv.org/abs/2405.04434.
    """

    CACHES = ("latent_cache",)
    ALLOCATE = "zeros of [pages, page_size, latent_dim + rotary_dim]"

    latent_cache: Tensor | None
    """Pages of latents, assigned by the engine: [pages, page_size, latent_dim + rotary_dim] in q's dtype."""

    def __init__(
        self,
        num_heads: int,
        latent_dim: int = 512,
        rotary_dim: int = 64,
        *,
        scale: float,
        attn_impl: str = "triton_grouped",
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> None:
        where = "LatentAttention"
        check_int(where, "num_heads", num_heads, 1)
        for name, value, limits in (("latent_dim", latent_dim, VALUE_DIMS), ("rotary_dim", rotary_dim, ROTARY_DIMS)):
            check_size(where, name, value, limits)
        check_scale(where, scale)
        super().__init__(attn_impl, scale, sliding_window, softcap)
        self.num_heads = num_heads
        self.latent_dim = latent_dim
        self.rotary_dim = rotary_dim

    def extra_repr(self) -> str:
        """Show sizes and what is attended to."""
        names = ("num_heads", "latent_dim", "rotary_dim", "scale", "attn_impl", "sliding_window", "softcap")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def forward(self, q: Tensor, latent: Tensor) -> Tensor:
        """Return [T, num_heads, latent_dim], or [T, num_heads * latent_dim] where q is [T, num_heads * width].

        With width = latent_dim + rotary_dim: q [T, num_heads, width] or [T, num_heads * width]; latent [T, width], of
        the new tokens, whose first part is normalised and whose second is turned by RoPE. The step's metadata comes
        from the fetch hook. Latents are stored where its slots say. A row past cu_seqlens_q[-1], a row that is not
        valid and a row that sees nothing return 0.
        """
        (cache,) = self._caches()
        metadata = self._step()
        flat, width = q.dim() == 2, self.latent_dim + self.rotary_dim
        q = self._heads("q", q, self.num_heads, width, metadata)
        latent = self._heads("latent", latent, 1, width, metadata).squeeze(1)
        check_cache(metadata, cache, width)
        torch.ops.lowered_attn.store_latent_cache(latent, cache, metadata.slot_mapping)
        (new,) = new_tokens(metadata, cache, latent)
        out = self.attend(q, new, cache, Step.of(metadata))
        return out.flatten(1) if flat else out

    def attend(self, q: Tensor, latent: Tensor | None, cache: Tensor, step: Step) -> Tensor:
        """Return [T, num_heads, latent_dim] of q [T, num_heads, width] over any pages [pages, page_size, width].

        `latent` [T, width] are the new tokens' where the pages do not hold them yet. Nothing is stored.
        """
        out, _ = attend(
            "paged_latent_attention",
            self.attn_impl,
            q,
            (latent,),
            (cache,),
            step,
            CacheSizes(cache.shape[0], cache.shape[1], 1, cache.shape[2]),
            scale=self.scale,
            sliding_window=self.sliding_window,
            softcap=self.softcap,
            value_dim=self.latent_dim,
        )
        return out


def check_scale(where: str, scale: object) -> None:
    """Raise ValueError unless `scale` is a number that kernels take."""
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 <= scale < math.inf:
        remedy = "pass 1 / sqrt(elements of an expanded key), such as 192 ** -0.5"
        fail(where, "scale", "a finite number of at least 0", repr(scale), remedy)


def check_cache(metadata: AttnMetaDataBase, cache: Tensor, width: int) -> None:
    """Raise ValueError unless a latent cache is [pages, the metadata's page size, width]."""
    if cache.dim() != 3 or cache.shape[2] != width:
        expected = f"[pages, page_size, {width}], latent_dim + rotary_dim"
        fail("LatentAttention", "latent_cache", expected, f"shape {list(cache.shape)}", "allocate the cache so")
    check_page_size("LatentAttention", "latent_cache", metadata, cache.shape[1])
