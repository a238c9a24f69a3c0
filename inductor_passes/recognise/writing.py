"""Writes a form's op into Dynamo's graph: q, k and v in its layout, operands computed where they have to be."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import sympy
import torch
from torch.fx.node import Node

from custom_ops.masks import Operand, k
from inductor_passes.recognise.candidate import IN_ORDER, Axes, Candidate
from inductor_passes.recognise.graph_values import Writes, example, in_transform, size_of
from inductor_passes.recognise.indexing import Unreadable, require
from inductor_passes.recognise.mask_values import REQUEST, Read
from inductor_passes.recognise.match import Matched
from inductor_passes.recognise.repeated_kv import INDEX, Heads
from inductor_passes.recognise.sequences import Starts

FARTHEST = 1 << 30
"""Before or behind every key. What is farther hides and shows the same keys, and int32 sums of it and a query's index
do not wrap."""

_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    sympy.Add: operator.add, sympy.Mul: operator.mul, sympy.And: operator.and_, sympy.Or: operator.or_,
    sympy.Not: operator.invert, sympy.Eq: operator.eq, sympy.Ne: operator.ne, sympy.Lt: operator.lt,
    sympy.Le: operator.le, sympy.Gt: operator.gt, sympy.Ge: operator.ge, sympy.Mod: operator.mod,
}  # fmt: skip


def _reach(read: Read) -> int | None:
    return read.reach if isinstance(read, Starts) else -1


class Writer:
    """Adds nodes before a candidate's, each with its example, and takes them back where that does not work out."""

    def __init__(self, candidate: Candidate, writes: Writes) -> None:
        self.candidate = candidate
        self.writes = writes
        self.graph = candidate.node.graph
        self.added: list[Node] = []
        self._fake_mode = example(candidate.query).fake_mode

    def call(self, target: Callable[..., Any] | str, *arguments: Any, **keywords: Any) -> Node:
        """A new node, for a function or for a method by its name."""
        return self._call(self.candidate.node, target, *arguments, **keywords)

    def _call(self, before: Node, target: Callable[..., Any] | str, *arguments: Any, **keywords: Any) -> Node:
        with self.graph.inserting_before(before):
            if isinstance(target, str):
                node = self.graph.call_method(target, arguments, keywords)
            else:
                node = self.graph.call_function(target, arguments, keywords)
        self.added.append(node)
        self.writes.place(node, before)
        fakes, fake_keywords = torch.fx.node.map_arg((arguments, keywords), example)
        with self._fake_mode:
            if isinstance(target, str):
                node.meta["example_value"] = getattr(fakes[0], target)(*fakes[1:], **fake_keywords)
            else:
                node.meta["example_value"] = target(*fakes, **fake_keywords)
        return node

    def undo(self) -> None:
        """Erase every node that was added."""
        for node in reversed(self.added):
            self.graph.erase_node(node)
        shared = self.writes.shared
        self.writes.shared = {key: node for key, node in shared.items() if node not in self.added}
        self.added.clear()

    def in_order(self) -> Candidate:
        """The candidate with q, k and v as ``[B, H, L, D]``."""
        given = self.candidate
        tensors = [self._in_order(*t) for t in zip((given.query, given.key, given.value), given.axes, strict=True)]
        query, key, value = tensors
        self.candidate = dataclasses.replace(given, query=query, key=key, value=value, axes=(IN_ORDER,) * 3)
        return self.candidate

    def _in_order(self, node: Node, axes: Axes) -> Node:
        dims = list(axes)
        if None in dims:
            dims[dims.index(None)] = example(node).dim()
            node = self.call("unsqueeze", node, -1)
        return node if tuple(dims) == IN_ORDER else self.call("permute", node, *dims)

    def out_of_order(self, out: Node) -> Node:
        """The form's output ``[B, H, L, D]`` as the candidate's lies."""
        axes = self.candidate.out_axes
        if None in axes:
            out = self.call("flatten", out, 0, 1)
        dims = [axis for axis in axes if axis is not None]
        order = sorted(range(len(dims)), key=dims.__getitem__)
        return out if order == sorted(order) else self.call("permute", out, *order)

    def size(self, node: Node, dim: int) -> Any:
        """A size of a tensor, as a number where it is one."""
        size = example(node).shape[dim]
        return size if isinstance(size, int) else self.call("size", node, dim)

    def heads(self, heads: Heads) -> Node:
        """k or v as ``[B, heads, L, D]``."""
        if heads.at == INDEX:
            return heads.node
        order = [heads.at.index(i) if i in heads.at else None for i in INDEX]
        spare = iter([axis for axis, i in enumerate(heads.at) if i == 0])
        dims = [next(spare) if axis is None else axis for axis in order]
        extra = set(spare)
        node = heads.node
        if extra:
            item = tuple(0 if axis in extra else slice(None) for axis in range(len(heads.at)))
            node = self.call(operator.getitem, node, item)
        kept = [axis for axis in range(len(heads.at)) if axis not in extra]
        dims = [kept.index(axis) for axis in dims]
        return node if dims == [0, 1, 2, 3] else self.call("permute", node, *dims)

    def operands(self, matched: Matched) -> dict[str, Any]:
        """What the form's op takes beside q, k and v. Raises ``Unreadable`` where a value cannot be written."""
        kinds = {o.name: o for o in matched.form.operands}
        written: dict[str, Any] = {}
        for name, value in matched.operands.items():
            operand = kinds[name]
            if isinstance(value, int) and operand.kind == "int":
                written[name] = value
                continue
            key = self._identity(operand, value)
            if key not in self.writes.shared:
                self.writes.shared[key] = self._operand(operand, value)
            written[name] = self.writes.shared[key]
        return written

    def _identity(self, operand: Operand, value: Any) -> Hashable:
        """What an operand is computed from: the same for two calls, it is one tensor."""
        symbols = getattr(value, "free_symbols", ())
        reads = [(o.symbol, read) for o, read in self.candidate.tensors.items() if o.symbol in symbols]
        sources = frozenset((s, r if isinstance(r, Node) else (self._source(r), r.at, _reach(r))) for s, r in reads)
        query, key = (example(t) for t in (self.candidate.query, self.candidate.key))
        sizes = [size_of(size) for size in (query.shape[0], query.shape[2], key.shape[2])]
        return operand.kind, operand.boolean, value, sources, query.device, *sizes

    def _operand(self, operand: Operand, value: Any) -> Node:
        if isinstance(value, int):
            return self._constant(value)
        if operand.boolean:
            return self._key_padding(value)
        return self._per_request(value) if operand.kind == "request" else self._tensors(value)[value]

    def _constant(self, number: Any) -> Node:
        query = self.candidate.query
        device = example(query).device
        return self.call(torch.full, (self.size(query, 0),), number, dtype=torch.int32, device=device)

    def _per_request(self, value: sympy.Expr) -> Node:
        """``[B]`` int32, of one-per-request tensors and sizes: ``FARTHEST`` where a number is past it."""
        tensors = self._tensors(value)
        if not tensors:
            return self._constant(self._expression(value, self._sizes(value, {})))
        if value in tensors and example(tensors[value]).dtype == torch.int32:
            return tensors[value]
        wide = {s: self.call("to", n, torch.int64) for s, n in tensors.items()}
        result = self._expression(value, {**wide, **self._sizes(value, wide)})
        return self.call("to", self.call("clamp", result, -FARTHEST, FARTHEST), torch.int32)

    def _key_padding(self, value: sympy.Basic) -> Node:
        """``[B, Lk]`` bool."""
        query, key = self.candidate.query, self.candidate.key
        tensors = self._tensors(value)
        kinds = {o.symbol: o.kind for o in self.candidate.tensors}
        named = {s: self.call("unsqueeze", n, 1) if kinds[s] == "request" else n for s, n in tensors.items()}
        if k in value.free_symbols:
            named[k] = self.call(torch.arange, self.size(key, 2), device=example(query).device)
        hidden = self._expression(value, {**named, **self._sizes(value, named)})
        return self.call("expand", hidden, self.size(query, 0), self.size(key, 2))

    def _tensors(self, value: sympy.Basic) -> dict[sympy.Symbol, Node]:
        by_symbol: Mapping[sympy.Symbol, tuple[Operand, Read | Node]] = {
            o.symbol: (o, read) for o, read in self.candidate.tensors.items()
        }
        return {s: self._read(*by_symbol[s]) for s in sorted(value.free_symbols, key=str) if s in by_symbol}

    def _read(self, operand: Operand, read: Read | Node) -> Node:
        """A tensor operand as ``[B]``, ``[B, Lq]`` or ``[B, Lk]``."""
        if isinstance(read, Node):
            return read
        node = self._source(read)
        if any(i == 0 for i in read.at):
            node = self.call(operator.getitem, node, tuple(0 if i == 0 else slice(None) for i in read.at))
        left = [i for i in read.at if i != 0]
        if len(left) == 2 and left[1] == REQUEST:
            node = self.call("transpose", node, 0, 1)
        query, key = self.candidate.query, self.candidate.key
        if REQUEST not in left:
            sizes = [self.size(query, 0)]
            if operand.kind != "request":
                sizes.append(self.size(key if operand.kind == "key" else query, 2))
            node = self.call("expand", node, *sizes)
        return self._starts(node, read.reach) if isinstance(read, Starts) else node

    def _starts(self, ids: Node, reach: int | None) -> Node:
        """``[B, Lq]``: the first token with the id of each, or the oldest that it reaches."""
        ids = self.call("contiguous", ids)
        starts = self.call(torch.searchsorted, ids, ids)
        if reach is None:
            return starts
        query = self.candidate.query
        positions = self.call(torch.arange, self.size(query, 2), device=example(query).device)
        return self.call(torch.maximum, starts, self.call(operator.sub, positions, reach - 1))

    def _source(self, read: Read) -> Node:
        """A tensor with what it held when the mask was made: itself, or a copy where somebody writes to it afterwards.

        A step with a static cache adds to the number of cached tokens between its mask and its first attention. That
        nobody wrote to the tensor before the mask was made is known, so one copy is right for every mask.
        """
        if not self.writes.between(read.node, read.reader, self.candidate.node):
            return read.node
        shared = self.writes.shared
        if read.node not in shared:
            inside = in_transform(read.reader)
            require(not inside, f"{read.node.name} is read inside a functorch transform and written to afterwards")
            shared[read.node] = self._call(read.reader, "clone", read.node)
        return shared[read.node]

    def _sizes(self, value: sympy.Basic, known: Mapping[Any, Any]) -> dict[sympy.Symbol, Any]:
        """Symbolic sizes that an expression reads, from the tensors that have them or from the graph's numbers."""
        found: dict[sympy.Symbol, Any] = {}
        for symbol in value.free_symbols - known.keys():
            places = [
                (tensor, dim)
                for tensor in (self.candidate.query, self.candidate.key)
                for dim in range(4)
                if size_of(example(tensor).shape[dim]) == symbol
            ]
            numbers = [n for n in self.graph.find_nodes(op="placeholder") if size_of(n) == symbol]
            if not places and not numbers:
                raise Unreadable(f"the size {symbol} is neither q's nor k's, and no input of the graph")
            found[symbol] = self.size(*places[0]) if places else numbers[0]
        return found

    def _expression(self, e: sympy.Basic, named: Mapping[Any, Any]) -> Any:
        if e in named:
            return named[e]
        if e.is_Integer:
            return int(e)
        function = _FUNCTIONS.get(e.func)
        if e.func is sympy.floor:
            function, parts = operator.floordiv, e.args[0].as_numer_denom()
        else:
            parts = e.args
        if function is None:
            raise Unreadable(f"{e} cannot be written into the graph")
        result, *others = [self._expression(a, named) for a in parts]
        if function is operator.invert:
            return self.call(function, result)
        for other in others:
            both = isinstance(result, int) and isinstance(other, int)
            result = function(result, other) if both else self.call(function, result, other)
        return result
