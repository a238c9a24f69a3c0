"""The two products of attention that is written out, and which dimensions of their tensors are what.

Products are ``matmul``, ``@``, ``bmm``, ``baddbmm`` and ``einsum``, over ``[B, H, L, D]``, over the same in another
order, or over ``[N, L, D]``, where ``N`` counts the heads of all requests. Where q, k and v were reshaped to that from
``[B, H, L, D]``, attention is over what they were; else each of ``N`` is a request with one head.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import sympy
import torch
from torch.fx.node import Node

from inductor_passes.recognise.candidate import Axes
from inductor_passes.recognise.graph_values import Writes, example, name_of, shape_of
from inductor_passes.recognise.indexing import Index, Unreadable, arguments_of, input_index, require
from inductor_passes.recognise.repeated_kv import BATCH, FEATURE, HEAD, TOKEN

PRODUCTS = ("matmul", "bmm", "einsum")
SCORE_PRODUCTS = (*PRODUCTS, "baddbmm")
"""``baddbmm`` adds to scores. Nothing may be added to the output."""

FOLDED = sympy.Symbol("folded_index", integer=True, nonnegative=True)
"""The index of a head among those of all requests."""


class Factor(NamedTuple):
    """A tensor of a product: its dimensions as letters, ``b`` and ``h`` or ``n``, ``i`` rows, ``j`` columns, ``x``
    what is summed over."""

    node: Node
    letters: str


class Product(NamedTuple):
    """``scale * (left @ right) + added``, its dimensions in the order of ``result``."""

    left: Factor
    right: Factor
    result: str
    scale: Any = 1
    added: Any = None


class Placed(NamedTuple):
    """A tensor and where it has each of ``[B, H, L, D]``."""

    node: Node
    axes: Axes

    @property
    def sizes(self) -> tuple[sympy.Expr, ...]:
        shape = shape_of(self.node)
        return tuple(sympy.S.One if axis is None else shape[axis] for axis in self.axes)


def factors_of(node: Node) -> list[Node]:
    """The tensors that a node of ``SCORE_PRODUCTS`` multiplies, as far as its arguments show."""
    given: Any = torch.utils._pytree.tree_leaves(node.args)
    if name_of(node) == "baddbmm":
        by_name = dict(zip(("input", "batch1", "batch2"), node.args, strict=False)) | node.kwargs
        given = [by_name.get("batch1"), by_name.get("batch2")]
    return [n for n in given if isinstance(n, Node) and isinstance(example(n), torch.Tensor)]


def product_of(node: Node) -> Product:
    """What a node of ``SCORE_PRODUCTS`` computes. Raises ``Unreadable``."""
    if name_of(node) == "einsum":
        return _einsum(node)
    unknown = f"arguments of {node.name} that are not known here"
    scale: Any = 1
    added = None
    if name_of(node) == "baddbmm":
        in_place = node.op == "call_method" and str(node.target).endswith("_")
        require(not in_place, f"{node.name} writes to what it adds")
        given = arguments_of(_baddbmm, *node.args, **node.kwargs).arguments
        left, right, scale, beta = given["batch1"], given["batch2"], given.get("alpha", 1), given.get("beta", 1)
        require(isinstance(beta, (int, float)) and beta in (0, 1), f"{node.name} scales what it adds")
        added = given["input"] if beta else None
    else:
        require(len(node.args) == 2 and not node.kwargs, unknown)
        left, right = node.args
    require(isinstance(left, Node) and isinstance(right, Node), unknown)
    ranks = {example(n).dim() for n in (left, right, node)}
    require(ranks in ({3}, {4}), f"{node.name} is no product over [B, H, L, D] or [N, L, D]")
    batch = "n" if ranks == {3} else "bh"
    return Product(Factor(left, f"{batch}ix"), Factor(right, f"{batch}xj"), f"{batch}ij", scale, added)


def _baddbmm(input: Any, batch1: Any, batch2: Any, *, beta: Any = 1, alpha: Any = 1) -> None:
    """What it takes."""


def _einsum(node: Node) -> Product:
    equation, *operands = node.args
    flat: list[Any] = list(operands[0]) if operands and isinstance(operands[0], (list, tuple)) else operands
    plain = isinstance(equation, str) and "->" in equation and "." not in equation and len(flat) == 2
    known = plain and not node.kwargs and all(isinstance(t, Node) for t in flat)
    require(known, f"{node.name} is spelled in a way that is not known here")
    inputs, _, result = str(equation).replace(" ", "").partition("->")
    left, right = inputs.split(",")
    batch, rows = ([c for c in result if c in left and (c in right) == both] for both in (True, False))
    columns, summed = [c for c in result if c not in left], [c for c in left if c not in result]
    letters = [*batch, *rows, *columns, *summed]
    sides = ((left, [*batch, *rows, *summed]), (right, [*batch, *columns, *summed]), (result, letters[:-1]))
    once = all(sorted(side) == sorted(expected) for side, expected in sides)
    counted = (len(rows), len(columns), len(summed)) == (1, 1, 1) and len(batch) in (1, 2)
    require(once and counted, f"{node.name} is no product over [B, H, L, D] or [N, L, D]")
    named = dict(zip(letters, ("n" if len(batch) == 1 else "bh") + "ijx", strict=True))
    left, right, result = ("".join(named[c] for c in part) for part in (left, right, result))
    return Product(Factor(flat[0], left), Factor(flat[1], right), result)


def placed(factors: Sequence[tuple[Factor, str]], attention: Node, writes: Writes) -> list[Placed]:
    """q, k and v as they were before they were transposed or folded, each given with its letters of L and D.

    Raises ``Unreadable``.
    """
    found = []
    for factor, letters in factors:
        symbols = {"b": BATCH, "h": HEAD, "n": FOLDED, letters[0]: TOKEN, letters[1]: FEATURE}
        found.append((factor.node, tuple(symbols[c] for c in factor.letters)))
    unfolded = [_unfolded(node, index, attention, writes) for node, index in found if FOLDED in index]
    heads = {p.sizes[:2] for p in unfolded if p is not None}
    if len(unfolded) == 3 and (None in unfolded or len(heads) > 1):
        return [Placed(node, _axes(index, FOLDED)) for node, index in found]
    alike = None not in unfolded and len(heads) <= 1
    require(alike, "some of q, k and v have a dimension for heads, and others nothing to tell it from")
    before = (p for p in unfolded if p is not None)
    return [
        next(before) if FOLDED in index else _untransposed(node, index, attention, writes) for node, index in found
    ]


def _axes(index: Index, batch: sympy.Symbol = BATCH) -> Axes:
    return tuple(index.index(symbol) if symbol in index else None for symbol in (batch, HEAD, TOKEN, FEATURE))


def _untransposed(node: Node, index: Index, attention: Node, writes: Writes) -> Placed:
    """A k that was transposed for its product, as it was before."""
    if index != (BATCH, HEAD, FEATURE, TOKEN):
        return Placed(node, _axes(index))
    source, at = input_index(node, index)
    sizes = dict(zip(index, shape_of(node), strict=True))
    found = _found(source, at, (BATCH, HEAD, TOKEN, FEATURE), tuple(sizes[s] for s in (BATCH, HEAD, TOKEN, FEATURE)))
    if found is None:
        raise Unreadable(f"{node.name} is not the transpose of [B, H, S, D]")
    require(_holds(source, node, attention, writes), f"{source.name} is written to before its attention ends")
    return found


def _unfolded(node: Node, index: Index, attention: Node, writes: Writes) -> Placed | None:
    """The tensor ``[B, H, L, D]`` of which ``node``, ``[N, L, D]``, is a view or a copy; None where there is none."""
    sizes = dict(zip(index, shape_of(node), strict=True))
    while example(node).dim() != 4:
        reader = node
        try:
            node, index = input_index(node, index)
        except Unreadable:
            return None
        if not _holds(node, reader, attention, writes):
            return None
    for batch, heads in itertools.permutations(range(4), 2):
        size = shape_of(node)
        if not size[heads].is_Integer or sympy.expand(size[batch] * size[heads] - sizes[FOLDED]) != 0:
            continue
        at = (sympy.floor(FOLDED / size[heads]), sympy.Mod(FOLDED, size[heads]))
        if size[batch] == 1:
            at = (sympy.S.Zero, FOLDED)
        found = _found(node, index, (*at, TOKEN, FEATURE), (size[batch], size[heads], sizes[TOKEN], sizes[FEATURE]))
        if found is not None:
            return found
    return None


def _found(node: Node, index: Index, wanted: Index, sizes: Index) -> Placed | None:
    """Where ``node`` has the dimensions that ``wanted`` counts along and that are so long."""
    for axes in itertools.permutations(range(4)):
        here = [(index[axis], shape_of(node)[axis]) for axis in axes]
        if all(size == n and (at == i or n == 1) for (at, size), i, n in zip(here, wanted, sizes, strict=True)):
            return Placed(node, axes)
    return None


def _holds(source: Node, reader: Node, attention: Node, writes: Writes) -> bool:
    """Whether what ``reader`` took from ``source`` is what both still hold when ``attention`` runs."""
    return not writes.between(source, reader, attention) and not writes.between(reader, reader, attention)
