"""Masks read back from the graph: what the recognised form sees is, bit for bit, what the user's mask tensor says.

Every mask here is also computed, by torch. Spellings are composed at random: of a triangle, a window, a padding, a way
to write them as one tensor, and lengths.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor

from custom_ops.form import Form
from custom_ops.forms import FORMS
from custom_ops.masks import Mask, int_operand, k, key_operand, q, query_operand, request_operand
from inductor_passes.recognise.match import Matched, Refusal, match_form
from tests.recognising import recognised

INF, LEAST = float("-inf"), torch.finfo(torch.float32).min
Lengths = tuple[int, int]


def positions(n: int) -> Tensor:
    return torch.arange(n)


def _transposed(lq: int, lk: int) -> Tensor:
    keys, queries = positions(lk)[:, None], positions(lq)[None]
    return (keys <= queries).T


TRIANGLES: dict[str, Callable[[int, int], Tensor]] = {
    "compared": lambda lq, lk: positions(lq)[:, None] >= positions(lk)[None, :],
    "mirrored": lambda lq, lk: positions(lk) <= positions(lq).unsqueeze(-1),
    "not greater": lambda lq, lk: ~(positions(lk)[None] > positions(lq)[:, None]),
    "not less": lambda lq, lk: torch.logical_not(torch.lt(positions(lq).view(lq, 1), positions(lk).view(1, lk))),
    "difference": lambda lq, lk: (positions(lq)[:, None] - positions(lk)) >= 0,
    "difference above -1": lambda lq, lk: torch.sub(positions(lk), positions(lq)[:, None]) < 1,
    "shifted": lambda lq, lk: (positions(lq) + 1)[:, None] > positions(lk)[None],
    "later start": lambda lq, lk: torch.arange(3, lq + 3)[:, None] >= torch.arange(3, lk + 3),
    "in steps": lambda lq, lk: torch.arange(0, 2 * lq, 2)[:, None] >= 2 * positions(lk),
    "tril": lambda lq, lk: torch.ones(lq, lk, dtype=torch.bool).tril(),
    "tril of floats": lambda lq, lk: torch.tril(torch.ones(lq, lk)) == 1,
    "tril in place": lambda lq, lk: torch.ones(lq, lk, dtype=torch.bool).tril_(),
    "not triu": lambda lq, lk: ~torch.triu(torch.ones(lq, lk, dtype=torch.bool), diagonal=1),
    "triu of ones": lambda lq, lk: torch.ones(lq, lk).triu(1) == 0,
    "transposed triu": lambda lq, lk: (torch.triu(torch.ones(lk, lq)) == 1).transpose(0, 1),
    "transposed": _transposed,
    "double negation": lambda lq, lk: ~~torch.tril(torch.full((lq, lk), True)),
    "of integers": lambda lq, lk: torch.tril(torch.ones(lq, lk, dtype=torch.long)).bool(),
    "expanded": lambda lq, lk: positions(lq)[:, None].expand(lq, lk) >= positions(lk).expand(lq, lk),
    "masked": lambda lq, lk: torch.zeros(lq, lk).masked_fill(torch.ones(lq, lk).tril().bool(), 1.0) > 0.5,
    "where": lambda lq, lk: torch.where(positions(lq)[:, None] < positions(lk), False, True),
}  # fmt: skip

WINDOWS: dict[str, Callable[[int, int, int], Tensor]] = {
    "difference": lambda lq, lk, w: positions(lq)[:, None] - positions(lk) < w,
    "greater": lambda lq, lk, w: positions(lk)[None] > positions(lq)[:, None] - w,
    "at most": lambda lq, lk, w: positions(lq).unsqueeze(1) - positions(lk).unsqueeze(0) <= w - 1,
    "triu": lambda lq, lk, w: torch.triu(torch.ones(lq, lk, dtype=torch.bool), diagonal=1 - w),
    "not tril": lambda lq, lk, w: ~torch.ones(lq, lk, dtype=torch.bool).tril(-w),
    "absolute": lambda lq, lk, w: torch.logical_or(positions(lk) >= positions(lq)[:, None],
                                                   positions(lq)[:, None] - positions(lk) < w),
}  # fmt: skip

PADDINGS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "bool": lambda keep, lengths, lk: keep[:, None, None, :],
    "hidden": lambda keep, lengths, lk: ~(~keep)[:, None, None, :],
    "integers": lambda keep, lengths, lk: keep.long()[:, None, None, :] != 0,
    "equal to one": lambda keep, lengths, lk: (keep.to(torch.int32) == 1).unsqueeze(1).unsqueeze(2),
    "lengths": lambda keep, lengths, lk: (torch.arange(lk)[None] < lengths[:, None])[:, None, None],
    "lengths reshaped": lambda keep, lengths, lk: positions(lk) < lengths.view(-1, 1, 1, 1),
    "for all": lambda keep, lengths, lk: keep[:1].view(1, 1, 1, lk),
    "expanded": lambda keep, lengths, lk: keep[:, None, None].expand(keep.shape[0], 1, 1, lk),
}  # fmt: skip


def _added(m: Tensor) -> Tensor:
    bias = torch.zeros(m.shape)
    return bias.masked_fill_(m.logical_not(), INF)


WRITTEN: dict[str, Callable[[Tensor], Tensor]] = {
    "bool": lambda m: m,
    "and itself": lambda m: m & m,
    "masked_fill": _added,
    "where": lambda m: torch.where(m, 0.0, INF),
    "where tensors": lambda m: torch.where(~m, torch.full((), INF), torch.zeros(())),
    "method": lambda m: torch.zeros_like(m, dtype=torch.float32).where(m, torch.tensor(INF)),
    "classic": lambda m: m.float().masked_fill(m == 0, INF).masked_fill(m == 1, 0.0),
    "twice": lambda m: torch.where(m, 0.0, INF) + torch.where(m, 0.0, INF),
    "with clone": lambda m: torch.where(m, 0.0, INF).clone().contiguous().to(torch.float32),
}  # fmt: skip
LEAST_NUMBER: dict[str, Callable[[Tensor], Tensor]] = {
    "masked_fill": lambda m: torch.zeros(m.shape).masked_fill(~m, LEAST),
    "times": lambda m: (1.0 - m.float()) * LEAST,
    "where": lambda m: torch.where(m, 0, torch.finfo(torch.float32).min),
    "twice": lambda m: torch.where(m, 0.0, LEAST) + torch.where(m, 0.0, LEAST),
}


def tensors_for(lq: int, lk: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 4, lq, 8), torch.randn(2, 4, lk, 8), torch.randn(2, 4, lk, 8)


def check(spelling: Callable[..., Tensor], lengths: Lengths, *inputs: Tensor, dynamic: bool = False) -> str:
    """The form of attention under a mask; its mask must be the tensor, and its output the user's."""

    def attention(q: Tensor, k: Tensor, v: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        mask = spelling(*given)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask), mask

    qkv = tensors_for(*lengths)
    expected, mask = attention(*qkv, *inputs)
    outcome = recognised(attention, *qkv, *inputs, dynamic=dynamic)
    assert not outcome.of_stage("refused"), outcome.decisions
    (call,) = outcome.calls
    visible = mask if mask.dtype == torch.bool else mask == 0
    dense = call.dense()[:, None]
    assert torch.equal(*torch.broadcast_tensors(dense, visible)), (call.form.name, call.keywords)
    torch.testing.assert_close(outcome.result[0], expected, rtol=1e-5, atol=1e-5)
    assert outcome.count("scaled_dot_product_attention") == 0
    return call.form.name


def random_spellings(count: int) -> list[Any]:
    """Combinations drawn with a fixed seed, such that every part is in several of them."""
    rng = random.Random(0)
    found = []
    bags = [itertools.cycle(rng.sample(sorted(parts), len(parts))) for parts in (TRIANGLES, WINDOWS, PADDINGS, WRITTEN)]
    for number in range(count):
        triangle, window, padding, written = (next(bag) for bag in bags)
        length = rng.randint(2, 9)
        width = rng.randint(1, length + 1) if rng.random() < 0.6 else None
        padded = rng.random() < 0.5
        name = f"{number}: {triangle}, {window if width else 'full'}, {padding if padded else 'whole'}, {written}"
        found.append(pytest.param(triangle, (window, width), padding if padded else None, written, length, id=name))
    return found


@pytest.mark.parametrize(("triangle", "window", "padding", "written", "length"), random_spellings(96))
def test_a_composed_mask_is_its_form(
    triangle: str, window: tuple[str, int | None], padding: str | None, written: str, length: int
) -> None:
    def spelling(keep: Tensor, lengths: Tensor) -> Tensor:
        mask = TRIANGLES[triangle](length, length)
        if window[1] is not None:
            mask = mask & WINDOWS[window[0]](length, length, window[1])
        if padding is not None:
            mask = torch.logical_and(mask, PADDINGS[padding](keep, lengths, length))
        return WRITTEN[written](mask)

    keep = torch.rand(2, length) < 0.7
    keep[0, 0] = keep[1, 0] = True  # torch's kernels differ where a query sees nothing
    if window[1] is not None and padding is not None:
        keep[:] = True
        keep[:, length - 1] = length == 1 or window[1] == 1  # each query still sees a key of its window
    lengths = torch.tensor([length, length if window[1] is not None else max(1, length - 2)])
    form = check(spelling, (length, length), keep, lengths)
    narrow = window[1] is not None and window[1] < length
    assert form == ("sliding_self" if narrow else "full_self")


@pytest.mark.parametrize("triangle", TRIANGLES)
@pytest.mark.parametrize("lengths", [(3, 7), (7, 3), (1, 5), (5, 1), (1, 1)])
def test_triangles_start_at_the_top_left(triangle: str, lengths: Lengths) -> None:
    """As ``tril`` has it: query 0 sees key 0 alone, whatever the lengths."""
    check(lambda: TRIANGLES[triangle](*lengths), lengths)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("width", [1, 2, 4, 6, 7, 99])
def test_windows_count_keys(window: str, width: int) -> None:
    form = check(lambda: WINDOWS[window](6, 6, width) & (positions(6)[:, None] >= positions(6)), (6, 6))
    assert form == ("sliding_self" if width < 6 else "full_self")


@pytest.mark.parametrize("written", LEAST_NUMBER)
def test_the_least_number_hides_where_every_query_sees_a_key(written: str) -> None:
    assert check(lambda: LEAST_NUMBER[written](positions(6)[:, None] >= positions(6)), (6, 6)) == "full_self"


@pytest.mark.parametrize("start", ["bottom right", "tensor [B]", "tensor []", "tensor [1]"])
@pytest.mark.parametrize("width", [None, 3])
@pytest.mark.parametrize("query_len", [1, 2, 3])
def test_queries_that_start_later(start: str, width: int | None, query_len: int) -> None:
    """Decoding: ``position = start + arange`` over queries, against all keys of a static cache."""
    shapes: dict[str, Any] = {"tensor [B]": [2, 5], "tensor []": 4, "tensor [1]": [4]}

    def spelling(at: Tensor) -> Tensor:
        if start == "bottom right":
            rows = (positions(query_len) + (8 - query_len))[:, None]
        elif start == "tensor [B]":
            rows = (at[:, None] + positions(query_len))[:, None, :, None]
        else:
            rows = (positions(query_len) + at).unsqueeze(-1)
        seen = rows >= positions(8)
        return seen if width is None else seen & (rows - positions(8) < width)

    check(spelling, (query_len, 8), torch.tensor(shapes.get(start, 0)))


def test_dynamic_lengths() -> None:
    """Lengths as symbols: one graph for all of them."""

    def spelling(like: Tensor) -> Tensor:
        n = like.shape[1]
        at = torch.arange(n)
        return (at[:, None] >= at) & (at[:, None] - at < 4) & like[:, None, None, :]

    keep = torch.ones(2, 9, dtype=torch.bool)
    assert check(spelling, (9, 9), keep, dynamic=True) == "sliding_self"


# ------------------------------------------------------------------ match_form by itself

T, T2 = request_operand("t", None), request_operand("t2", None)
HIDE, IDS, OWN = key_operand("hide", boolean=True), key_operand("ids"), query_operand("own")
S0, S1 = (sympy.Symbol(name, integer=True, positive=True) for name in ("s0", "s1"))


def _dense(visible: Any, lq: int, lk: int) -> list[list[bool]]:
    return [[bool(sympy.sympify(visible).subs({q: i, k: j})) for j in range(lk)] for i in range(lq)]


def _random_condition(rng: random.Random) -> sympy.Basic:
    """A conjunction of relations linear in q and k, some of them forms', most of them not."""
    relations = []
    for _ in range(rng.randint(1, 3)):
        a, b, c = rng.choice([0, 1, 1, 1, -1, 2]), rng.choice([0, -1, -1, -1, 1]), rng.randint(-3, 4)
        left = a * q + b * k + c
        relations.append(rng.choice([left >= 0, left > 0, left <= 0, left < 0]))
    return sympy.And(*relations)


@pytest.mark.parametrize("seed", range(40))
def test_whatever_matches_sees_the_same(seed: int) -> None:
    """Random conditions against all pairs of positions: what is matched is right, by the form's own ``dense``."""
    rng = random.Random(seed)
    for _ in range(8):
        visible, lq, lk = _random_condition(rng), rng.randint(1, 5), rng.randint(1, 5)
        matched = match_form(visible, query_len=lq, key_len=lk, tensors={})
        if isinstance(matched, Refusal):
            continue
        assert _form_dense(matched, lq, lk) == _dense(visible, lq, lk), (visible, lq, lk, matched)
        if matched.every_query_sees:
            assert all(any(row) for row in _dense(visible, lq, lk))


def _form_dense(matched: Matched, lq: int, lk: int) -> list[list[bool]]:
    mask: Mask = matched.form.mask
    start = int(matched.operands.get("q_start", 0))  # type: ignore[arg-type]
    hidden: Any = matched.operands.get("key_padding", sympy.false)
    ints = {o.name: matched.operands[o.name] for o in mask.int_operands}
    padding = torch.tensor([[bool(sympy.sympify(hidden).subs({k: j})) for j in range(lk)]])
    return mask.dense(torch.arange(lq) + start, torch.arange(lk), {**ints, "key_padding": padding})[0].tolist()


@pytest.mark.parametrize(
    ("visible", "lengths", "form", "operands"),
    [
        (k <= q, (8, 8), "full_self", {}),
        (k <= q, (S0, S0), "full_self", {}),
        (k <= q, (S0, S1), "full_self", {"q_start": 0}),
        (k <= q, (4, 8), "full_self", {"q_start": 0}),
        (k <= q + 4, (4, 8), "full_self", {"q_start": 4}),
        ((k <= q) & (q - k < 5), (S0, S0), "sliding_self", {"window": 5}),
        ((k <= q) & (q - k < 8), (8, 8), "full_self", {}),
        ((k <= q) & (q - k < S0), (S0, S0), "full_self", {}),
        ((k <= q) & (k < S0), (S0, S0), "full_self", {}),
        (k <= q + T.symbol, (3, 9), "full_self", {"q_start": T.symbol}),
        (k <= T.symbol, (1, 9), "full_self", {"q_start": T.symbol}),
        (k < T.symbol, (1, 9), "full_self", {"q_start": T.symbol - 1}),
        ((k <= q) & (k < T.symbol), (8, 8), "full_self", {"key_padding": k >= T.symbol}),
        ((k <= q) & HIDE.symbol, (8, 8), "full_self", {"key_padding": ~HIDE.symbol}),
        ((k <= q) & ~HIDE.symbol & (k >= 2), (8, 8), "full_self", {"key_padding": HIDE.symbol | (k < 2)}),
        ((k <= q) & sympy.Ne(IDS.symbol, 0), (8, 8), "full_self", {"key_padding": sympy.Eq(IDS.symbol, 0)}),
        (
            (k <= OWN.symbol) & (OWN.symbol - k <= 3), (8, 4), "segment_cross",
            {"query_segments": OWN.symbol, "lookback": 3},
        ),
    ],
)  # fmt: skip
def test_conditions_and_their_forms(visible: Any, lengths: Any, form: str, operands: dict[str, Any]) -> None:
    given = dict.fromkeys((T, T2, HIDE, IDS, OWN))
    matched = match_form(visible, query_len=lengths[0], key_len=lengths[1], tensors=given)
    assert isinstance(matched, Matched), matched
    assert (matched.form.name, matched.operands) == (form, operands)


@pytest.mark.parametrize(
    ("visible", "lengths"),
    [
        (k < q, (8, 8)),
        (k <= q + 1, (8, 8)),
        (k <= q - 1, (8, 8)),
        (q <= k, (8, 8)),
        (k <= 2 * q, (8, 8)),
        (sympy.Abs(q - k) < 3, (8, 8)),
        ((k <= q) & (q - k > 2), (8, 8)),
        ((k <= q) & (q - k < T.symbol), (8, 8)),
        ((k <= q) | HIDE.symbol, (8, 8)),
        (sympy.Ne(q, k), (8, 8)),
        ((k <= q) & sympy.Ne(k, q - 1), (8, 8)),
        (sympy.false, (8, 8)),
        (k <= q + S1 - S0, (S0, S1)),
        ((k <= q + T.symbol) & (q + T2.symbol - k < 4), (8, 8)),
        (sympy.floor(k / 4) <= sympy.floor(q / 4), (8, 8)),
    ],
)
def test_conditions_that_are_no_form(visible: Any, lengths: Any) -> None:
    matched = match_form(visible, query_len=lengths[0], key_len=lengths[1], tensors=dict.fromkeys((T, T2, HIDE)))
    assert isinstance(matched, Refusal), matched
    assert matched.reason


def test_a_form_of_your_own_is_compared_too() -> None:
    """Forms are told by their masks, not by their names."""
    block = int_operand("block", minimum=1)
    own = Form(Mask("ahead", k <= q + block.symbol, (block,)), self_attention=False)
    matched = match_form(k <= q + 2, query_len=8, key_len=8, tensors={}, forms={**FORMS, "ahead": own})
    assert isinstance(matched, Matched)
    assert (matched.form, matched.operands) == (own, {"block": 2})
    assert matched.every_query_sees
