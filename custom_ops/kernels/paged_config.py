"""Tilings of paged attention per architecture and shape class: data, no triton.

The sm_90 rows are sized by the ahead-of-time compile (no spills; registers and shared memory for the programs per SM
that they name) and by measurements on H200s where a comment gives them.
"""

from __future__ import annotations

import dataclasses

import torch

from custom_ops.kernels.specialise import padded_dim
from custom_ops.paged.schedule_layout import ScheduleLayout

LEAST_ROWS = 16
"""The least rows a matrix instruction takes."""


@dataclasses.dataclass(frozen=True)
class PagedConfig:
    """How one step of paged attention is tiled and dealt out: schedule and attention must agree on it."""

    kernel: str
    """``"triton"``, or ``"gluon"`` for the Hopper kernel."""
    block_m: int
    """Rows a row tile: row = token * padded group + head of the group."""
    block_n: int
    """Keys a key tile."""
    padded_group: int
    """Rows a token: the next power of two of the query heads that share a tile."""
    items_per_entry: int
    """Heads a row tile is computed for: KV heads, or query heads where a tile holds one."""
    programs: int
    """The grid: programs live as long as the launch."""
    tolerance: int
    """How many percent more than an even share a program may be given so that fewer items are split."""
    num_warps: int
    num_stages: int
    """Depth of the software pipeline over key tiles."""
    counters_per_program: int = 1

    @property
    def tile_tokens(self) -> int:
        """Tokens a row tile."""
        return self.block_m // self.padded_group

    def schedule_layout(self, requests: int, tokens: int) -> ScheduleLayout:
        """Where the parts of the schedule lie for R requests and T rows of q."""
        return ScheduleLayout(requests, tokens, self.tile_tokens, self.programs, self.counters_per_program)

    def __str__(self) -> str:
        return (
            f"{self.kernel} BLOCK_M={self.block_m} BLOCK_N={self.block_n} programs={self.programs} "
            f"tolerance={self.tolerance}% warps={self.num_warps} stages={self.num_stages}"
        )


@dataclasses.dataclass(frozen=True)
class Tiling:
    """A row of the tables below."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int
    tolerance: int


INTERPRETED = Tiling(16, 16, 4, 1, 1, 10)
"""For Triton's interpreter: the smallest tiles, since small inputs should cross several."""
INTERPRETED_PROGRAMS = 5
"""Few, so that small inputs are split and each program computes several items."""


def resolve_shape_class(shape_class: str, tokens: int, requests: int) -> str:
    """``"decode"`` or ``"chunk"``: ``"auto"`` is decode below 8 rows of q a request, padding included.

    ``tokens``: T; ``requests``: R; both capacities, known on the host.
    """
    if shape_class != "auto":
        return shape_class
    return "decode" if tokens < 8 * requests else "chunk"


def paged_config(
    architecture: int,
    sms: int,
    impl: str,
    shape_class: str,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    layout: str,
    gluon: bool = False,
) -> PagedConfig:
    """The shipped tiling.

    ``architecture``: compute capability times ten (80, 90, 100), 0 for Triton's interpreter. ``sms``: the GPU's
    multiprocessors. ``shape_class``: ``"decode"`` or ``"chunk"``. ``gluon``: whether the Hopper kernel takes the call.
    """
    group = 1 if impl == "triton" else num_heads // num_kv_heads
    padded_group = 1 << (group - 1).bit_length()
    heads = num_heads if impl == "triton" else num_kv_heads
    programs = INTERPRETED_PROGRAMS
    if gluon:
        tiling = _gluon(shape_class, head_dim)
    elif architecture == 0:
        tiling = INTERPRETED
    else:
        tiling = _triton(architecture, shape_class, dtype, padded_dim(head_dim))
    if architecture != 0:
        programs = sms * tiling.programs_per_sm
    return PagedConfig(
        kernel="gluon" if gluon else "triton",
        block_m=max(tiling.block_m, padded_group),
        block_n=tiling.block_n,
        padded_group=padded_group,
        items_per_entry=heads,
        programs=programs,
        tolerance=tiling.tolerance,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )


def _gluon(shape_class: str, head_dim: int) -> Tiling:
    if shape_class == "decode":
        return Tiling(64, 64, 4, 2, 2, 5)
    return Tiling(128, 128, 4, 2, 1, 10)


def _triton(architecture: int, shape_class: str, dtype: torch.dtype, wide: int) -> Tiling:
    # sm_86, sm_89 and sm_120 have 99 KB of shared memory, sm_80 has 163.
    large = architecture in (80, 90, 100, 103)
    programs = 2 if large else 1
    if dtype == torch.float32:
        # IEEE products keep whole rows in registers.
        return Tiling(16, 32 if wide <= 128 else 16, 4, 2, programs, 5)
    if shape_class == "decode":
        # Memory bound: 64 KB in flight a program, two programs a multiprocessor.
        if wide <= 128:
            return Tiling(16, 128 if wide <= 64 else 64, 4, 3, programs, 5)
        return Tiling(16, 32, 4, 4 if large else 3, programs, 5)
    if wide <= 64:
        return Tiling(64, 64, 4, 3, programs, 10)
    # D 128: 64 x 64 tiles with 4 warps spill, with 8 warps they do not.
    return Tiling(64, 32, 4, 3, programs, 10) if wide <= 128 else Tiling(32, 32, 8, 3, 1, 10)
