"""What a call of paged attention compiles into the portable kernel, eager or as a template. No triton."""

from __future__ import annotations

from typing import Any

from custom_ops.kernels.paged_config import PagedConfig
from custom_ops.kernels.specialise import dot_precision, padded_dim
from custom_ops.paged.call import PagedCall

COMBINED_ELEMENTS = 8192
"""Elements of parts that a program combines at once: 64 registers a thread of 4 warps."""


def attention_constants(call: PagedCall, config: PagedConfig) -> dict[str, Any]:
    """The compile-time constants, by their names in ``custom_ops/kernels/paged_tile.py``.

    All but the mask's device functions RANGE and VISIBLE. Tensors are asked for shapes, strides and dtypes alone, and
    strides along D must be 1, but for values of the distinct layout.
    """
    sizes = call.cache_sizes
    heads, head_dim = call.q.shape[1:]
    group = heads // sizes.kv_heads
    alone = call.impl == "triton"
    wide = padded_dim(head_dim)
    keys, values = call.cache_layout.key_tokens(call.k_cache), call.cache_layout.value_tokens(call.v_cache)
    strides = [(keys.stride()[:2], values.stride()[:2])]
    if call.k is not None and call.v is not None:
        strides.append((call.k.stride()[:1], call.v.stride()[:1]))
    return {
        "EXACT": call.mask.interval() is not None,
        "DIRECT": call.direct,
        "MERGED": call.direct and call.layout == "unified" and call.k_cache.dtype == call.q.dtype,
        "HAS_SINKS": call.sinks is not None,
        "HAS_K_SCALE": call.k_scale is not None,
        "HAS_V_SCALE": call.v_scale is not None,
        "HAS_SOFTCAP": call.softcap != 0.0,
        "PRECISION": dot_precision(call.q.dtype),
        "SAME_STRIDES": all(k == v for k, v in strides),
        "PAGE_SIZE": sizes.page_size,
        "X": keys.shape[4],
        "HEADS": config.items_per_entry,
        "G": 1 if alone else group,
        "PG": config.padded_group,
        "REPEATS": group if alone else 1,
        "TOGETHER": max(1, min(8, COMBINED_ELEMENTS // (config.block_m * wide))),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "D": head_dim,
        "D_PAD": wide,
    }
