"""Masks with a second, independent statement in numpy, and random calls of them, for the tests of the mask language."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import sympy
import torch
from sympy import Eq, Max, Min, Mod, floor

from custom_ops.forms import FORMS
from custom_ops.mask_printing import triton_source
from custom_ops.masks import Mask, int_operand, k, q, query_operand

Array = np.ndarray
BLOCK, WINDOW = int_operand("block", minimum=1), int_operand("window", minimum=1)
SINK, LOOKBACK, AHEAD = int_operand("sink"), int_operand("lookback"), int_operand("ahead")
START, DOC = query_operand("start"), query_operand("doc")
block, window, sink, lookback, ahead = (o.symbol for o in (BLOCK, WINDOW, SINK, LOOKBACK, AHEAD))
in_block = floor(q / block)


@dataclasses.dataclass(frozen=True)
class Case:
    """A mask, and the same in numpy: ``seen(q, k, o)`` broadcasts over ``q [Lq, 1]``, ``k [1, Lk]`` and operands ``o``.

    ``banded`` is the part that tile bounds speak about. Of the keys that a whole tile sees, and of those that none of
    it sees, at least these shares must be found.
    """

    mask: Mask
    seen: Callable[[Array, Array, Any], Array]
    banded: Callable[[Array, Array, Any], Array] | None = None
    full_found: float = 1.0
    empty_found: float = 1.0

    @property
    def id(self) -> str:
        return self.mask.name


def causal(i: Array, j: Array, o: Any) -> Array:
    return j <= i


def sliding(i: Array, j: Array, o: Any) -> Array:
    return (j <= i) & (j > i - o.window)


def segments(i: Array, j: Array, o: Any) -> Array:
    return (o.query_segments - o.lookback <= j) & (j <= o.query_segments)


def everything(i: Array, j: Array, o: Any) -> Array:
    return (i >= 0) & (j >= 0)


def same_document(i: Array, j: Array, o: Any) -> Array:
    return o.query_documents == o.key_documents


def started(i: Array, j: Array, o: Any) -> Array:
    return (o.query_starts <= j) & (j <= i)


def prefix(i: Array, j: Array, o: Any) -> Array:
    return (j <= i) | (j < o.prefix_lens)


def unpadded(banded: Callable[[Array, Array, Any], Array]) -> Callable[[Array, Array, Any], Array]:
    return lambda i, j, o: banded(i, j, o) & ~o.key_padding


CASES = [
    Case(FORMS["full_self"].mask, unpadded(causal), causal),
    Case(FORMS["sliding_self"].mask, unpadded(sliding), sliding),
    # Bounds enclose what the tile's segments see; keys between two of them may be seen by nobody.
    Case(FORMS["segment_cross"].mask, unpadded(segments), segments, empty_found=0.9),
    Case(FORMS["bidirectional"].mask, unpadded(everything), everything),
    # Ids are read key by key: bounds speak of positions alone.
    Case(FORMS["document"].mask, unpadded(same_document), everything),
    Case(
        FORMS["document_causal"].mask, unpadded(lambda i, j, o: causal(i, j, o) & same_document(i, j, o)), causal
    ),
    Case(FORMS["prefix_lm"].mask, unpadded(prefix), prefix),
    Case(FORMS["causal_from"].mask, unpadded(started), started, empty_found=0.98),
    Case(Mask("causal", k <= q), causal),
    Case(Mask("sliding", (k <= q) & (q - k < window), (WINDOW,)), sliding),
    Case(Mask("everything", sympy.true), everything),
    Case(Mask("nothing", sympy.false), lambda i, j, o: (i < 0) & (j < 0)),
    Case(Mask("diagonal", Eq(k, q)), lambda i, j, o: i == j),
    Case(Mask("block_causal", k < (in_block + 1) * block, (BLOCK,)), lambda i, j, o: j < (i // o.block + 1) * o.block),
    Case(
        Mask("blocks_back", (k < (in_block + 1) * block) & (k >= (in_block - lookback) * block), (BLOCK, LOOKBACK)),
        lambda i, j, o: (j // o.block <= i // o.block) & (j // o.block >= i // o.block - o.lookback),
    ),
    Case(
        Mask("in_own_block", (k <= q) & (k >= q - Mod(q, block)), (BLOCK,)),
        lambda i, j, o: (j <= i) & (j // o.block == i // o.block),
    ),
    Case(
        Mask("own_blocks_rest", (k > q) & (floor(k / block) <= in_block), (BLOCK,)),
        lambda i, j, o: (j > i) & (j // o.block == i // o.block),
        empty_found=0.98,
    ),
    Case(
        Mask("around", (q - k <= lookback) & (k - q <= ahead), (LOOKBACK, AHEAD)),
        lambda i, j, o: (i - o.lookback <= j) & (j <= i + o.ahead),
    ),
    Case(
        Mask("not_before", (k <= q) & (k >= START.symbol), (START,)),
        lambda i, j, o: (o.start <= j) & (j <= i),
        empty_found=0.98,
    ),
    # Falls with q: the first query sees the most.
    Case(Mask("mirror", k + q < window, (WINDOW,)), lambda i, j, o: i + j < o.window),
    Case(
        Mask("clamped", (k < Max(window, Min(q, 2 * sink))) & (k >= Min(q, sink)), (WINDOW, SINK)),
        lambda i, j, o: (np.minimum(i, o.sink) <= j) & (j < np.maximum(o.window, np.minimum(i, 2 * o.sink))),
        empty_found=0.98,
    ),
    # One interval no more: nothing is full, and only what lies outside of both parts is skipped.
    Case(
        Mask("sink_and_window", (k <= q) & ((k < sink) | (q - k < window)), (SINK, WINDOW)),
        lambda i, j, o: (j <= i) & ((j < o.sink) | (i - j < o.window)),
        full_found=0.0,
        empty_found=0.75,
    ),
    Case(
        Mask("dilated", (k <= q) & Eq(Mod(k, block), Mod(q, block)), (BLOCK,)),
        lambda i, j, o: (j <= i) & (i % o.block == j % o.block),
        full_found=0.0,
        empty_found=0.45,
    ),
    Case(
        Mask("every_nth", Eq(Mod(k, block), Mod(q, block)), (BLOCK,)),
        lambda i, j, o: i % o.block == j % o.block,
        full_found=0.0,
        empty_found=0.0,
    ),
]
BY_NAME = {c.id: c.mask for c in CASES}
on_cases = pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)


@dataclasses.dataclass(frozen=True)
class Call:
    """A random call of one request: lengths, the first query's position, operands with a batch of 1."""

    query_len: int
    key_len: int
    q_start: int
    operands: dict[str, Any]

    @property
    def positions(self) -> torch.Tensor:
        return torch.arange(self.q_start, self.q_start + self.query_len)

    def brute_force(self, seen: Callable[[Array, Array, Any], Array]) -> Array:
        """``[Lq, Lk]``"""
        at = {"key": np.s_[None, :], "query": np.s_[:, None]}
        values = {}
        for name, value in self.operands.items():
            kind = "key" if name.startswith("key_") else "query"
            values[name] = value if isinstance(value, int) else value[0].numpy()
            if isinstance(value, torch.Tensor) and value.dim() == 2:
                values[name] = values[name][at[kind]]
        i, j = self.positions.numpy()[:, None], np.arange(self.key_len)[None]
        return np.broadcast_to(seen(i, j, types.SimpleNamespace(**values)), (self.query_len, self.key_len))

    @property
    def ints(self) -> dict[str, int]:
        return {n: v for n, v in self.operands.items() if isinstance(v, int)}


def random_calls(mask: Mask, count: int, seed: int = 0, lengths: tuple[int, int] | None = None) -> Iterator[Call]:
    """Ordered and unordered operands, negative segments and ones past the end, no keys, queries past the keys."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        query_len, key_len = lengths or (int(rng.integers(1, 40)), int(rng.integers(0, 48)))
        operands: dict[str, Any] = {}
        for o in mask.operands:
            if o.kind == "int":
                operands[o.name] = int(rng.integers(o.minimum, 24))
            elif o.kind == "request":
                operands[o.name] = torch.tensor([rng.integers(0, key_len + 8)])
            elif o.boolean:
                operands[o.name] = torch.tensor(rng.random((1, key_len)) < rng.choice([0.0, 0.3, 1.0]))
            else:
                length = query_len if o.kind == "query" else key_len
                values = rng.integers(-3, 1 + int(rng.choice([4, key_len + 8])), (1, length))
                values = np.sort(values) if rng.random() < 0.7 else values
                if rng.random() < 0.1:  # "no segment", in one way and the other
                    values[:, ::3] = rng.choice([np.iinfo(np.int32).max, np.iinfo(np.int32).min])
                operands[o.name] = torch.tensor(values)
        yield Call(query_len, key_len, int(rng.choice([0, rng.integers(0, 30)])), operands)


tl = types.SimpleNamespace(
    maximum=np.maximum, minimum=np.minimum, int32=np.int32, int64=np.int64, cast=lambda x, dtype: dtype(x)
)
"""As much of ``triton.language`` as the printed functions use."""


def printed(mask: Mask) -> types.SimpleNamespace:
    """The Triton functions' text, run by Python."""
    scope: dict[str, Any] = {"tl": tl}
    exec(triton_source(mask), scope)
    return types.SimpleNamespace(
        **{part: scope[f"{mask.name}_{part}"] for part in ("visible", "key_visible", "bounds")}
    )


def slot_values(mask: Mask, call: Call) -> tuple[tuple[int, ...], list[Any]]:
    """The arguments of the printed predicates after q and k: ints; request, query, key values and key padding."""
    ints = tuple(call.operands[o.name] for o in mask.int_operands)
    slots: list[Any] = []
    for kind, boolean, index in (
        ("request", False, ()),
        ("query", False, np.s_[:, None]),
        ("key", False, np.s_[None, :]),
        ("key", True, np.s_[None, :]),
    ):
        operand = mask.operand(kind, boolean)  # type: ignore[arg-type]
        slots.append(0 if operand is None else call.operands[operand.name][0].numpy()[index])
    return ints, slots
