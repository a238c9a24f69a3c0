"""What the Hopper kernel of the dense forms is compiled for, and what it cannot take. No triton: selection reads it."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import sympy
import torch

if TYPE_CHECKING:
    from custom_ops.masks import Mask

CONSUMER_ROWS = 64
"""Queries of a consumer warpgroup: the least that wgmma takes."""
BOX_COLUMNS = 64
"""Most columns of a bulk copy: 128 bytes of a 16-bit dtype, the widest swizzle."""
MIN_BOX_COLUMNS = 16
"""Fewest: 32 bytes, the narrowest swizzle, and what one instruction multiplies."""
DIM_STEP = 8
"""Head dims are multiples of this: the copy engine takes strides in multiples of 16 bytes."""
HEAD_DIMS = range(64, 257, DIM_STEP)
EPILOGUE_DIMS = (64, 128)
"""Those of which the kernel takes an epilogue; see ``epilogue_reasons``."""
LEAST_QUERIES = 128
"""Of fewer, most rows of a tile would be nobody's: there the portable kernel puts the heads of a group in one tile."""
LEAST_WIDTH = 128
"""A window of fewer keys would leave most of a row tile's key tiles hidden."""
GREATEST_SOFTCAP = 1000.0
"""tanh comes from exponentials with an error of a rounding of 1, which the cap multiplies."""


@dataclasses.dataclass(frozen=True)
class DenseShape:
    """Compile-time numbers of one kernel; it travels as a constexpr, and device code reads its fields."""

    group: int
    """Query heads of one KV head."""
    sharing: int
    """KV heads of one value head."""
    columns: int
    """Parts of 64 columns across q and k; the last one may be narrower."""
    high_dim: int
    """Columns of a second part of q and k, one box wide: 16, 32 or 64; 0 if one of a power of two has them all."""
    value_columns: int
    """Parts of 64 columns across outputs, a power of two."""
    value_high_dim: int
    """Columns of a second part of v, 16 or 32, beside a first of half the outputs' width; 0 if v is as wide as they."""
    block_n: int
    """Keys a tile."""
    consumers: int
    """Consumer warpgroups."""
    stages: int
    """Tiles of K in shared memory,"""
    value_stages: int
    """and of V."""
    query_stages: int
    masked_first: bool
    """Key tiles before the full ones may be partial, not only those after them."""
    exact: bool
    """The banded mask is ``lower <= key < upper`` in every row; otherwise its predicate is applied."""
    split: bool
    """Loops of their own for partial and for full tiles; otherwise one that tells them apart."""
    overlap: bool
    """Softmax of a tile runs beside the product of the tile before it with V: of one warpgroup that does both."""
    reads_keys: bool
    """A predicate of per-key operands is applied in every tile."""
    q_start: bool
    query_values: bool
    request_values: bool
    key_values: bool
    key_padding: bool
    softcap: bool
    turns: bool
    """Consumers start the products that overlap a softmax in turn: one's softmax runs beside the other's products."""
    late_wait: bool
    """The product that a softmax overlaps is waited for after it. Otherwise ptxas decides: right after the scores."""
    lazy: bool
    """Outputs are scaled down only in tiles where the maximum of a warp's rows rises by much."""
    keeps_item: bool
    """Consumers keep which item it is for its outputs, instead of finding it again: three registers for divisions."""
    consumer_registers: int
    producer_registers: int
    extra: bool = False
    """An epilogue reads a further tensor as large as the outputs: the producer loads it over the queries."""

    def __post_init__(self) -> None:
        if self.turns and not self.overlap:
            raise ValueError("DenseShape: turns: expected overlap with it, got none; consumers would wait for ever")
        if self.late_wait and not self.overlap:
            raise ValueError("DenseShape: late_wait: expected overlap with it, got none; there is nothing to wait for")
        if self.extra and (self.query_stages < 2 or self.own_outputs or self.value_stages < self.stages - 1):
            raise ValueError(
                "DenseShape: extra: expected 2 query stages, through which outputs leave, and at most one value stage "
                f"less than {self.stages} of keys, got {self.query_stages} and {self.value_stages}; roles would wait "
                "for one another for ever"
            )

    @property
    def low_columns(self) -> int:
        """Parts of 64 columns in the first part of q and k: tiles are powers of two."""
        return self.columns - 1 if self.high_dim else self.columns

    @property
    def low_dim(self) -> int:
        return self.low_columns * BOX_COLUMNS

    @property
    def head_dim(self) -> int:
        """Columns of q and k as they are loaded."""
        return self.low_dim + self.high_dim

    @property
    def box(self) -> int:
        """Columns of a box of q and of k."""
        return self.high_dim or BOX_COLUMNS

    @property
    def value_box(self) -> int:
        """Columns of a box of v."""
        return self.value_high_dim or BOX_COLUMNS

    @property
    def value_dim(self) -> int:
        """Columns of outputs."""
        return self.value_columns * BOX_COLUMNS

    @property
    def value_low_dim(self) -> int:
        return self.value_dim // 2 if self.value_high_dim else self.value_dim

    @property
    def loaded_value_dim(self) -> int:
        """Columns of v as they are loaded."""
        return self.value_low_dim + self.value_high_dim

    @property
    def own_outputs(self) -> bool:
        """Outputs leave through shared memory of their own: they are wider than the first part of the queries."""
        return self.value_columns > self.low_columns

    @property
    def block_m(self) -> int:
        return self.consumers * CONSUMER_ROWS

    @property
    def key_bytes(self) -> int:
        return self.block_n * self.head_dim * 2

    @property
    def value_bytes(self) -> int:
        return self.block_n * self.loaded_value_dim * 2

    @property
    def query_bytes(self) -> int:
        return self.block_m * self.head_dim * 2

    @property
    def shared_bytes(self) -> int:
        """Shared memory of tiles, barriers left out."""
        keys_and_values = self.stages * self.key_bytes + self.value_stages * self.value_bytes
        outputs = self.block_m * self.value_dim * 2 if self.own_outputs else 0
        return keys_and_values + self.query_stages * self.query_bytes + outputs


def dense_reasons(
    *,
    architecture: int,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    query_len: int,
    width: int | None,
    softcap: float,
    aligned: bool,
) -> list[str]:
    """Why the Hopper kernel cannot, or had better not, take a dense call; empty where it does.

    ``architecture``: compute capability times ten. ``width``: the most keys that one query sees where the mask bounds
    them. ``aligned``: the copy engine can read q, k and v (``kernels.launch.can_copy``).
    """
    checks = (
        (architecture == 90, f"architecture: expected 90 (Hopper), got {architecture}"),
        (dtype in (torch.bfloat16, torch.float16), f"q: expected bfloat16 or float16, got {dtype}"),
        (
            head_dim in HEAD_DIMS,
            f"head_dim: expected a multiple of {DIM_STEP} from {HEAD_DIMS[0]} to {HEAD_DIMS[-1]}, got {head_dim}",
        ),
        (
            value_dim % DIM_STEP == 0 and _fits(head_dim, value_dim),
            f"value_dim: expected a multiple of {DIM_STEP} that needs no more room than head_dim {head_dim}, got "
            f"{value_dim}",
        ),
        (query_len >= LEAST_QUERIES, f"queries: expected at least {LEAST_QUERIES}, got {query_len}"),
        (
            width is None or width >= LEAST_WIDTH,
            f"window: expected at least {LEAST_WIDTH} keys a query, got {width}",
        ),
        (softcap <= GREATEST_SOFTCAP, f"softcap: expected at most {GREATEST_SOFTCAP}, got {softcap}"),
        (aligned, "q, k and v: expected addresses and strides that are multiples of 16 bytes, and none of 0"),
    )
    return [reason for holds, reason in checks if not holds]


def epilogue_reasons(head_dim: int) -> list[str]:
    """Why the Hopper kernel of a head dim takes no epilogue; empty where it does.

    The extra comes over an item's queries while those of the next one are in a second stage, which there is up to 128,
    and outputs leave there, if queries are in one part. Of 72 and 104 some kernels with a gate spill, up to 500 bytes.
    """
    return [] if head_dim in EPILOGUE_DIMS else [f"head_dim: expected 64 or 128, got {head_dim}"]


@functools.cache
def dense_shape(
    mask: Mask,
    present: tuple[bool, bool, bool, bool, bool],
    group: int,
    sharing: int,
    head_dim: int,
    value_dim: int,
    has_softcap: bool,
    consumers: int | None = None,
) -> DenseShape:
    """The kernel of a call under its shipped tiling.

    ``present``: which operands there are, in the order of ``specialise.kernel_operands``. ``consumers``: 2 asks for row
    tiles of two consumers where those of many items have three; ``dense_choice`` knows when.
    """
    q_start, query_values, request_values, key_values, key_padding = present
    exact = mask.interval() is not None
    masked_first = mask.tile_bounds().lo_all != 0
    reads_keys = mask.per_key != sympy.true
    plain = exact and not (reads_keys or query_values or request_values or has_softcap)
    tiling = _tiling(head_dim, plain, masked_first, key_values, consumers != 2)
    return DenseShape(
        group=group,
        sharing=sharing,
        columns=_columns(head_dim),
        high_dim=_high_dim(head_dim),
        value_columns=_value_columns(value_dim),
        value_high_dim=_value_high_dim(value_dim),
        masked_first=masked_first,
        exact=exact,
        reads_keys=reads_keys,
        q_start=q_start,
        query_values=query_values,
        request_values=request_values,
        key_values=key_values,
        key_padding=key_padding,
        softcap=has_softcap,
        **{
            "value_stages": tiling["stages"], "split": False, "turns": False, "late_wait": False, "lazy": False,
            "keeps_item": False, **tiling,
        },  # fmt: skip
    )


def _tiling(head_dim: int, plain: bool, masked_first: bool, key_values: bool, may_be_three: bool) -> dict[str, Any]:
    """What was fastest on an H200, in TFLOP/s (bf16), beside FlashAttention-3 and cuDNN in the same rounds.

    Two consumers that overlap their own products and softmax, or three that only overlap one another: these move a
    third less of K and V, but have 160 registers a thread, too few for masks that keep more than positions, and for
    an overlap of more than 64 keys a tile. Below, "early" is without ``late_wait``, "eager" without ``lazy``.
    """
    columns = _columns(head_dim)
    overlap = {"overlap": True, "late_wait": True, "lazy": True}
    two = overlap | {"consumers": 2, "consumer_registers": 240, "producer_registers": 24}
    three = {"consumers": 3, "overlap": False, "consumer_registers": 160, "producer_registers": 24}
    query_stages = 1 if columns > 2 else 2
    if key_values:
        # Their values are registers too. B2 H32/8 S4096 D128 documents: 425, early and eager 424.
        more = {"consumer_registers": 232, "producer_registers": 40, "query_stages": query_stages}
        return two | more | {"block_n": 32 if columns == 4 else 64, "stages": 3 if columns < 4 else 2}
    if columns == 4:
        # B2 H16/4 S4096 D256: 708, early 697, early and eager 686; 671 and 534. All keys seen: 715, 705, 705;
        # 716.
        return two | {"block_n": 64, "stages": 2, "query_stages": query_stages}
    if columns == 3:
        # B1 H32 S8192 D192/128: 701, early and eager 679, split loops 651, in turn 674; two consumers with 128 keys
        # a tile and turns 658, without turns 650; 670 and 506.
        if plain and not may_be_three:
            return two | {"block_n": 128, "stages": 2, "query_stages": query_stages, "turns": True}
        some = three | overlap if plain else two
        return some | {"block_n": 64, "stages": 3, "query_stages": query_stages}
    if columns == 1:
        # B4 H32/32 S4096 D64: 453, lazy 454, one loop 446, with overlap 433, of 64 keys a tile 427, two consumers
        # 407; 393 and 420. An item found again 451 instead of 452, all keys seen 483 instead of 490.
        if not may_be_three:
            return two | {"block_n": 128, "stages": 3, "query_stages": query_stages}
        three |= {"split": plain and not masked_first, "keeps_item": plain}
        return three | {"block_n": 128, "stages": 3, "query_stages": query_stages}
    if plain and masked_first and may_be_three:
        # Window 1024, B1 H32/8 S16384: D128 550, two consumers with 128 keys a tile 505 to 527; 420. D96 460, 415; 387.
        return three | overlap | {"block_n": 64, "stages": 3, "query_stages": query_stages}
    if not plain or not may_be_three:
        # B1 H16 S8192 D128, all keys seen: 667 to 674, in turn 652, split loops 618, three consumers 628; 640 and
        # 610.
        return two | {"block_n": 128, "stages": 2, "query_stages": query_stages}
    # B4 H32/8 S4096 D128: 649, lazy 641, with overlap of 64 keys a tile 633, two consumers 627; 580 and 520.
    # B1 S16384: 676 to 694, lazy 664, two consumers 661; 656 and 550. D96 B2 S8192: 601, eager 568; 588 and 411.
    return three | {
        "split": True, "lazy": head_dim < 2 * BOX_COLUMNS, "producer_registers": 32,
        "block_n": 128, "stages": 2, "query_stages": query_stages,
    }  # fmt: skip


def _columns(head_dim: int) -> int:
    """Boxes across q and k."""
    return -(-head_dim // BOX_COLUMNS)


def _high_dim(head_dim: int) -> int:
    """Columns of q and k past the greatest power of two, in whole boxes: 16, 32 or 64; 0 where the next one is near."""
    low = 1 << (head_dim.bit_length() - 1)
    past = head_dim - low
    if past == 0 or past > min(low // 2, BOX_COLUMNS):
        return 0
    return max(MIN_BOX_COLUMNS, 1 << (past - 1).bit_length())


def _value_high_dim(value_dim: int) -> int:
    """As ``_high_dim`` of v, where outputs of 128 columns hold both parts."""
    return _high_dim(value_dim) if BOX_COLUMNS < value_dim < 2 * BOX_COLUMNS else 0


def _fits(head_dim: int, value_dim: int) -> bool:
    """Whether outputs fit into the first part of the queries, or are so narrow that they get memory of their own."""
    low = _columns(head_dim) - (_high_dim(head_dim) > 0)
    return _value_columns(value_dim) <= max(low, min(_columns(head_dim), 2))


def _value_columns(value_dim: int) -> int:
    """Boxes across v: of a power of two."""
    return 1 << (_columns(value_dim) - 1).bit_length()
