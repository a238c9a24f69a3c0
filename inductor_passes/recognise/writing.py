"""Writes a form's op into Dynamo's graph: q, k and v in its layout, operands computed where they have to be."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch.fx.node import Node

from custom_ops.masks import Operand, k
from inductor_passes.recognise.candidate import Candidate
from inductor_passes.recognise.graph_values import example, size_of
from inductor_passes.recognise.indexing import Unreadable
from inductor_passes.recognise.mask_values import REQUEST, Read
from inductor_passes.recognise.match import Matched
from inductor_passes.recognise.repeated_kv import INDEX, Heads

_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    sympy.Add: operator.add, sympy.Mul: operator.mul, sympy.And: operator.and_, sympy.Or: operator.or_,
    sympy.Not: operator.invert, sympy.Eq: operator.eq, sympy.Ne: operator.ne, sympy.Lt: operator.lt,
    sympy.Le: operator.le, sympy.Gt: operator.gt, sympy.Ge: operator.ge, sympy.Mod: operator.mod,
}  # fmt: skip


class Writer:
    """Adds nodes before a candidate's, each with its example, and takes them back where that does not work out."""

    def __init__(self, candidate: Candidate) -> None:
        self.candidate = candidate
        self.graph = candidate.node.graph
        self.added: list[Node] = []
        self._fake_mode = example(candidate.query).fake_mode

    def call(self, target: Callable[..., Any] | str, *arguments: Any, **keywords: Any) -> Node:
        """A new node, for a function or for a method by its name."""
        with self.graph.inserting_before(self.candidate.node):
            if isinstance(target, str):
                node = self.graph.call_method(target, arguments, keywords)
            else:
                node = self.graph.call_function(target, arguments, keywords)
        self.added.append(node)
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
        self.added.clear()

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
            if isinstance(value, int):
                written[name] = value if operand.kind == "int" else self._constant(value)
            elif operand.boolean:
                written[name] = self._key_padding(value)
            elif operand.kind == "request":
                written[name] = self._per_request(value)
            else:
                written[name] = self._tensors(value)[value]
        return written

    def _constant(self, number: Any) -> Node:
        query = self.candidate.query
        device = example(query).device
        return self.call(torch.full, (self.size(query, 0),), number, dtype=torch.int32, device=device)

    def _per_request(self, value: sympy.Expr) -> Node:
        """``[B]`` int32, of one-per-request tensors and sizes."""
        tensors = self._tensors(value)
        result = self._expression(value, {**tensors, **self._sizes(value, tensors)})
        return self.call("to", result, torch.int32) if tensors else self._constant(result)

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
        node = read.node
        if any(i == 0 for i in read.at):
            node = self.call(operator.getitem, node, tuple(0 if i == 0 else slice(None) for i in read.at))
        left = [i for i in read.at if i != 0]
        if len(left) == 2 and left[1] == REQUEST:
            node = self.call("transpose", node, 0, 1)
        if REQUEST in left:
            return node
        query, key = self.candidate.query, self.candidate.key
        sizes = [self.size(query, 0)]
        if operand.kind != "request":
            sizes.append(self.size(key if operand.kind == "key" else query, 2))
        return self.call("expand", node, *sizes)

    def _sizes(self, value: sympy.Basic, known: Mapping[Any, Any]) -> dict[sympy.Symbol, Any]:
        """Symbolic sizes that an expression reads, from the tensors that have them."""
        found: dict[sympy.Symbol, Any] = {}
        for symbol in value.free_symbols - known.keys():
            places = [
                (tensor, dim)
                for tensor in (self.candidate.query, self.candidate.key)
                for dim in range(4)
                if size_of(example(tensor).shape[dim]) == symbol
            ]
            if not places:
                raise Unreadable(f"the size {symbol} is neither q's nor k's")
            found[symbol] = self.size(*places[0])
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
