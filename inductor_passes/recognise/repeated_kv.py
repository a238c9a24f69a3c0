"""Keys and values as they were before their heads were repeated for the query heads of a group.

``repeat_interleave``, ``expand`` and ``reshape`` (Hugging Face's ``repeat_kv``), an expansion of one head to all: what
counts is that query head ``h`` reads head ``h // n`` of what there was before, for one ``n``, and nothing else moved.
"""

from __future__ import annotations

import dataclasses

import sympy
from torch.fx.node import Node

from inductor_passes.recognise.graph_values import Writes, shape_of
from inductor_passes.recognise.indexing import Index, Unreadable, at_ones, input_index

BATCH, HEAD, TOKEN, FEATURE = INDEX = tuple(
    sympy.Symbol(f"{name}_index", integer=True, nonnegative=True) for name in ("batch", "head", "token", "feature")
)


@dataclasses.dataclass(frozen=True)
class Heads:
    """Keys or values: ``node[at]`` is ``[B, heads, L, D]`` with dimensions in the order in which ``at`` has them."""

    node: Node
    at: Index
    """The node's own indices: 0, BATCH, HEAD (of ``heads``), TOKEN or FEATURE each."""
    heads: sympy.Expr
    times: int
    """How often each head was repeated."""


def whole(node: Node) -> Heads:
    """Keys or values as they are, ``[B, heads, L, D]``."""
    return Heads(node, tuple(INDEX), shape_of(node)[1], 1)


def heads_of(node: Node, attention: Node, writes: Writes) -> Heads:
    """The tensor with the fewest heads of which ``node``, ``[B, H, L, D]``, is a repetition; itself where of none."""
    shape = shape_of(node)
    best = whole(node)
    if not best.heads.is_Integer or best.heads == 1:
        return best
    now, index = node, at_ones(INDEX, shape)
    while True:
        reader = now
        if writes.between(reader, reader, attention):
            return best
        try:
            now, index = input_index(now, index)
        except Unreadable:
            return best
        if writes.between(now, reader, attention):
            return best
        found = _grouped(now, index, shape)
        if found is not None and found.heads < best.heads:
            best = found


def _grouped(node: Node, index: Index, shape: tuple[sympy.Expr, ...]) -> Heads | None:
    """``node`` as heads, if ``index`` reads every element of it and each head the same number of times."""
    sizes = dict(zip(INDEX, shape, strict=True))
    named: list[sympy.Expr] = []
    heads, times = sympy.S.One, int(shape[1])
    for at, size in zip(index, shape_of(node), strict=True):
        if at == 0 and size == 1:
            named.append(at)
            continue
        if HEAD in at.free_symbols:
            if not size.is_Integer or int(shape[1]) % int(size) or HEAD in named:
                return None
            heads, times = size, int(shape[1]) // int(size)
            if not _is_quotient(at, times, int(shape[1])):
                return None
            at = HEAD
        elif at not in sizes or size != sizes[at] or at in named:
            return None
        named.append(at)
    whole = all(i in named or sizes[i] == 1 for i in (BATCH, TOKEN, FEATURE))
    return Heads(node, tuple(named), heads, times) if whole else None


def _is_quotient(at: sympy.Expr, times: int, count: int) -> bool:
    """Whether ``at`` is ``HEAD // times`` for every head: however it is written, it is compared on all of them."""
    if at.free_symbols != {HEAD}:
        return False
    return all(at.xreplace({HEAD: sympy.Integer(h)}) == h // times for h in range(count))
