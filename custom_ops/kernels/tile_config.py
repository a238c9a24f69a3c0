"""Tile sizes per architecture and shape class: data, no triton.

The sm_90 rows were measured on H200s (torch 2.11, triton 3.6, bf16; from one machine to the next they differ by 5 to
10%). Comments give TFLOP/s of the forward kernel. The others are sized to fit their shared memory with no register
spills in the ahead-of-time compile.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

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
    architecture: int,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    width: int | None,
    descriptors_fit: bool,
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
        # IEEE products keep whole rows in registers: 64 x 32 tiles with 4 warps spill 1 to 30 KB a thread.
        return TileConfig(64, 32, 8, 1) if wide <= 64 else TileConfig(32 if wide <= 128 else 16, 16, 8, 1)
    if width is not None and width <= 32:
        return _narrow(wide, width)
    if wide > 256 and architecture in (90, 100, 103):
        return _latent(descriptors_fit)
    if architecture == 90:
        return _hopper(head_dim, value_dim, wide, width, descriptors_fit)
    if architecture in (100, 103):
        return _blackwell(wide, width, descriptors_fit)
    # sm_80, and sm_86, sm_89 and sm_120 with their 99 KB of shared memory a block.
    if width is not None and width <= 512 and wide <= 128:
        return TileConfig(64, 32, 4, 3)
    if wide <= 64:
        return TileConfig(128, 64, 8, 3)
    if wide > 256:
        return TileConfig(64, 16, 8, 3)  # 84 KB at most; 32 keys a tile spill 32 to 64 bytes
    return TileConfig(128, 32, 8, 3) if wide <= 128 else TileConfig(64, 32, 8, 2)


def _narrow(wide: int, width: int) -> TileConfig:
    """One or two key tiles a row tile: nothing to pipeline, so small tiles and many of them.

    Segments, B8 H16/16 Lq8192 Lk1024 D64 lookback 4, of which moving q and out is 62 us: 116 us with 64 x 16 tiles,
    128 with 128 x 32, 131 with 64 x 32; FlexAttention 807.
    """
    warps = 4 if wide <= 128 else 8
    return TileConfig(64, 16, warps, 2) if width <= 16 else TileConfig(64, 32, warps, 2)


def _latent(descriptors_fit: bool) -> TileConfig:
    """Values of more than 256 elements, not measured: 64 rows a tile leave an accumulator of 128 registers a thread.

    128 rows spill 11 KB on Hopper and do not fit Blackwell's tensor memory. Pointers, whose addresses live in
    registers, spill up to 180 bytes with 64 keys a tile and 512 with padded keys; descriptors take 184 to 233.
    """
    return TileConfig(64, 64, 8, 2, descriptors=True) if descriptors_fit else TileConfig(64, 32, 8, 3)


def _hopper(head_dim: int, value_dim: int, wide: int, width: int | None, descriptors_fit: bool) -> TileConfig:
    cut = head_dim <= padded_dim(head_dim) * 3 // 4  # by load_query
    descriptors = descriptors_fit and not cut
    if width is not None and width <= 512 and wide <= 128:
        # Window 256, B4 H32/8 S4096 D128: descriptors 241 (64 keys a tile 199), pointers 215 (201); FA3 253.
        return TileConfig(64, 32, 4, 3, descriptors and wide == 128)
    if wide <= 64:
        # B4 H32/32 S4096 D64: 391 to 419; 64 x 64 tiles 354 to 390, descriptors 361 to 405; cuDNN 405 to 433, Flex
        # 330 to 350.
        return TileConfig(128, 64, 8, 3)
    if wide <= 128:
        if not descriptors:
            # B4 H32/8 S4096 D128: 431 to 454; D 96 373, D 80 316, where descriptors reach 355 and 311.
            return TileConfig(128, 64, 8, 3)
        # S4096: 436 to 507, Flex 377 to 385; window 1024 S16384: 367 to 397, with 32 keys a tile 364 to 399, Flex 314
        # to 317. At S 16384 it reaches 490 to 509 and 128 x 128 tiles of 8 warps in 3 stages 535 to 597, but those
        # spill (12 to 76 bytes), and in 2 stages, without spills, they reach 480.
        return TileConfig(64, 64, 4, 3, descriptors=True)
    if cut:
        # D192/128 B1 H32 S8192: 448 to 503, by descriptors 463 to 495.
        return TileConfig(128, 64, 8, 3) if value_dim <= 128 else TileConfig(128, 32, 8, 3)
    # B2 H16/4 S4096 D256: descriptors 446 to 515, pointers 432 to 449.
    return TileConfig(128, 64, 8, 2, descriptors=True) if descriptors else TileConfig(128, 32, 8, 3)


def _blackwell(wide: int, width: int | None, descriptors_fit: bool) -> TileConfig:
    if width is not None and width <= 512 and wide <= 128:
        return TileConfig(64, 32, 4, 3)
    if wide <= 64:
        return TileConfig(128, 64, 8, 3)
    if wide <= 128:
        return TileConfig(128, 64, 8, 3, descriptors=descriptors_fit)
    return TileConfig(128, 64, 8, 2, descriptors=True) if descriptors_fit else TileConfig(128, 32, 8, 2)


def backward_config(architecture: int, dtype: torch.dtype, head_dim: int, value_dim: int) -> TileConfig:
    """The shipped tiling of the backward kernels; arguments as for ``forward_config``."""
    if architecture == 0:
        return INTERPRETED
    wide = max(padded_dim(head_dim), padded_dim(value_dim))
    if dtype == torch.float32:
        return TileConfig(32, 32, 4, 1) if wide <= 64 else TileConfig(16, 16, 4 if wide <= 256 else 8, 1)
    if wide > 256 and architecture not in (80, 90, 100, 103):
        return TileConfig(16, 32, 8, 1)  # 78 to 90 KB of shared memory, where a block has 99
    if wide > 128:
        # 512 for v: 106 to 131 KB, 226 to 255 registers and no spills on sm_80, sm_90 and sm_100. With 64 keys a tile
        # Hopper multiplies by wgmma, but spills 456 to 1,456 bytes.
        return TileConfig(32, 32, 8, 1)
    if architecture not in (90, 100, 103):
        return TileConfig(64, 64, 8, 1)
    # Milliseconds on an H200. B4 H32/32 S4096 D64: 2.9; 128 x 64 with 8 warps 3.6, 64 x 64 with 8 warps 6.0; cuDNN 1.8.
    # B4 H32/8 S4096 D128: 5.1; 64 x 64 with 4 warps 5.3, with 8 warps 10.0; cuDNN 3.0.
    return TileConfig(64, 64, 4, 1) if wide <= 64 else TileConfig(128, 64, 8, 2)


def can_use_descriptors(architecture: int, has_key_padding: bool) -> bool:
    """Whether this GPU has the engine and the call no padded keys: the engine reads those too, and 0 * NaN is NaN."""
    return architecture >= 90 and not has_key_padding


def rows_can_be_copied(sizes: Sequence[int], strides: Sequence[int], element_size: int) -> bool:
    """Whether the bulk copy engine can read ``[B, H, L, D]``, as far as strides say: rows in one piece, a whole number
    of its steps apart, none repeated. The stride of a dimension of one is never used."""
    step = DESCRIPTOR_ALIGNMENT // element_size
    apart = zip(sizes[:3], strides[:3], strict=True)
    return strides[3] == 1 and all(size == 1 or (stride > 0 and stride % step == 0) for size, stride in apart)


def heads_together(l2_bytes: int, heads: int, bytes_a_head: int) -> int:
    """How many (batch, KV head) pairs run side by side: as many as keep their K and V in a quarter of L2.

    A quarter, because tiles of neighbouring groups overlap in time. A power of two, so that few kernels are compiled.
    On an H200 1, 4 and 8 heads together differ by 2% at 2 MB a head and 32 are 4 to 8% slower; at 1 MB, 8 beat 1 by 2
    to 5%.
    """
    fitting = max(1, min(heads, l2_bytes // 4 // max(bytes_a_head, 1)))
    return 1 << (fitting.bit_length() - 1)
