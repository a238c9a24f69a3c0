"""What a mask in the graph says: one condition over the indices of a query and a key, read back from what made it.

``MaskReader`` interprets the nodes that make a mask, element by element: the element ``[b, h, q, k]`` of a comparison
compares elements of its inputs, those of an ``arange`` are their index, and so on down to tensors that the graph is
given, which become operands. What comes out is exact or it is ``Unreadable``, with a reason for people.

Numbers of which there are few, as in an additive mask, are kept as their values, each with the condition under which it
is there (``Choices``). Their arithmetic is torch's own, on one-element tensors of the right dtypes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch.fx.node import Node

from custom_ops.masks import Operand, k, q
from inductor_passes.recognise.conditions import impossible
from inductor_passes.recognise.graph_values import Writes, example, name_of, shape_of, size_of
from inductor_passes.recognise.indexing import (
    Index,
    Unknown,
    Unreadable,
    arguments_of,
    at_ones,
    input_index,
    require,
    within,
)

REQUEST = sympy.Symbol("b_index", integer=True, nonnegative=True)
"""A request's index in the batch."""
HEAD = sympy.Symbol("h_index", integer=True, nonnegative=True)
"""A query head's index."""
INTEGERS = (torch.int32, torch.int64)
"""Dtypes whose numbers do not wrap where positions are computed in them."""
MOST_CHOICES = 8


@dataclasses.dataclass(frozen=True)
class Read:
    """A tensor operand as the graph has it: ``node[at]``, where ``at`` has a 0 or one of REQUEST, q and k each."""

    node: Node
    at: Index
    reader: Node
    """The node that reads it in the user's program: nothing may write to the tensor between there and the new op."""


@dataclasses.dataclass(frozen=True)
class Visibility:
    """What a mask says. ``visible`` is over q, k (indices in the call), sizes and the symbols of ``tensors``."""

    visible: sympy.Basic
    tensors: Mapping[Operand, Read]
    finite: bool
    """Whether scores are hidden by the least finite number instead of -inf: a row in which nothing is visible is then
    the mean of all values, which no form gives."""


class Choices(dict[float, Boolean]):
    """Every number that an element may be, with the condition under which it is that one. Exactly one holds."""

    @staticmethod
    def of(pairs: Sequence[tuple[float, Any]]) -> Choices:
        found = Choices()
        for number, condition in pairs:
            if not impossible(condition):
                require(not math.isnan(number), "arithmetic that may give NaN")
                found[number] = sympy.Or(found.get(number, sympy.false), condition)
        require(len(found) <= MOST_CHOICES, f"more than {MOST_CHOICES} different numbers")
        return found


Value: TypeAlias = sympy.Expr | Boolean | Choices


class MaskReader:
    """Reads the masks of one graph for one call of attention of these sizes."""

    def __init__(
        self,
        writes: Writes,
        *,
        batch: sympy.Expr,
        query_len: sympy.Expr,
        key_len: sympy.Expr,
        heads: sympy.Expr | None = None,
    ) -> None:
        self._writes = writes
        self._heads = {} if heads is None else {HEAD: heads}
        self._lengths = {REQUEST: batch, q: query_len, k: key_len}
        self._operands: dict[Operand, Read] = {}
        self._known: dict[tuple[Node, Index], Value] = {}

    def read(self, mask: Node, reader: Node) -> Visibility:
        """The mask that ``reader`` reads, bool (True = visible) or additive, broadcast to ``[B, H, Lq, Lk]``.

        Raises ``Unreadable``.
        """
        rank = len(shape_of(mask))
        require(rank <= 4, "a mask of more than 4 dimensions")
        dtype = example(mask).dtype
        require(dtype == torch.bool or dtype.is_floating_point, f"a mask of {dtype}")
        value = self.at(mask, (REQUEST, HEAD, q, k)[4 - rank :], reader)
        if dtype == torch.bool:
            return self.visibility(_boolean(value))
        assert isinstance(value, Choices)
        return self.visibility(value.get(0.0, sympy.false), hides_by_numbers(value, dtype))

    def given(self, node: Node, value: Value) -> None:
        """Take a scalar input of a graph, such as an index that a ``mask_mod`` is called with, for this value."""
        self._known[node, ()] = value

    def visibility(self, visible: sympy.Basic, finite: bool = False) -> Visibility:
        """A condition with the operands that it reads; ``Unreadable`` where it is not the same for all heads."""
        free = visible.free_symbols
        require(HEAD not in free, "it differs by head")
        require(REQUEST not in free, "it depends on the request's number")
        return Visibility(visible, {o: read for o, read in self._operands.items() if o.symbol in free}, finite)

    def at(self, value: Any, index: Sequence[sympy.Expr], reader: Node) -> Value:
        """Element ``index`` of what ``reader`` reads; a number is itself. Raises ``Unreadable``."""
        if not isinstance(value, Node) or not isinstance(example(value), torch.Tensor):
            return _number(value)
        index = at_ones(index, shape_of(value))
        if self._writes.between(value, value, reader):
            raise Unreadable(f"{value.name} is written to in place")
        if (value, index) not in self._known:
            try:
                self._known[value, index] = self._interpreted(value, index, reader)
            except Unreadable as reason:
                try:
                    self._known[value, index] = self._operand(value, index, reader)
                except Unreadable as other:
                    raise (other if isinstance(reason, Unknown) else reason) from None
        return self._known[value, index]

    def _interpreted(self, node: Node, index: Index, reader: Node) -> Value:
        """What ``_interpret`` says; where that is more than one operand, elements that were gathered are one."""
        value = self._interpret(node, index)
        if not _is_gathered(node) or self._is_plain(value):
            return value
        try:
            return self._operand(node, index, reader)
        except Unreadable:
            return value

    def _is_plain(self, value: Value) -> bool:
        """Whether a value is one element of an operand, or reads no operand."""
        conditions = value.values() if isinstance(value, Choices) else (value,)
        read = {o.symbol for o in self._operands} & {s for c in conditions for s in c.free_symbols}
        return not read or (isinstance(value, sympy.Symbol) and value in read)

    def broadcast(self, value: Any, index: Index, reader: Node) -> Value:
        """Element ``index`` of an input that is broadcast to the reader's shape."""
        if isinstance(value, Node) and isinstance(example(value), torch.Tensor):
            return self.at(value, index[len(index) - example(value).dim() :], reader)
        return _number(value)

    def view(self, node: Node, index: Index) -> Value:
        """Element ``index`` of a view, an expansion or a copy."""
        source, at = input_index(node, index)
        return self.at(source, within(at, self._heads), node)

    def _interpret(self, node: Node, index: Index) -> Value:
        if node.op not in ("call_function", "call_method"):
            raise Unknown(f"{node.name} is an input")
        from inductor_passes.recognise.mask_ops import OPS

        rule = OPS.get(name_of(node))
        if rule is None:
            return self.view(node, index)
        bound = arguments_of(rule, self, node, index, *node.args, **node.kwargs)
        return rule(*bound.args, **bound.kwargs)

    def _operand(self, node: Node, index: Index, reader: Node) -> Value:
        """An element of a tensor as a symbol, where the tensor is one of ``[B]``, ``[B, Lq]`` or ``[B, Lk]``."""
        shape, dtype = shape_of(node), example(node).dtype
        named = [i for i in index if i != 0]
        require(HEAD not in named, f"{node.name} differs by head")
        plain = len(set(named)) == len(named) and all(i in self._lengths for i in named)
        require(plain, f"{node.name}, whose values are not in the graph, is not read by request, query or key")
        require(not {q, k} <= set(named), f"{node.name} holds a value for every query and key, not in the graph")
        fits = all(i == 0 or sympy.expand(self._lengths[i] - size) == 0 for i, size in zip(index, shape, strict=True))
        require(fits, f"{node.name} has other lengths than attention")
        require(all(i != 0 or size == 1 for i, size in zip(index, shape, strict=True)), f"only a part of {node.name}")
        kind = "key" if k in named else "query" if q in named else "request"
        if dtype == torch.bool:
            require(kind == "key", f"{node.name} hides keys by request or query, with values not in the graph")
        else:
            require(dtype in INTEGERS, f"values of {node.name} ({dtype}) are not in the graph")
        operand = Operand(f"{node.name}_of_{kind}", kind, None, boolean=dtype == torch.bool)  # type: ignore[arg-type]
        self._operands[operand] = Read(node, index, reader)
        return operand.symbol


def _is_gathered(node: Node) -> bool:
    """Whether a node's elements are looked up by tensors of numbers, such as ``documents[batch, rows]``."""
    if name_of(node) not in ("getitem", "index") or len(node.args) != 2:
        return False
    items = node.args[1] if isinstance(node.args[1], (list, tuple)) else [node.args[1]]
    return any(isinstance(example(i), torch.Tensor) and example(i).dim() > 0 for i in items)


def hides_by_numbers(added: Choices, dtype: torch.dtype) -> bool:
    """Whether some of what is added to scores hides by a finite number, not by -inf.

    ``Unreadable`` where a number neither leaves a score as it is nor hides it whatever the score. The least numbers of
    fp32 and bf16 do: softmax gives 0 where another score is greater by more than 104. Scores in fp16 reach its least.
    """
    hiding = {number for number in added if number not in (0, -math.inf)}
    least = -math.inf if dtype == torch.float16 else torch.finfo(torch.bfloat16).min
    other = sorted(number for number in hiding if number > least)
    require(not other, f"it adds {other[-1]:g} to scores in {dtype}, which is more than a mask" if other else "")
    return bool(hiding)


def _number(value: Any) -> Value:
    number = example(value)
    if isinstance(number, bool):
        return sympy.true if number else sympy.false
    if isinstance(number, float):
        return Choices.of([(number, sympy.true)])
    size = size_of(number)
    if size is None:
        raise Unreadable(f"{value} is no number that the graph knows")
    return size


def _boolean(value: Value) -> Boolean:
    """The value as a condition: whether it is not 0."""
    if isinstance(value, Choices):
        return sympy.Or(*(condition for number, condition in value.items() if number != 0))
    return value if is_condition(value) else sympy.Ne(value, 0)


def is_condition(value: Value) -> bool:
    """Whether a value is a condition, not a number. Sympy takes every symbol for both: those of conditions are bare."""
    if isinstance(value, sympy.Symbol):
        return not value.is_integer
    return isinstance(value, Boolean)


def choices(value: Value) -> Choices:
    """A value as the numbers that it may be; ``Unreadable`` where those cannot be listed."""
    if isinstance(value, Choices):
        return value
    if is_condition(value):
        return Choices.of([(1, value), (0, sympy.Not(value))])
    if not value.is_Integer:
        raise Unreadable(f"the number {value} where a constant is needed")
    return Choices.of([(int(value), sympy.true)])


def converted(value: Value, dtype: torch.dtype) -> Value:
    """A value as an element of another dtype."""
    if dtype == torch.bool:
        return _boolean(value)
    if dtype in INTEGERS and not isinstance(value, Choices) and not is_condition(value):
        return value
    found = Choices.of([(_tensor_of(n).to(dtype).item(), c) for n, c in choices(value).items()])
    return sympy.Integer(next(iter(found))) if dtype in INTEGERS and len(found) == 1 else found


def _tensor_of(number: float) -> torch.Tensor:
    return torch.tensor(number, dtype=torch.float64 if isinstance(number, float) else None)


def computed(function: Callable[..., torch.Tensor], dtypes: Sequence[torch.dtype | None], *values: Value) -> Value:
    """torch's own ``function`` of every combination of numbers; a dtype of None is a Python number."""
    pairs: list[tuple[float, Any]] = []
    combinations: list[tuple[list[float], Any]] = [([], sympy.true)]
    for value in values:
        combinations = [
            ([*numbers, n], sympy.And(condition, c)) for numbers, condition in combinations
            for n, c in choices(value).items()
        ]  # fmt: skip
    for numbers, condition in combinations:
        if condition == sympy.false:
            continue
        # A number before a tensor: torch takes it as a tensor without dimensions, and promotes dtypes alike.
        arguments = [
            torch.tensor([n], dtype=d) if d is not None else n if place else torch.tensor(n)
            for place, (n, d) in enumerate(zip(numbers, dtypes, strict=True))
        ]
        result = function(*arguments)
        pairs.append((torch.as_tensor(result).item(), condition))
    found = Choices.of(pairs)
    return _boolean(found) if all(isinstance(n, bool) for n, _ in pairs) else found
