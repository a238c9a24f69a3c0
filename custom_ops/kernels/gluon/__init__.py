"""Paged attention for Hopper GPUs, written in Gluon. Importing this loads neither triton nor gluon."""

from __future__ import annotations

import torch

HEAD_DIMS = (64, 128, 256)
PAGE_SIZES = (8, 16, 32, 64, 128, 256)
LARGEST_GROUP = 16
LATENT_DIMS = (512, 64)
"""Elements of a latent's value, and rotary ones: DeepSeek-V2's and V3's."""
LATENT_CONSUMERS = 2
"""Warpgroups that share the columns of a value: 64 rows of 256 columns are half of a warpgroup's registers."""


def consumers_of(block_m: int, latent: bool) -> int:
    """Consumer warpgroups of a tiling."""
    return LATENT_CONSUMERS if latent else block_m // 64


def counters_a_consumer(latent: bool) -> int:
    """Counters of arrived parts: parts of latents are combined in two steps (``results.meet_in_groups``)."""
    return 2 if latent else 1


def counters_of(block_m: int, latent: bool) -> int:
    """Counters a program and head block: consumers combine the parts of split items by themselves, each its own."""
    return consumers_of(block_m, latent) * counters_a_consumer(latent)


def unsupported_reasons(
    *,
    architecture: int,
    impl: str,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    group: int,
    head_dim: int,
    page_size: int,
    layout: str,
    value_dim: int | None = None,
) -> list[str]:
    """Why the Hopper kernel cannot take a call of paged attention; empty where it can.

    It follows from what the schedule knows, since schedule and attention must choose alike. ``architecture``: compute
    capability times ten. ``group``: query heads of one KV head.
    """
    latent = value_dim is not None
    dims = () if value_dim is None else (value_dim, head_dim - value_dim)
    checks = (
        (architecture == 90, f"architecture: expected 90 (Hopper), got {architecture}"),
        (impl == "triton_grouped", f"impl: expected 'triton_grouped', got {impl!r}"),
        (dtype in (torch.bfloat16, torch.float16), f"q: expected bfloat16 or float16, got {dtype}"),
        (cache_dtype == dtype, f"k_cache: expected q's dtype {dtype}, got {cache_dtype}"),
        (
            latent or group <= LARGEST_GROUP,
            f"heads: expected at most {LARGEST_GROUP} query heads a KV head, got {group}",
        ),
        (latent or head_dim in HEAD_DIMS, f"head_dim: expected one of {HEAD_DIMS}, got {head_dim}"),
        (
            not latent or dims == LATENT_DIMS,
            f"value_dim and rotary elements: expected {LATENT_DIMS}, got {dims}",
        ),
        (page_size in PAGE_SIZES, f"page_size: expected one of {PAGE_SIZES}, got {page_size}"),
        (layout == "unified", f"layout: expected 'unified', got {layout!r}"),
    )
    return [reason for holds, reason in checks if not holds]
