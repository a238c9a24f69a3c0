"""Sequences packed side by side: a causal query that sees its own sequence sees the keys from its sequence's start.

A mask that compares ids of sequences, ``ids[q] == ids[k]``, says nothing of which keys those are. Where ids never
decrease from one token to the next, as running sums of starts do, they are the keys from the first one with the query's
id; and a window then only moves that start. ``causal_from`` skips the keys before it.
"""

from __future__ import annotations

import dataclasses

import sympy
import torch
from sympy.core.relational import Relational
from torch.fx.node import Node

from custom_ops.mask_bounds import solve
from custom_ops.masks import Operand, k, q
from inductor_passes.recognise.candidate import Candidate
from inductor_passes.recognise.graph_values import example, name_of, size_of
from inductor_passes.recognise.mask_values import Read


@dataclasses.dataclass(frozen=True)
class Starts(Read):
    """Where the sequence of each query starts, an operand a query: ``node`` holds ids, which never decrease."""

    reach: int | None
    """A query sees no key that is ``reach`` before it; None for any."""


def with_starts(candidate: Candidate) -> Candidate | None:
    """The candidate with starts of sequences instead of their ids; None where it compares none that are in order."""
    conjuncts = set(sympy.And.make_args(sympy.to_nnf(candidate.visible, simplify=False)))
    if not any(isinstance(c, Relational) and _is_causal(c) for c in conjuncts):
        return None
    reads = {o.symbol: (o, read) for o, read in candidate.tensors.items() if isinstance(read, Read)}
    for compared in conjuncts:
        if not isinstance(compared, sympy.Eq) or not reads.keys() >= set(compared.args):
            continue
        (one, ids), (other, again) = sorted((reads[s] for s in compared.args), key=lambda r: r[0].kind == "key")
        same = ids.node is again.node and tuple(k if i == q else i for i in ids.at) == again.at
        if (one.kind, other.kind) != ("query", "key") or not same or not _ascends(ids):
            continue
        windows = {c: reach for c in conjuncts if (reach := _reach(c)) is not None}
        reach = min(windows.values(), default=None)
        start = Operand(f"{ids.node.name}_starts", "query")
        visible = sympy.And(*(conjuncts - {compared, *windows}), k >= start.symbol)
        return dataclasses.replace(
            candidate, visible=visible,
            tensors={**candidate.tensors, start: Starts(ids.node, ids.at, ids.reader, reach)},
        )  # fmt: skip
    return None


def _is_causal(relation: sympy.Basic) -> bool:
    return sympy.expand(solve(relation).upper - q - 1) == 0 if relation.free_symbols == {q, k} else False


def _reach(relation: sympy.Basic) -> int | None:
    """``n`` of ``q - k < n``."""
    if not isinstance(relation, Relational) or relation.free_symbols != {q, k}:
        return None
    span = solve(relation)
    reach = sympy.expand(q + 1 - span.lower)
    return int(reach) if span.exact and span.upper == sympy.oo and reach.is_Integer else None


def _ascends(ids: Read) -> bool:
    """Whether ids never decrease over the queries: a running sum of truth values."""
    node: Node = ids.node
    if node.op not in ("call_function", "call_method") or name_of(node) != "cumsum" or len(node.args) > 2:
        return False
    given = dict(zip(("input", "dim"), node.args, strict=False)) | node.kwargs
    axis, summed = size_of(given.get("dim")), example(given.get("input"))
    plain = given.keys() == {"input", "dim"} and isinstance(summed, torch.Tensor) and summed.dtype == torch.bool
    return plain and axis is not None and bool(axis.is_Integer) and ids.at[int(axis)] == q
