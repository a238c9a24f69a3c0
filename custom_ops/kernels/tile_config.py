"""Tile sizes per architecture and shape class: data, no triton. Measured where ``tools/results`` says so, sized to fit elsewhere."""

from __future__ import annotations

import dataclasses

import torch

from custom_ops.kernels.specialise import padded_dim


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

    def __str__(self) -> str:
        return f"BLOCK_M={self.block_m} BLOCK_N={self.block_n} warps={self.num_warps} stages={self.num_stages}"


def forward_config(architecture: int, dtype: torch.dtype, head_dim: int, value_dim: int, width: int | None) -> TileConfig:
    """The shipped tiling of the forward kernel.

    ``architecture``: compute capability times ten (80, 90, 100), 0 for Triton's interpreter. ``width``: the most keys that one query
    sees where the mask bounds them (a window, a lookback), else None.
    """
    if architecture == 0:
        return TileConfig(16, 16, 4, 1)
    wide = max(padded_dim(head_dim), padded_dim(value_dim))
    if dtype == torch.float32:
        return TileConfig(64, 32, 4, 2) if wide <= 128 else TileConfig(32, 16, 4, 2)
    if width is not None and width <= 32:
        return TileConfig(128, 32, 4, 2)
    if architecture >= 90:
        if wide <= 64:
            return TileConfig(128, 128, 8, 2)
        if wide <= 128:
            return TileConfig(128, 128, 8, 2)
        return TileConfig(128, 64, 8, 2)
    if wide <= 64:
        return TileConfig(128, 64, 4, 3)
    if wide <= 128:
        return TileConfig(128, 32, 4, 3)
    return TileConfig(64, 32, 4, 2)


def backward_config(architecture: int, dtype: torch.dtype, head_dim: int, value_dim: int) -> TileConfig:
    """The shipped tiling of the backward kernels; arguments as for ``forward_config``."""
    if architecture == 0:
        return TileConfig(16, 16, 4, 1)
    wide = max(padded_dim(head_dim), padded_dim(value_dim))
    if dtype == torch.float32:
        return TileConfig(32, 32, 4, 1) if wide <= 128 else TileConfig(16, 16, 4, 1)
    return TileConfig(64, 64, 4, 1) if wide <= 128 else TileConfig(32, 32, 4, 1)


def heads_together(l2_bytes: int, heads: int, bytes_a_head: int) -> int:
    """How many (batch, KV head) pairs run side by side: as many as keep their K and V in a quarter of L2, a power of two.

    A quarter, because tiles of neighbouring groups overlap in time. A power of two, so that few kernels are compiled.
    """
    fitting = max(1, min(heads, l2_bytes // 4 // max(bytes_a_head, 1)))
    return 1 << (fitting.bit_length() - 1)
