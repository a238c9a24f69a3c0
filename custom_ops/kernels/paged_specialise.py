"""What a call of paged attention compiles into the portable kernel, eager or as a template. No triton."""

from __future__ import annotations

from typing import Any

from custom_ops.kernels.paged_config import PagedConfig
from custom_ops.kernels.specialise import dot_precision, padded_dim
from custom_ops.paged.call import PagedCall


def attention_constants(call: PagedCall, config: PagedConfig) -> dict[str, Any]:
    """The compile-time constants, by their names in ``custom_ops/kernels/paged_tile.py``.

    All but the mask's device functions RANGE and VISIBLE. Tensors are asked for shapes, strides and dtypes alone, and
    strides along D must be 1, but for values of the distinct layout.
    """
    sizes = call.cache_sizes
    heads, head_dim = (int(size) for size in call.q.shape[1:])  # guarded on where shapes are symbolic
    group = heads // int(sizes.kv_heads)
    wide = padded_dim(call.out_dim)
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
        # Of latents nothing is read as a value.
        "SAME_STRIDES": call.latent or all(k == v for k, v in strides),
        "PAGE_SIZE": sizes.page_size,
        "X": keys.shape[4],
        "HEADS": config.items_per_entry,
        "HEAD_BLOCKS": config.head_blocks,
        "G_ALL": group,
        "G": -(-group // config.head_blocks),
        "PG": config.padded_group,
        # 0: too many rows for one part beside what is combined.
        "TOGETHER": min(8, config.combined_elements // (config.block_m * wide)),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "LATENT": call.latent,
        "D": head_dim,
        "DV": call.out_dim,
        "DV_PAD": wide,
        "R_PAD": padded_dim(head_dim - call.out_dim),
    }
