"""The eager kernel that stores new keys and values into the pages of a cache: one launch for both, any layout.

Latents are keys without values.
"""

import triton
import triton.language as tl

LARGEST_FP8 = tl.constexpr(448.0)
"""The largest float8_e4m3fn: what is out of range becomes this, as torch's clamped cast does."""


@triton.jit
def store_rows(
    X_NEW, CACHE, SCALE, token, slot, writes, stride_token, stride_head, cache_strides, heads,
    HAS_SCALE: tl.constexpr, TO_FP8: tl.constexpr, PAGE_SIZE: tl.constexpr, X: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """Every head of these tokens. ``cache_strides``: page, token, head, X elements, one element."""
    head_column = tl.arange(0, BLOCK_HEADS * D_PAD)
    column = head_column % D_PAD
    page = (slot // PAGE_SIZE) * cache_strides[0] + (slot % PAGE_SIZE) * cache_strides[1]
    for first in range(0, heads, BLOCK_HEADS):
        head = first + head_column // D_PAD
        inside = writes[:, None] & ((head < heads) & (column < D))[None, :]
        at = token.to(tl.int64)[:, None] * stride_token + (head * stride_head + column)[None, :]
        values = tl.load(X_NEW + at, mask=inside, other=0.0)
        if TO_FP8:
            values = values.to(tl.float32)
            if HAS_SCALE:
                values = tl.div_rn(values, tl.load(SCALE))
            values = tl.clamp(values, -LARGEST_FP8, LARGEST_FP8, propagate_nan=tl.PropagateNan.ALL)
        column_at = head * cache_strides[2] + column // X * cache_strides[3] + column % X * cache_strides[4]
        tl.store(CACHE + page[:, None] + column_at[None, :], values.to(CACHE.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "slots"])
def store_kernel(
    K, V, K_CACHE, V_CACHE, SLOTS, K_SCALE, V_SCALE,
    stride_k, stride_v, stride_kc, stride_vc, tokens, slots, heads,
    HAS_V: tl.constexpr, HAS_K_SCALE: tl.constexpr, HAS_V_SCALE: tl.constexpr, TO_FP8: tl.constexpr,
    PAGE_SIZE: tl.constexpr, X: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """One program BLOCK_TOKENS rows of K and, where HAS_V, of V.

    ``slots``: how many the cache has. ``stride_k``, ``stride_v``: token, head; of the caches as for ``store_rows``.
    """
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    slot = tl.load(SLOTS + token, mask=token < tokens, other=-1)
    writes = (slot >= 0) & (slot < slots)
    slot = tl.where(writes, slot, 0)
    store_rows(
        K, K_CACHE, K_SCALE, token, slot, writes, stride_k[0], stride_k[1], stride_kc, heads,
        HAS_K_SCALE, TO_FP8, PAGE_SIZE, X, BLOCK_HEADS, D, D_PAD,
    )  # fmt: skip
    if HAS_V:
        store_rows(
            V, V_CACHE, V_SCALE, token, slot, writes, stride_v[0], stride_v[1], stride_vc, heads,
            HAS_V_SCALE, TO_FP8, PAGE_SIZE, D, BLOCK_HEADS, D, D_PAD,
        )  # fmt: skip
