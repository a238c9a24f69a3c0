"""How pages of keys and values lie in memory: the two cache layouts, their shapes, and one view that hides which it is.

``unified``   K and V ``[pages, page_size, Hkv, D]``: a token's heads lie together.
``distinct``  K ``[pages, Hkv, D / X, page_size, X]`` with ``X = 16 / element size``, V ``[pages, Hkv, D, page_size]``:
              16 bytes of each key of a page lie together, and the values of one dimension (vLLM's layout).

Token ``t`` of a cache lies in page ``t // page_size`` at offset ``t % page_size``; a slot is that ``t``.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
"""The one 8-bit dtype of caches: 4 bits of exponent, 3 of mantissa, no infinity, largest value 448."""
PAGE_SIZES = (1, 256)
"""The least and the most tokens of a page."""
VECTOR_BYTES = 16
"""Bytes of one key that lie together in the distinct layout."""


class CacheSizes(NamedTuple):
    """What a cache holds, whatever its layout."""

    pages: int
    page_size: int
    kv_heads: int
    head_dim: int


class CacheLayout(Protocol):
    """A layout: shapes from sizes, sizes from a key cache, and views that are indexed the same in every layout."""

    name: str
    key_dims: str
    """The dimensions of a key cache, as in messages."""
    value_dims: str

    def key_shape(self, sizes: CacheSizes, dtype: torch.dtype) -> tuple[int, ...]:
        """The shape of a key cache."""

    def value_shape(self, sizes: CacheSizes) -> tuple[int, ...]:
        """The shape of a value cache."""

    def sizes(self, k_cache: Tensor) -> CacheSizes:
        """The sizes of a key cache of the right rank."""

    def key_tokens(self, k_cache: Tensor) -> Tensor:
        """A view ``[pages, page_size, Hkv, D / X, X]``: element ``d`` of a key is at ``d // X, d % X``.

        Its strides are what a kernel needs. ``X`` is ``D`` where a key lies in one piece.
        """

    def value_tokens(self, v_cache: Tensor) -> Tensor:
        """A view ``[pages, page_size, Hkv, D]``."""


class _Unified:
    name = "unified"
    key_dims = value_dims = "[pages, page_size, Hkv, D]"

    def key_shape(self, sizes: CacheSizes, dtype: torch.dtype) -> tuple[int, ...]:
        return tuple(sizes)

    def value_shape(self, sizes: CacheSizes) -> tuple[int, ...]:
        return tuple(sizes)

    def sizes(self, k_cache: Tensor) -> CacheSizes:
        return CacheSizes(*k_cache.shape)

    def key_tokens(self, k_cache: Tensor) -> Tensor:
        return k_cache.unsqueeze(3)

    def value_tokens(self, v_cache: Tensor) -> Tensor:
        return v_cache


class _Distinct:
    name = "distinct"
    key_dims = "[pages, Hkv, D / X, page_size, X] with X = 16 / element size"
    value_dims = "[pages, Hkv, D, page_size]"

    def key_shape(self, sizes: CacheSizes, dtype: torch.dtype) -> tuple[int, ...]:
        pages, page_size, kv_heads, head_dim = sizes
        width = VECTOR_BYTES // dtype.itemsize
        return pages, kv_heads, head_dim // width, page_size, width

    def value_shape(self, sizes: CacheSizes) -> tuple[int, ...]:
        pages, page_size, kv_heads, head_dim = sizes
        return pages, kv_heads, head_dim, page_size

    def sizes(self, k_cache: Tensor) -> CacheSizes:
        pages, kv_heads, pieces, page_size, width = k_cache.shape
        return CacheSizes(pages, page_size, kv_heads, pieces * width)

    def key_tokens(self, k_cache: Tensor) -> Tensor:
        return k_cache.permute(0, 3, 1, 2, 4)

    def value_tokens(self, v_cache: Tensor) -> Tensor:
        return v_cache.permute(0, 3, 1, 2)


LAYOUTS: dict[str, CacheLayout] = {layout.name: layout for layout in (_Unified(), _Distinct())}
"""Every layout by the name that ops and metadata carry."""


def empty_caches(
    layout: str, sizes: CacheSizes, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Uninitialised key and value caches of ``sizes``."""
    chosen = LAYOUTS[layout]
    return (
        torch.empty(chosen.key_shape(sizes, dtype), dtype=dtype, device=device),
        torch.empty(chosen.value_shape(sizes), dtype=dtype, device=device),
    )
