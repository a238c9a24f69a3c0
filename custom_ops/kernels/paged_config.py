"""Tilings of paged attention per architecture and shape class: data, no triton.

Tilings are sized by the ahead-of-time compile for sm_80, sm_90 and sm_100: no spills, and registers and shared memory
for as many programs a multiprocessor as they name. Measurements are H200's where a comment gives them.
"""

from __future__ import annotations

import dataclasses

import torch

from custom_ops.kernels.gluon import counters_of
from custom_ops.kernels.specialise import padded_dim
from custom_ops.paged.schedule_layout import ScheduleLayout


@dataclasses.dataclass(frozen=True)
class PagedConfig:
    """How one step of paged attention is tiled and dealt out: schedule and attention must agree on it."""

    kernel: str
    """``"triton"``, or ``"gluon"`` for the Hopper kernel."""
    block_m: int
    """Rows a row tile: row = token * padded group + head of the block."""
    block_n: int
    """Keys a key tile."""
    padded_group: int
    """Rows a token: the next power of two of the query heads of a block."""
    items_per_entry: int
    """KV heads: heads that a row tile is computed for."""
    programs: int
    """Programs that the schedule deals out to; they live as long as the launch."""
    tolerance: int
    """How many percent more than an even share a program may be given so that fewer items are split."""
    num_warps: int
    num_stages: int
    """Depth of the software pipeline over key tiles."""
    counters_per_program: int = 1
    """Counters of parts that arrived: one for all who combine parts by themselves."""
    head_blocks: int = 1
    """Programs that walk the same units side by side, each for its own block of a KV head's query heads: they read the
    same keys at the same time, from L2 all but the first. The grid is ``programs * head_blocks``."""
    combined_elements: int = 8192
    """Elements of a split item's parts that a program of the portable kernel adds up at once."""

    @property
    def tile_tokens(self) -> int:
        """Tokens a row tile."""
        return self.block_m // self.padded_group

    @property
    def scratch_rows(self) -> int:
        """Rows of scratch memory for parts of split items in the portable kernel: two parts a program of the grid."""
        return 2 * self.programs * self.head_blocks * self.block_m

    def schedule_layout(self, requests: int, tokens: int) -> ScheduleLayout:
        """Where the parts of the schedule lie for R requests and T rows of q."""
        return ScheduleLayout(requests, tokens, self.tile_tokens, self.programs, self.counters_per_program)

    def __str__(self) -> str:
        return (
            f"{self.kernel} BLOCK_M={self.block_m} BLOCK_N={self.block_n} programs={self.programs} "
            f"head_blocks={self.head_blocks} tolerance={self.tolerance}% warps={self.num_warps} "
            f"stages={self.num_stages}"
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
    combined_elements: int = 8192
    """By default 64 registers a thread of 4 warps."""


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
    value_dim: int | None = None,
) -> PagedConfig:
    """The shipped tiling.

    ``architecture``: compute capability times ten (80, 90, 100), 0 for Triton's interpreter. ``sms``: the GPU's
    multiprocessors. ``shape_class``: ``"decode"`` or ``"chunk"``. ``gluon``: whether the Hopper kernel takes the call.
    ``requests``: R, None for many. ``value_dim``: elements of a value where the cache holds latents, else None.
    """
    group = num_heads // num_kv_heads
    few = requests is not None and requests * num_kv_heads * 4 <= sms
    if gluon:
        tiling = _gluon(shape_class, head_dim, value_dim is not None)
    elif architecture == 0:
        tiling = INTERPRETED
    elif value_dim is not None:
        few_heads = impl == "triton" or group <= 16
        # The wide tiles of latents leave fewer registers to combined parts: twice as many spill on every architecture.
        found = _latent(architecture, shape_class, dtype, padded_dim(value_dim), page_size, few_heads)
        tiling = dataclasses.replace(found, combined_elements=4096)
    else:
        tiling = _triton(architecture, shape_class, dtype, padded_dim(head_dim), layout, few)
    head_blocks = -(-group // (1 if impl == "triton" else min(group, tiling.block_m)))
    padded_group = 1 << (-(-group // head_blocks) - 1).bit_length()
    programs = INTERPRETED_PROGRAMS if architecture == 0 else max(1, sms * tiling.programs_per_sm // head_blocks)
    if few and not gluon and programs > num_kv_heads:
        # As many programs a KV head, so that of few long items each program has a part of one: 8 items of 512 tiles by
        # 128 programs 93.9 us, by 132, half of which end one item and begin another, 102.6.
        programs -= programs % num_kv_heads
    return PagedConfig(
        kernel="gluon" if gluon else "triton",
        block_m=tiling.block_m,
        block_n=tiling.block_n,
        padded_group=padded_group,
        items_per_entry=num_kv_heads,
        programs=programs,
        tolerance=tiling.tolerance,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        # The Hopper kernel's consumers combine parts by themselves.
        counters_per_program=head_blocks * (counters_of(tiling.block_m, value_dim is not None) if gluon else 1),
        head_blocks=head_blocks,
        combined_elements=tiling.combined_elements,
    )


def _gluon(shape_class: str, head_dim: int, latent: bool) -> Tiling:
    # Of an H200, by CUDA-graph replays. Decode waits for memory: the fewest rows, and two programs an SM where their
    # registers fit (5 to 8% over one). A whole number of consumer warpgroups of 64 rows; four warps each, whatever
    # num_warps says.
    if latent:
        # 64 rows of 512 sums are half of an SM's registers, two tiles of latents two thirds of its shared memory. Items
        # are cut at a cost: tolerance 0 instead of 5 takes 2% (128 requests of 4,096 keys, 128 heads) to 6% (16 heads).
        return Tiling(64, 64, 4, 2, 1, 5)
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
            # 1 request of 65,536 keys: 89.3 us, two programs of 16 x 64 tiles 91.8, FlashAttention-3 85.9; 4 warps take
            # 87.7, but spill 260 bytes where new keys are read directly, and half as many parts at once 93.9.
            return Tiling(16, 128, 8, 3, 1, 5, combined_elements=16384)
        return Tiling(16, 64, 4, 3, programs, 5) if wide <= 128 else Tiling(16, 32, 4, 3, programs, 5)
    if wide <= 64:
        return Tiling(64, 32, 4, 3, programs, 10)
    if wide <= 128:
        # With 4 warps 64 x 64 tiles spill everywhere, 64 x 32 ones everywhere but on sm_90.
        return Tiling(64, 32, 4, 3, 2, 10) if architecture == 90 else Tiling(64, 64, 8, 3, 1, 10)
    return Tiling(32, 32, 8, 3, 1, 10)


def _latent(
    architecture: int, shape_class: str, dtype: torch.dtype, wide: int, page_size: int, few_heads: bool
) -> Tiling:
    # A key tile is read once for both products, but q and acc are as wide as a latent: all registers of 8 warps, so one
    # program a multiprocessor, with two buffers of keys.
    if dtype == torch.float32:
        return Tiling(16, 16, 8, 2, 1, 5)
    large = architecture in (80, 90, 100, 103)
    tolerance = 5 if shape_class == "decode" else 10
    few_rows = few_heads and shape_class == "decode"
    if wide > 256:
        if architecture == 80 or not large:
            # 64 keys need 164 KB of shared memory, and sm_80 has 163; these 91 KB are sm_89's too.
            return Tiling(16, 32, 8, 3, 1, tolerance)
        # Keys of a tile in several pages have an address each: 32 rows spill 280 bytes then. 64 rows spill 1,400 bytes
        # as wgmma on sm_90, 5,000 on sm_100.
        return Tiling(16 if few_rows or page_size % 64 != 0 else 32, 64, 8, 3, 1, tolerance)
    if few_rows:
        return Tiling(16, 64, 4, 3, 2 if architecture in (90, 100, 103) else 1, tolerance)
    if wide > 128 or architecture in (100, 103):
        # With 64 rows sm_100's matrix unit has a layout of its own for each of a key's two uses: it is read twice.
        return Tiling(32 if large else 16, 64, 8, 3, 1, tolerance)
    return Tiling(64, 64 if large else 32, 8, 3, 1, tolerance)
