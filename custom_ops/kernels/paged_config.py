"""Tilings of paged attention per architecture and shape class: data, no triton.

Tilings are sized by the ahead-of-time compile for sm_80, sm_90 and sm_100: no spills, and registers and shared memory
for as many programs a multiprocessor as they name. Measurements are H200's where a comment gives them.
"""

from __future__ import annotations

import dataclasses

import torch

from custom_ops.kernels.specialise import padded_dim
from custom_ops.paged.schedule_layout import ScheduleLayout


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
    requests: int | None = None,
) -> PagedConfig:
    """The shipped tiling.

    ``architecture``: compute capability times ten (80, 90, 100), 0 for Triton's interpreter. ``sms``: the GPU's
    multiprocessors. ``shape_class``: ``"decode"`` or ``"chunk"``. ``gluon``: whether the Hopper kernel takes the call.
    ``requests``: R, None for many.
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
        few = requests is not None and requests * heads * 4 <= sms
        tiling = _triton(architecture, shape_class, dtype, padded_dim(head_dim), layout, few)
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
        # The Hopper kernel's consumers, of 64 rows each, combine parts by themselves.
        counters_per_program=tiling.block_m // 64 if gluon else 1,
    )


def _gluon(shape_class: str, head_dim: int) -> Tiling:
    # Of an H200, by CUDA-graph replays. Decode waits for memory: the fewest rows, and two programs an SM where their
    # registers fit (5 to 8% over one). A whole number of consumer warpgroups of 64 rows; four warps each, whatever
    # num_warps says.
    if shape_class == "decode":
        block_n = 128 if head_dim == 64 else 64
        return Tiling(64, block_n, 4, 2, 1 if head_dim == 256 else 2, 5)
    if head_dim == 256:
        return Tiling(128, 64, 4, 2, 1, 10)
    return Tiling(128, 128, 4, 4 if head_dim == 64 else 2, 1, 10)


def _triton(architecture: int, shape_class: str, dtype: torch.dtype, wide: int, layout: str, few: bool) -> Tiling:
    # sm_86, sm_89 and sm_120 have 99 KB of shared memory, sm_80 has 163.
    large = architecture in (80, 90, 100, 103)
    programs = 2 if large else 1
    if dtype == torch.float32:
        # IEEE products keep whole rows in registers.
        return Tiling(16, 16, 8, 2, 1, 5)
    if layout == "distinct":
        # Values one element apart take more addresses: larger tiles spill 100 to 1,000 bytes a thread.
        return Tiling(16, 16, 8, 3, 1, 5) if shape_class == "decode" else Tiling(32, 32, 8, 3, 1, 10)
    if shape_class == "decode":
        # Memory bound: 64 KB in flight a program, two programs a multiprocessor.
        if wide <= 64:
            # On sm_100 ptxas makes room for a third program of 4 warps, and spills.
            return Tiling(16, 128, 4, 3, programs, 5) if architecture == 90 else Tiling(16, 128, 8, 3, 1, 5)
        if few and architecture == 90 and wide == 128:
            # Few long items are cut into many parts, which the last to arrive adds up: fewer programs and larger tiles.
            # 1 request of 65,536 keys: 98 us; two programs of 16 x 64 tiles 132, FlashAttention-3 85.
            return Tiling(16, 128, 8, 3, 1, 5)
        return Tiling(16, 64, 4, 3, programs, 5) if wide <= 128 else Tiling(16, 32, 4, 3, programs, 5)
    if wide <= 64:
        return Tiling(64, 32, 4, 3, programs, 10)
    if wide <= 128:
        # With 4 warps 64 x 64 tiles spill everywhere, 64 x 32 ones everywhere but on sm_90.
        return Tiling(64, 32, 4, 3, 2, 10) if architecture == 90 else Tiling(64, 64, 8, 3, 1, 10)
    return Tiling(32, 32, 8, 3, 1, 10)
