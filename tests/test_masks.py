"""Masks against brute force: the dense mask, the Flex predicate, the printed Triton text; and what is no mask.

``mask_cases`` states every mask a second time, in numpy. Tile bounds are proved in ``test_mask_bounds.py``.
"""

from __future__ import annotations

import dataclasses
import doctest
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import sympy
import torch
from sympy import Eq, Max, Mod, floor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import create_mask

import custom_ops.masks
from custom_ops.forms import FORMS
from custom_ops.mask_printing import python_text, triton_source, triton_text
from custom_ops.masks import KEY_PADDING, Mask, Operand, int_operand, k, q
from tests.mask_cases import (
    AHEAD,
    BLOCK,
    BY_NAME,
    DOC,
    LOOKBACK,
    SINK,
    START,
    WINDOW,
    Case,
    on_cases,
    printed,
    random_calls,
    segments,
    slot_values,
    unpadded,
)

block, window, sink, lookback, ahead = (o.symbol for o in (BLOCK, WINDOW, SINK, LOOKBACK, AHEAD))
in_block = floor(q / block)


@on_cases
def test_dense_flex_and_triton_agree_with_brute_force(case: Case) -> None:
    text = printed(case.mask)
    for call in random_calls(case.mask, 40):
        expected = call.brute_force(case.seen)
        keys = torch.arange(call.key_len)
        dense = case.mask.dense(call.positions, keys, call.operands)
        assert dense.dtype == torch.bool
        np.testing.assert_array_equal(dense[0], expected)

        mask_mod = case.mask.flex_mask_mod(call.operands, torch.tensor([call.q_start]))
        rows, zero = torch.arange(call.query_len)[:, None], torch.tensor(0)
        np.testing.assert_array_equal(mask_mod(zero, zero, rows, keys[None]).expand(expected.shape), expected)

        ints, slots = slot_values(case.mask, call)
        i, j = call.positions.numpy()[:, None], keys.numpy()[None]
        both = text.visible(i, j, ints, *slots) & text.key_visible(i, j, ints, *slots)
        np.testing.assert_array_equal(np.broadcast_to(both, expected.shape), expected)


@on_cases
def test_flex_builds_the_same_mask(case: Case) -> None:
    """Flex maps the predicate over scalars, where shapes do not broadcast."""
    call = next(c for c in random_calls(case.mask, 100, seed=3) if c.key_len > 4)
    mask_mod = case.mask.flex_mask_mod(call.operands, torch.tensor([call.q_start]))
    flex = create_mask(mask_mod, 1, 1, call.query_len, call.key_len, device="cpu")
    np.testing.assert_array_equal(flex[0, 0], call.brute_force(case.seen))


def test_dense_takes_a_batch() -> None:
    mask = FORMS["segment_cross"].mask
    calls = list(random_calls(mask, 5, lengths=(11, 17)))
    lookback_of = {"lookback": 2}
    tensors = {n: torch.cat([c.operands[n] for c in calls]) for n in ("query_segments", "key_padding")}
    positions = torch.stack([c.positions for c in calls])
    dense = mask.dense(positions, torch.arange(17), {**tensors, **lookback_of})
    assert dense.shape == (5, 11, 17)
    for row, call in zip(dense, calls, strict=True):
        same = dataclasses.replace(call, operands={**call.operands, **lookback_of})
        np.testing.assert_array_equal(row, same.brute_force(unpadded(segments)))


def test_dense_of_no_request_is_empty() -> None:
    padding = torch.zeros(0, 5, dtype=torch.bool)
    dense = FORMS["full_self"].mask.dense(torch.arange(3), torch.arange(5), {"key_padding": padding})
    assert dense.shape == (0, 3, 5)


def test_dynamo_traces_dense_and_flex() -> None:
    """Without sympy in the trace, and without a mask that is made there."""
    mask = FORMS["sliding_self"].mask
    operands = {"window": 3, "key_padding": None}

    def both(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        zero = torch.zeros((), dtype=torch.int64)
        mask_mod = mask.flex_mask_mod(operands)
        return mask.dense(positions, positions, operands)[0], mask_mod(zero, zero, positions[:, None], positions)

    dense, flex = torch.compile(both, fullgraph=True, backend="eager")(torch.arange(9))
    assert torch.equal(dense, torch.ones(9, 9).tril().triu(-2).bool())
    assert torch.equal(flex, dense)


# ---------------------------------------------------------------------- specialise, width, visible pairs


def test_specialise_drops_absent_optional_operands() -> None:
    mask = FORMS["sliding_self"].mask
    assert mask.specialise(["window", "key_padding"]) is mask
    bare = mask.specialise(["window"])
    assert bare.visible == (k <= q) & (q - k < window)
    assert [o.name for o in bare.operands] == ["window"]
    assert bare.per_key == sympy.true
    assert bare is mask.specialise([])  # window is not optional: whoever evaluates asks for it
    assert bare.specialise([]) is bare


def test_a_negated_disjunction_is_two_conjuncts() -> None:
    """Or a mask without padding would lose its other half."""
    mask = Mask("negated", ~(KEY_PADDING.symbol | (k > q)), (KEY_PADDING,))
    assert mask.specialise([]).visible == (k <= q)
    assert mask.interval() == (0, q + 1)


def test_masks_compare_by_value_and_pickle() -> None:
    mask = FORMS["sliding_self"].mask
    again = pickle.loads(pickle.dumps(mask))
    assert again == mask
    assert hash(again) == hash(mask)
    assert again.specialise([]) == mask.specialise([])


WIDTHS = {
    "full_self": sympy.oo,
    "sliding_self": window,
    "segment_cross": lookback + 1,
    "nothing": sympy.S.Zero,
    "diagonal": sympy.S.One,
    "blocks_back": block * lookback + block,
    "around": lookback + ahead + 1,
    "mirror": sympy.oo,
    "sink_and_window": sympy.oo,
}


@pytest.mark.parametrize("name", WIDTHS)
def test_width(name: str) -> None:
    assert sympy.expand(BY_NAME[name].width()) == WIDTHS[name]


def test_width_of_a_constant_prefix() -> None:
    assert Mask("prefix", k < sink, (SINK,)).width() == sink
    assert FORMS["sliding_self"].mask.width_for((7,)) == 7
    assert FORMS["full_self"].mask.width_for(()) is None


@on_cases
def test_width_bounds_what_a_query_sees(case: Case) -> None:
    for call in random_calls(case.mask, 30, seed=4):
        width = case.mask.width_for(tuple(call.ints.values()))
        if width is not None:
            assert call.brute_force(case.banded or case.seen).sum(1).max(initial=0) <= width


@on_cases
def test_visible_pairs(case: Case) -> None:
    """Exact for one interval of positions; never too few otherwise."""
    exact = all(o.kind == "int" for o in case.mask.operands) and case.mask.interval() is not None
    for call in random_calls(case.mask, 40, seed=5):
        call = dataclasses.replace(call, q_start=max(call.key_len - call.query_len, 0))
        pairs = case.mask.visible_pairs(call.query_len, call.key_len, call.ints)
        seen = int(call.brute_force(case.seen).sum())
        assert pairs == seen if exact else seen <= pairs <= call.query_len * call.key_len


def test_pairs_are_counted_under_fake_tensors_too() -> None:
    """Inductor counts FLOPs there when it times choices."""
    with FakeTensorMode():
        assert FORMS["sliding_self"].mask.visible_pairs(4, 9, {"window": 2}) == 8


def test_visible_pairs_of_long_sequences() -> None:
    long = 131072
    assert FORMS["full_self"].mask.visible_pairs(long, long, {}) == long * (long + 1) // 2
    assert FORMS["sliding_self"].mask.visible_pairs(1, long, {"window": 512}) == 512


# ---------------------------------------------------------------------- what is no mask


BOOLEAN_QUERY = "operand 'flag': expected kind 'key' for a boolean, got 'query'; use integers"
REFUSED: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: Mask("m", k <= q + window),
        "mask 'm': expected an expression over q, k and [], got also ['window']; declare operands, use their .symbol",
    ),
    (
        lambda: Mask("m", k <= sympy.Symbol("window"), (WINDOW,)),  # without the operand's assumptions
        "expected an expression over q, k and ['window'], got also ['window']; declare operands, use their .symbol",
    ),
    (
        lambda: Mask("m", (k >= START.symbol) & (k <= DOC.symbol), (START, DOC)),
        "expected one tensor operand of a kind, got ['start', 'doc'] of kinds ['query', 'query']; make them one",
    ),
    (lambda: Mask("m", k - q), "expected a boolean expression, got k - q; compare with <, <=, sympy.Eq"),
    (
        lambda: Mask("m", (k <= q) & sink, (SINK,)),
        "expected comparisons, got ['sink'] as conditions; compare them with a number",
    ),
    (lambda: Mask("my mask", k <= q), "expected an identifier as its name, got 'my mask'; rename it"),
    (
        lambda: Mask("m", (k <= q) & (k >= START.symbol), (START, int_operand("start_min"))),
        "expected distinct operand names, got ['start', 'start_min', 'start_max', 'start_min']; rename one",
    ),
    (
        lambda: Mask("m", (k <= q) | ~KEY_PADDING.symbol, (KEY_PADDING,)),
        "expected the boolean operand only as a conjunct ~key_padding, got [~key_padding | (k <= q)]; "
        "use an integer operand",
    ),
    (
        lambda: Mask("m", 2 * floor((q - k) / block) <= sink, (BLOCK, SINK)),
        "mask 'm': floor((-k + q)/block): expected a dividend that is never negative and a divisor that is always "
        "positive, got -k + q and block; give their operands a minimum, or divide something else",
    ),
    (lambda: Mask("m", k <= floor(START.symbol / 4), (START,)), "got start and 4; give their operands a minimum"),
    (lambda: Mask("m", k <= floor(q / sink), (SINK,)), "got q and sink; give their operands a minimum"),
    (lambda: Mask("m", Eq(Mod(q - k, block), 0), (BLOCK,)), "got -k + q and block; give their operands a minimum"),
    (
        lambda: Mask("m", k < q / sink, (SINK,)),
        "k < q/sink: expected integers on both sides, got q/sink, which may be a fraction; write floor(a / b)",
    ),
    (
        lambda: Mask("m", sympy.Abs(q - k) < window, (WINDOW,)),
        "expected +, -, *, floor, Mod, Max and Min of integers, got Abs; write it with those (Abs(x) is Max(x, -x))",
    ),
    (lambda: Mask("m", 2 * sympy.ceiling(q / block) >= k, (BLOCK,)), "of integers, got ceiling; write it with those"),
    (lambda: int_operand("q"), "operand 'q': expected an identifier, no keyword and none of q, k, q_first"),
    (lambda: int_operand("lambda"), "operand 'lambda': expected an identifier, no keyword and none of q, k"),
    (lambda: Operand("flag", "query", boolean=True), BOOLEAN_QUERY),
    (
        lambda: Operand("window", "int", 1, optional=True),
        "operand 'window': expected a tensor where optional, got an int; give it a value",
    ),
    (
        lambda: FORMS["sliding_self"].mask.dense(torch.arange(3), torch.arange(3), {"window": None}),
        "mask 'sliding_self': window: expected a value, got None; pass window",
    ),
    (
        lambda: FORMS["segment_cross"].mask.flex_mask_mod({"lookback": 1}),
        "mask 'segment_cross': query_segments: expected a value, got None; pass query_segments",
    ),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=range(len(REFUSED)))
def test_refusals_say_what_to_do(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


# ---------------------------------------------------------------------- text


def test_printed_operators_are_in_parentheses() -> None:
    condition = (k <= q) & ((k < sink) | (q - k < window))
    assert python_text(condition) == "(k <= q) & ((k < sink) | (-k + q < window))"
    assert triton_text(Max(q - window, 0), {"window": "ints[0]"}) == "tl.maximum(0, q - ints[0])"
    assert python_text((in_block + 1) * block) == "block*(((q) // (block)) + 1)"
    assert python_text(Mod(q, block) * block**2) == "((block) * (block))*(((q) % (block)))"


def test_triton_functions_of_a_form() -> None:
    assert (
        triton_source(FORMS["sliding_self"].mask)
        == """\
def sliding_self_visible(q, k, ints, request_value, query_value, key_value, key_padding):
    return (k <= q) & (-k + q < ints[0])


def sliding_self_key_visible(q, k, ints, request_value, query_value, key_value, key_padding):
    return (key_padding) == 0


def sliding_self_bounds(q_first, q_last, key_len, ints, request_value, query_min, query_max):
    lo_any = tl.minimum(tl.maximum(q_first - ints[0] + 1, 0), key_len)
    lo_all = tl.minimum(tl.maximum(q_last - ints[0] + 1, 0), key_len)
    hi_all = tl.minimum(tl.maximum(q_first + 1, 0), key_len)
    hi_any = tl.minimum(tl.maximum(q_last + 1, 0), key_len)
    return lo_any, lo_all, hi_all, hi_any
"""
    )


def test_bounds_of_a_query_operand_are_computed_in_64_bits() -> None:
    """The greatest int32 plus one would be the least, and the tile would lose the keys of its other rows."""
    *_, hi_any, _ = triton_source(FORMS["segment_cross"].mask).splitlines()
    assert hi_any == (
        "    hi_any = tl.cast(tl.minimum(tl.maximum(tl.cast(query_max, tl.int64) + 1, 0), key_len), tl.int32)"
    )


def test_the_example_in_the_docstring_is_true() -> None:
    outcome = doctest.testmod(custom_ops.masks)
    assert outcome.attempted >= 5
    assert outcome.failed == 0
