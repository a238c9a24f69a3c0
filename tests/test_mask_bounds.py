"""Tile bounds against brute force, on thousands of random tiles.

What they call hidden is hidden from every query, what they call visible is visible to every query, as evaluated on the
host and as printed for Triton; and neither is an empty promise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import sympy
import torch
from sympy import Eq, Max, Min, Mod, floor

from custom_ops.masks import CONSERVATIVE, Mask, k, q
from tests.mask_cases import (
    BLOCK,
    BY_NAME,
    CASES,
    SINK,
    START,
    WINDOW,
    Call,
    Case,
    on_cases,
    printed,
    random_calls,
    slot_values,
)

block, window, sink = BLOCK.symbol, WINDOW.symbol, SINK.symbol
in_block = floor(q / block)


def tiles(call: Call, rng: np.random.Generator) -> Iterator[tuple[int, int]]:
    """The first and the last query of each tile, counted from the call's first query."""
    size = int(rng.choice([1, 2, 3, 5, 8, 16]))
    for first in range(0, call.query_len, size):
        yield first, min(first + size, call.query_len) - 1


@on_cases
def test_bounds_never_lie_and_find_most(case: Case) -> None:
    """Empty is really empty and full really full, as evaluated and as printed; and bounds are no empty promise."""
    rng = np.random.default_rng(1)
    text = printed(case.mask)
    per_query, per_request = case.mask.operand("query"), case.mask.operand("request")
    full = full_found = empty = empty_found = count = 0
    for call in random_calls(case.mask, 120, seed=2):
        banded = call.brute_force(case.banded or case.seen)
        assert not (call.brute_force(case.seen) & ~banded).any()
        ints, _ = slot_values(case.mask, call)
        for first, last in tiles(call, rng):
            low, high = 0, 0
            if per_query is not None:
                values = call.operands[per_query.name][0, first : last + 1]
                low, high = int(values.min()), int(values.max())
            request = 0 if per_request is None else int(call.operands[per_request.name])
            at = (call.q_start + first, call.q_start + last, call.key_len)
            found = case.mask.evaluate_bounds(*at, call.ints, (low, high), request)
            assert tuple(map(int, text.bounds(*at, ints, request, low, high))) == found
            lo_any, lo_all, hi_all, hi_any = found
            assert all(0 <= end <= call.key_len for end in found)

            tile, keys = banded[first : last + 1], np.arange(call.key_len)
            called_empty, called_full = (keys < lo_any) | (keys >= hi_any), (keys >= lo_all) & (keys < hi_all)
            really_empty, really_full = ~tile.any(0), tile.all(0)
            assert not (called_empty & ~really_empty).any()
            assert not (called_full & ~really_full).any()
            count += 1
            empty, empty_found = empty + really_empty.sum(), empty_found + called_empty.sum()
            full, full_found = full + really_full.sum(), full_found + called_full.sum()
    assert count > 400
    assert full_found >= case.full_found * full
    assert empty_found >= case.empty_found * empty


def random_condition(rng: np.random.Generator, depth: int) -> sympy.Basic:
    """Relations of all shapes, joined at random."""
    if depth == 0:
        c, b = int(rng.integers(-6, 20)), int(rng.integers(1, 9))
        relations: list[Callable[[], sympy.Basic]] = [
            lambda: k <= q + c, lambda: q - k < c, lambda: k < c, lambda: k >= c, lambda: k + q < c,
            lambda: k >= b * floor(q / b), lambda: floor(k / b) <= floor(q / b) + c, lambda: Eq(k, q - c),
            lambda: k < Max(q - b, Min(c, 2 * q)), lambda: sympy.Ne(k, q), lambda: Eq(Mod(k, b), Mod(q, b)),
            lambda: k > q - Mod(q, b), lambda: k >= START.symbol, lambda: k - START.symbol <= floor(q / b),
            lambda: b * k <= q, lambda: q > c,
        ]  # fmt: skip
        return relations[rng.integers(len(relations))]()
    parts = [random_condition(rng, depth - 1) for _ in range(rng.integers(1, 4))]
    joined = sympy.And(*parts) if rng.random() < 0.6 else sympy.Or(*parts)
    return ~joined if rng.random() < 0.2 else joined


def test_bounds_of_random_conditions_never_lie() -> None:
    rng = np.random.default_rng(7)
    bounded = 0
    for _ in range(100):
        mask = Mask("random", random_condition(rng, 2), (START,))
        bounded += mask.is_bounded
        text = printed(mask)
        for call in random_calls(mask, 4, seed=int(rng.integers(1 << 30))):
            visible = mask.dense(call.positions, torch.arange(call.key_len), call.operands)[0].numpy()
            keys, start = np.arange(call.key_len), call.operands["start"][0]
            for first, last in tiles(call, rng):
                low, high = int(start[first : last + 1].min()), int(start[first : last + 1].max())
                at = (call.q_start + first, call.q_start + last, call.key_len)
                found = lo_any, lo_all, hi_all, hi_any = mask.evaluate_bounds(*at, {}, (low, high))
                assert tuple(map(int, text.bounds(*at, (), 0, low, high))) == found
                assert not visible[first : last + 1, (keys < lo_any) | (keys >= hi_any)].any()
                assert visible[first : last + 1, (keys >= lo_all) & (keys < hi_all)].all()
    assert bounded > 50


def test_bounds_without_the_operands_values_are_conservative() -> None:
    """The host does not know a request's operand, and may not know the range of a query's."""
    prefix_lm = BY_NAME["prefix_lm"]
    assert prefix_lm.evaluate_bounds(4, 7, 20, {}) == (0, 0, 0, 20)
    assert prefix_lm.evaluate_bounds(4, 7, 20, {}, request_value=6) == (0, 0, 6, 8)
    not_before = BY_NAME["not_before"]
    assert not_before.evaluate_bounds(4, 7, 20, {}) == (0, 20, 5, 8)
    assert not_before.evaluate_bounds(4, 7, 20, {}, query_range=(1, 3)) == (1, 3, 5, 8)


def test_which_masks_say_that_they_are_bounded() -> None:
    assert [c.id for c in CASES if not c.mask.is_bounded] == ["every_nth"]
    assert [c.id for c in CASES if c.mask.interval() is None] == ["sink_and_window", "dilated", "every_nth"]
    never_full = [c.id for c in CASES if c.mask.tile_bounds().lo_all == sympy.oo]
    assert never_full == ["sink_and_window", "dilated", "every_nth"]
    assert BY_NAME["every_nth"].tile_bounds() == CONSERVATIVE


def test_a_union_is_one_interval_only_without_a_hole() -> None:
    prefixes = Mask("prefixes", (k < sink) | (k <= q), (SINK,))
    assert prefixes.interval() == (0, Max(sink, q + 1))
    suffixes = Mask("suffixes", (k >= sink) | (k > q), (SINK,))
    assert suffixes.interval() == (Min(sink, q + 1), sympy.oo)
    assert Mask("hole", (k < sink) | (k > q), (SINK,)).interval() is None


def test_what_cannot_be_solved_bounds_nothing() -> None:
    for condition in (2 * k <= q, k * window <= q, k * k <= q, sympy.Ne(k, q), window <= q):
        assert not Mask("unsolved", condition, (WINDOW,)).is_bounded


def test_fractions_are_cleared() -> None:
    """Sympy makes k/block < q/block + 1 of floor(k/block) <= q/block, and a GPU would round the quotient."""
    by_blocks = Mask("by_blocks", floor(k / block) <= in_block, (BLOCK,))
    assert by_blocks.visible == (k < block * in_block + block)
    assert by_blocks.interval() == (0, block * in_block + block)
    assert Mask("half", k < q / 2).visible == (2 * k < q)
    assert Mask("backwards", floor((q - k) / block) <= 2, (BLOCK,)).visible == (q - k < 3 * block)


def test_contradictions_see_nothing() -> None:
    """Sympy turns them into false by itself."""
    mask = Mask("contradiction", (k < q) & (k >= q))
    assert mask.visible == sympy.false
    assert mask.evaluate_bounds(3, 5, 9, {}) == (0, 0, 0, 0)
    assert (mask.width(), mask.width_for(()), mask.visible_pairs(4, 9, {})) == (0, 0, 0)
    flex = mask.flex_mask_mod({})(*map(torch.tensor, (0, 0, 2, 1)))
    assert not flex
    assert not mask.dense(torch.arange(3), torch.arange(3), {}).any()
    # One that sympy does not see is still right.
    late = Mask("late", (k <= q - 5) & (k >= q))
    assert late.width() == 0
    assert late.visible_pairs(20, 20, {}) == 0
