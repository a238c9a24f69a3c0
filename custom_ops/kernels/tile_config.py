"""Tile sizes per architecture and shape class: data, no triton.

The sm_90 rows were measured on an H200 (torch 2.11, triton 3.6); the others are sized to fit their shared memory with
no register spills in the ahead-of-time compile.
"""

from __future__ import annotations

import dataclasses

import torch

from custom_ops.kernels.specialise import padded_dim

DESCRIPTOR_ALIGNMENT = 16
"""Bytes: the bulk copy engine wants addresses and strides in multiples of this."""


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """How one kernel is tiled."""

    block_m: int
    """Packed query rows a tile."""
    block_n: int
    """Keys a tile."""
    num_warps: int
    num_stages: int
    """Depth of the software pipeline over key tiles."""
    descriptors: bool = False
    """Whether K and V are read by the bulk copy engine, where ``descriptors_fit``; by pointers elsewhere."""

    def __str__(self) -> str:
        reads = " descriptors" if self.descriptors else ""
        return f"BLOCK_M={self.block_m} BLOCK_N={self.block_n} warps={self.num_warps} stages={self.num_stages}{reads}"


INTERPRETED = TileConfig(16, 16, 4, 1)
"""For Triton's interpreter: the smallest tiles, since small inputs should cross several."""


def forward_config(
    architecture: int, dtype: torch.dtype, head_dim: int, value_dim: int, width: int | None, descriptors_fit: bool
) -> TileConfig:
    """The shipped tiling of the forward kernel.

    ``architecture``: compute capability times ten (80, 90, 100), 0 for Triton's interpreter. ``width``: the most keys
    that one query sees where the mask bounds them (a window, a lookback), else None. The result's ``descriptors`` is
    False wherever ``descriptors_fit`` is.
    """
    if architecture == 0:
        return INTERPRETED
    wide = max(padded_dim(head_dim), padded_dim(value_dim))
    if dtype == torch.float32:
        return TileConfig(64, 32, 4, 2) if wide <= 128 else TileConfig(32, 16, 4, 2)
    if width is not None and width <= 32 and wide <= 128:
        # One or two tiles a row tile: nothing to pipeline, so small tiles and many of them.
        return TileConfig(64, 16, 4, 2)
    if architecture >= 100:
        return TileConfig(128, 64, 8, 2) if wide <= 128 else TileConfig(128, 32, 8, 2)
    if architecture >= 90:
        return _hopper(head_dim, wide, width, descriptors_fit)
    if wide <= 64:
        return TileConfig(128, 64, 8, 3)
    return TileConfig(128, 32, 8, 3) if wide <= 128 else TileConfig(64, 32, 8, 2)


def _hopper(head_dim: int, wide: int, width: int | None, descriptors_fit: bool) -> TileConfig:
    if wide <= 64:
        return TileConfig(128, 64, 8, 3)  # pointers: 2% ahead of descriptors at D 64
    if wide <= 128:
        if not descriptors_fit or head_dim <= 96:
            return TileConfig(128, 64, 8, 3)  # 5 to 18% ahead at 80 and 96, which load_query cuts
        if width is None:
            return TileConfig(128, 128, 8, 2, descriptors=True)  # at S 16384, 6% ahead of 64 keys, 15% of pointers
        # A window's partial tiles cost as much as full ones: small tiles waste less of them.
        return TileConfig(64, 32 if width <= 256 else 64, 4, 3, descriptors=True)
    if head_dim <= 192:  # cut in 128 and the rest: see load_query
        return TileConfig(128, 64, 8, 3)
    return TileConfig(128, 64, 8, 2, descriptors=True) if descriptors_fit else TileConfig(128, 32, 8, 2)


def backward_config(architecture: int, dtype: torch.dtype, head_dim: int, value_dim: int) -> TileConfig:
    """The shipped tiling of the backward kernels; arguments as for ``forward_config``."""
    if architecture == 0:
        return INTERPRETED
    wide = max(padded_dim(head_dim), padded_dim(value_dim))
    if dtype == torch.float32:
        return TileConfig(32, 32, 4, 1) if wide <= 128 else TileConfig(16, 16, 4, 1)
    return TileConfig(64, 64, 8, 1) if wide <= 128 else TileConfig(32, 32, 4, 1)


def can_use_descriptors(architecture: int, has_key_padding: bool) -> bool:
    """Whether this GPU has the engine and the call no padded keys: the engine reads those too, and 0 * NaN is NaN."""
    return architecture >= 90 and not has_key_padding


def heads_together(l2_bytes: int, heads: int, bytes_a_head: int) -> int:
    """How many (batch, KV head) pairs run side by side: as many as keep their K and V in a quarter of L2.

    A quarter, because tiles of neighbouring groups overlap in time. A power of two, so that few kernels are compiled.
    """
    fitting = max(1, min(heads, l2_bytes // 4 // max(bytes_a_head, 1)))
    return 1 << (fitting.bit_length() - 1)
