"""How long a kernel takes for a dense call, in microseconds: the load of its busiest multiprocessor. No triton.

A launch has a cost of its own, an item (a row tile of a head) has one, and so has each key tile of it. Which items a
program of the Hopper kernel takes follows from the walk (``dense_walk``), which is repeated here in Python: so the walk
too is chosen by what it leaves on the busiest program. Rates are measured, by ``python -m tools.fit_choice``.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from custom_ops.mask_printing import python_function

if TYPE_CHECKING:
    from custom_ops.masks import Mask

L2_SHARE = 4
"""Heads whose K and V fill a quarter of L2 never get in one another's way: groups of heads overlap in time, and Q and
outputs pass through L2 too."""
L2_LOSS, GREATEST_LOSS = 0.02, 0.02
"""Of a group that fills more, what each further L2 of K and V costs, and what none exceeds. On an H200 groups of 1.1 to
1.6 L2 took 0.99 of what rates without it predict at 192/128, and 1.03 to 1.05 under windows."""
EXACT_TURNS, LISTED_TURNS = 20, 6
"""Programs that take more items, of a walk or of a list, are as busy as the mean one, within half an item."""


class Gpu(NamedTuple):
    """What choices are made for."""

    multiprocessors: int
    l2_bytes: int


H200 = Gpu(132, 60 << 20)
"""Where rates were measured."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Those of a dense call: q ``[B, Hq, Lq, D]``, k ``[B, Hkv, Lk, D]``, v ``[B, Hv, Lk, Dv]``."""

    batch: int
    heads: int
    kv_heads: int
    value_heads: int
    query_len: int
    key_len: int
    head_dim: int
    value_dim: int

    @classmethod
    def of(cls, query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> Sizes:
        """Those of a call, by the shapes of q, k and v."""
        return cls(query[0], query[1], key[1], value[1], query[2], key[2], query[3], value[3])

    @property
    def all_heads(self) -> int:
        """Query heads of all requests."""
        return self.batch * self.heads


@dataclasses.dataclass(frozen=True)
class Rates:
    """Microseconds."""

    launch: float
    item: float
    tile: float


# ------------------------------------------------------------------ what a row tile reads


@functools.cache
def _ends(mask: Mask) -> tuple[Callable[..., int], Callable[..., int] | None] | None:
    """``lo_any`` and ``hi_any`` of a tile of queries as functions of ``q_first, q_last`` and the mask's ints.

    None where a tensor decides; no second one where every key may be seen.
    """
    names = ("q_first", "q_last", *(o.name for o in mask.int_operands))
    bounds = mask.tile_bounds()
    if any(symbol.name not in names for end in (bounds.lo_any, bounds.hi_any) for symbol in end.free_symbols):
        return None
    high = None if bounds.hi_any.is_infinite else python_function(bounds.hi_any, names)
    return python_function(bounds.lo_any, names), high


def key_tiles(
    mask: Mask, ints: Sequence[int], sizes: Sizes, rows: int, block_n: int, *, from_end: bool, skipped: int = 0
) -> list[int]:
    """How many key tiles each row tile of a head reads; all that there are where the mask reads tensors.

    ``from_end``: queries are at the end of the keys, not at their beginning. ``skipped``: rows of the first tile that
    are nobody's.
    """
    key_len, query_len = sizes.key_len, sizes.query_len
    ends = _ends(mask)
    count = -(-query_len // rows)
    if ends is None or (ends[1] is None and mask.tile_bounds().lo_any == 0):
        return [-(-key_len // block_n)] * count
    lo_any, hi_any = ends
    shift = max(key_len - query_len, 0) if from_end else 0
    found = []
    for first in range(-skipped, query_len, rows):
        begin, last = max(first, 0) + shift, max(min(first + rows, query_len) - 1, 0) + shift
        high = key_len if hi_any is None else min(max(hi_any(begin, last, *ints), 0), key_len)
        found.append(-(-max(high - min(max(lo_any(begin, last, *ints), 0), key_len), 0) // block_n))
    return found


def unused_rows(query_len: int, block_m: int) -> int:
    """By how many rows, whole consumers, the Hopper kernel's tiles are moved up."""
    return (-(-query_len // block_m) * block_m - query_len) // 64 * 64


# ------------------------------------------------------------------ the Hopper kernel's walk


class Walk(NamedTuple):
    """The order of items; ``dense_walk.Walk`` has the same."""

    group_heads: int
    """Query heads of a group, whose K and V share L2."""
    snake: int
    """1: every other turn hands items to programs in reverse."""


def items_of(costs: Sequence[float], all_heads: int, group_heads: int) -> list[float]:
    """The cost of every item in the order of the walk; ``costs`` are those of the row tiles of a head."""
    backwards = costs[::-1]
    groups = -(-all_heads // group_heads)
    found: list[float] = []
    for group in range(groups):
        heads = min(group_heads, all_heads - group * group_heads)
        for cost in backwards if (groups - group) & 1 else costs:
            found += [cost] * heads
    return found


def program_loads(items: Sequence[float], snake: int, programs: int) -> list[float]:
    """The sum of the items of each program."""
    loads = list(items[:programs])
    for turn, first in enumerate(range(programs, len(items), programs), 1):
        part = items[first : first + programs]
        if turn & snake:
            # A last turn that is short leaves out the first programs.
            part = [0.0] * (programs - len(part)) + list(part[::-1])
        loads[: len(part)] = map(operator.add, loads, part)
    return loads


def busiest(costs: Sequence[float], all_heads: int, walk: Walk, gpu: Gpu) -> float:
    """The load of the program that has most: exact up to ``EXACT_TURNS`` items a program, else near the mean."""
    count = len(costs) * all_heads
    programs = min(gpu.multiprocessors, count)
    least, most = min(costs), max(costs)
    if least == most:
        return most * -(-count // programs)
    if count > EXACT_TURNS * programs:
        return sum(costs) * all_heads / programs + most / 2
    return max(program_loads(items_of(costs, all_heads, walk.group_heads), walk.snake, programs))


def l2_loss(group_bytes: float, gpu: Gpu) -> float:
    """The share of time that a group of heads with so many bytes of K and V loses."""
    return min(max(group_bytes / gpu.l2_bytes - 1 / L2_SHARE, 0.0) * L2_LOSS, GREATEST_LOSS)


def best_walk(costs: Sequence[float], all_heads: int, group: int, bytes_a_head: int, gpu: Gpu) -> tuple[Walk, float]:
    """The walk with the lightest busiest program, and its load, what is lost to L2 counted.

    ``group``: query heads of a KV head, of which K and V have ``bytes_a_head``.
    """
    programs = min(gpu.multiprocessors, len(costs) * all_heads)
    fitting = min(max(1, gpu.l2_bytes // L2_SHARE // bytes_a_head) * group, all_heads)
    candidates = [fitting]
    if min(costs) != max(costs) and len(costs) * all_heads <= EXACT_TURNS * programs:
        # Fewer, larger groups of about the same size: programs of two groups meet at their ends.
        most = -(-all_heads // fitting)
        candidates += [-(-all_heads // (groups * group)) * group for groups in {1, 2, 3, most} if groups <= most]
    found: list[tuple[float, int, Walk]] = []
    for group_heads in dict.fromkeys(min(candidate, all_heads) for candidate in candidates):
        slower = 1 + l2_loss(group_heads / group * bytes_a_head, gpu)
        # Where a group is less than two rounds, turning every other group round may be turn enough.
        for snake in (0, 1) if group_heads * len(costs) < 2 * programs else (1,):
            walk = Walk(group_heads, snake)
            found.append((busiest(costs, all_heads, walk, gpu) * slower, group_heads, walk))
    load, _, walk = min(found)
    return walk, load


# ------------------------------------------------------------------ others


def listed(costs: Sequence[float], heads: int, gpu: Gpu) -> float:
    """The time of one program an item, head by head, each started where a multiprocessor is free first."""
    count = len(costs) * heads
    programs = min(gpu.multiprocessors, count)
    least, most = min(costs), max(costs)
    if least == most:
        return most * -(-count // programs)
    if count > LISTED_TURNS * programs:
        return sum(costs) * heads / programs + most / 2
    free = [0.0] * programs
    for cost in itertools.chain.from_iterable(itertools.repeat(costs, heads)):
        heapq.heapreplace(free, free[0] + cost)
    return max(free)
