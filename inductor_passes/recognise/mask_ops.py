"""What each op that masks are made of does to one element of a tensor. ``OPS`` has a rule a name.

A rule takes the reader, the node, the index of the element and the node's own arguments, and gives the element's value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch.fx.node import Node

from inductor_passes.recognise.graph_values import example, name_of, shape_of, size_of
from inductor_passes.recognise.indexing import Index, Unreadable, require
from inductor_passes.recognise.mask_values import (
    INTEGERS,
    Choices,
    MaskReader,
    Value,
    choices,
    computed,
    converted,
    is_condition,
)

Rule = Callable[..., Value]

_COMPARISONS: dict[str, Any] = {
    "eq": sympy.Eq, "ne": sympy.Ne, "lt": sympy.Lt, "le": sympy.Le, "gt": sympy.Gt, "ge": sympy.Ge,
    "less": sympy.Lt, "less_equal": sympy.Le, "greater": sympy.Gt, "greater_equal": sympy.Ge, "not_equal": sympy.Ne,
}  # fmt: skip
_ARITHMETIC: dict[str, Callable[[sympy.Expr, sympy.Expr], sympy.Expr]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "rsub": lambda a, b: b - a,
    "subtract": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "multiply": lambda a, b: a * b,
    "maximum": sympy.Max,
    "minimum": sympy.Min,
    "floor_divide": lambda a, b: _divided(a, b, sympy.floor(a / b)),
    "remainder": lambda a, b: _divided(a, b, sympy.Mod(a, b)),
}
_LOGIC: dict[str, Callable[..., Any]] = {
    "and": sympy.And,
    "or": sympy.Or,
    "xor": lambda a, b: sympy.Or(sympy.And(a, sympy.Not(b)), sympy.And(b, sympy.Not(a))),
}


def _divided(dividend: sympy.Expr, divisor: sympy.Expr, result: sympy.Expr) -> sympy.Expr:
    require(divisor > 0, f"a division by {divisor}")
    return result


def _dtype(value: Any) -> torch.dtype | None:
    """A tensor's dtype; None for a number."""
    value = example(value)
    return value.dtype if isinstance(value, torch.Tensor) else None


def _is_integer(value: Value, of: Any) -> bool:
    return not isinstance(value, Choices) and not is_condition(value) and (_dtype(of) in (None, *INTEGERS))


def _binary(reader: MaskReader, node: Node, index: Index, one: Any, other: Any) -> tuple[Value, Value]:
    return reader.broadcast(one, index, node), reader.broadcast(other, index, node)


def _by_torch(node: Node, one: Any, other: Any, values: tuple[Value, Value]) -> Value:
    function = getattr(torch, name_of(node))
    return computed(function, (_dtype(one), _dtype(other)), *values)


def _compare(reader: MaskReader, node: Node, index: Index, input: Any, other: Any) -> Value:
    values = one, two = _binary(reader, node, index, input, other)
    if _is_integer(one, input) and _is_integer(two, other):
        return _COMPARISONS[name_of(node)](one, two)
    if is_condition(one) and is_condition(two) and name_of(node) in ("eq", "ne", "not_equal"):
        differ = _LOGIC["xor"](one, two)
        return sympy.Not(differ) if name_of(node) == "eq" else differ
    return _by_torch(node, input, other, values)


def _calculate(reader: MaskReader, node: Node, index: Index, input: Any, other: Any) -> Value:
    values = one, two = _binary(reader, node, index, input, other)
    if _is_integer(one, input) and _is_integer(two, other) and _dtype(node) in INTEGERS:
        return _ARITHMETIC[name_of(node)](one, two)
    result = _by_torch(node, input, other, values)
    # Dtypes follow torch's rules for tensors of one element, which do not know which inputs have no dimensions.
    return converted(result, example(node).dtype)


def _divide(reader: MaskReader, node: Node, index: Index, input: Any, other: Any, *, rounding_mode: str) -> Value:
    require(rounding_mode == "floor" and _dtype(node) in INTEGERS, f"{node.name} divides with fractions")
    one, two = _binary(reader, node, index, input, other)
    require(_is_integer(one, input) and _is_integer(two, other), f"{node.name} divides what may be no integers")
    return _ARITHMETIC["floor_divide"](one, two)  # type: ignore[arg-type]


def _signed(reader: MaskReader, node: Node, index: Index, input: Any) -> Value:
    value = reader.at(input, index, node)
    if _is_integer(value, input):
        return -value if name_of(node) in ("neg", "negative") else sympy.Abs(value)  # type: ignore[operator]
    return computed(getattr(torch, name_of(node)), (_dtype(input),), value)


def _logic(reader: MaskReader, node: Node, index: Index, input: Any, other: Any) -> Value:
    name = name_of(node)
    one, two = _binary(reader, node, index, input, other)
    if name.startswith("bitwise_") and example(node).dtype != torch.bool:
        return _by_torch(node, input, other, (one, two))
    kind = name.rpartition("_")[2]
    return _LOGIC[kind](converted(one, torch.bool), converted(two, torch.bool))


def _not(reader: MaskReader, node: Node, index: Index, input: Any) -> Value:
    value = reader.at(input, index, node)
    if name_of(node) == "bitwise_not" and example(node).dtype != torch.bool:
        return computed(torch.bitwise_not, (_dtype(input),), value)
    return sympy.Not(converted(value, torch.bool))


def _cast(reader: MaskReader, node: Node, index: Index, input: Any, *_: Any, **__: Any) -> Value:
    """``to``, ``float``, ``type_as``: the node's own dtype says what it did."""
    return converted(reader.at(input, index, node), example(node).dtype)


def _arange(
    reader: MaskReader, node: Node, index: Index, start: Any = 0, end: Any = None, step: Any = 1, **_: Any
) -> Value:
    require(example(node).dtype in INTEGERS, f"{node.name} counts in {example(node).dtype}")
    first, by = size_of(0 if end is None and "end" not in node.kwargs and len(node.args) < 2 else start), size_of(step)
    require(first is not None and by is not None, f"{node.name} counts from or by a value")
    return first + by * index[0]  # type: ignore[operator]


def _triangle(lower: bool) -> Rule:
    def rule(reader: MaskReader, node: Node, index: Index, input: Any, diagonal: Any = 0) -> Value:
        offset = size_of(diagonal)
        if offset is None:
            raise Unreadable(f"{node.name} is cut at a diagonal that the graph does not know")
        row, column = index[-2:]
        kept = column - row <= offset if lower else column - row >= offset
        value = reader.at(input, index, node)
        if is_condition(value):
            return sympy.And(kept, value)
        return _chosen(kept, choices(value), choices(sympy.S.Zero))

    return rule


def _chosen(condition: sympy.Basic, one: Choices, other: Choices) -> Value:
    without = sympy.Not(condition)
    return Choices.of(
        [(n, sympy.And(condition, c)) for n, c in one.items()] + [(n, sympy.And(without, c)) for n, c in other.items()]
    )


def _where(reader: MaskReader, node: Node, index: Index, condition: Any, input: Any, other: Any) -> Value:
    chosen = converted(reader.broadcast(condition, index, node), torch.bool)
    one, two = (converted(v, example(node).dtype) for v in _binary(reader, node, index, input, other))
    if one == two:
        return one
    if is_condition(one) and is_condition(two):
        return sympy.Or(sympy.And(chosen, one), sympy.And(sympy.Not(chosen), two))
    return _chosen(chosen, choices(one), choices(two))


def _where_method(reader: MaskReader, node: Node, index: Index, *arguments: Any, **keywords: Any) -> Value:
    """``torch.where(condition, input, other)``, or ``input.where(condition, other)``."""
    if node.op == "call_method":
        input, condition, *others = arguments
        return _where(reader, node, index, condition, input, *others, **keywords)
    return _where(reader, node, index, *arguments, **keywords)


def _masked_fill(reader: MaskReader, node: Node, index: Index, input: Any, mask: Any, value: Any) -> Value:
    return _where(reader, node, index, mask, value, input)


def _constant(number: Any) -> Rule:
    def rule(reader: MaskReader, node: Node, index: Index, *_: Any, **__: Any) -> Value:
        return converted(sympy.Integer(number), example(node).dtype)

    return rule


def _full(reader: MaskReader, node: Node, index: Index, size: Any, fill_value: Any, **_: Any) -> Value:
    """``full``, ``full_like`` and ``scalar_tensor``'s like: every element is the number."""
    return _filled(reader, node, fill_value)


def _new_full(reader: MaskReader, node: Node, index: Index, input: Any, size: Any, fill_value: Any, **_: Any) -> Value:
    return _filled(reader, node, fill_value)


def _fill(reader: MaskReader, node: Node, index: Index, input: Any, value: Any) -> Value:
    return _filled(reader, node, value)


def _tensor(reader: MaskReader, node: Node, index: Index, data: Any, **_: Any) -> Value:
    require(not shape_of(node), f"{node.name} is a list of numbers")
    return _filled(reader, node, data)


def _lifted(reader: MaskReader, node: Node, index: Index, input: Any) -> Value:
    """``torch.tensor(0.0)`` in an exported program: a copy of a constant that the program holds."""
    constant = getattr(node.graph.owning_module, str(input.target), None) if input.op == "get_attr" else None
    if type(constant) is not torch.Tensor or constant.numel() != 1:
        raise Unreadable(f"{node.name} is no constant of one number")
    return _filled(reader, node, constant.item())


def _filled(reader: MaskReader, node: Node, value: Any) -> Value:
    return converted(reader.broadcast(value, (), node), example(node).dtype)


def _getitem(reader: MaskReader, node: Node, index: Index, input: Any, items: Any) -> Value:
    """``documents[b, q]``: elements looked up at computed numbers, which are broadcast to one another; or a view."""
    items = list(items) if isinstance(items, (list, tuple)) else [items]
    ranks = [example(i).dim() for i in items if isinstance(example(i), torch.Tensor)]
    numbers = [i for i in items if isinstance(i, (Node, int)) and not isinstance(i, bool)]
    if not isinstance(input, Node) or not ranks or len(numbers) < len(items):
        return reader.view(node, index)
    rank = max(ranks)
    found = [_position(reader, node, item, index[:rank]) for item in items]
    return reader.at(input, (*found, *index[rank:]), node)


def _position(reader: MaskReader, node: Node, item: Any, index: Index) -> sympy.Expr:
    """One of the numbers that a tensor is indexed by, which count from its first element."""
    require(_dtype(item) in (None, *INTEGERS), f"{node.name} is indexed by {_dtype(item)}")
    value = reader.broadcast(item, index, node)
    counted = _is_integer(value, item) and (value >= 0) == sympy.true  # type: ignore[operator]
    require(counted, f"{node.name} is indexed by what may be negative")
    return value  # type: ignore[return-value]


def _cumsum(reader: MaskReader, node: Node, index: Index, input: Any, dim: Any, **_: Any) -> Value:
    """Of one number again and again: so many of it as there are elements up to this one."""
    axis, one = _along(node, index, dim)
    value: Any = converted(reader.at(input, _moved(index, axis, one), node), example(node).dtype)
    require(_is_integer(value, node) and one not in value.free_symbols, f"{node.name} sums up different numbers")
    return value * (index[axis] + 1)


def _diff(
    reader: MaskReader, node: Node, index: Index, input: Any, n: Any = 1, dim: Any = -1, prepend: Any = None,
    append: Any = None,
) -> Value:  # fmt: skip
    """Each element less the one before; before the first one stands ``prepend``.

    ``prepend`` must continue the elements backwards, so that one expression is what stands before each of them.
    """
    require(n == 1 and append is None, f"{node.name} is taken in a way that is not known here")
    axis, one = _along(node, index, dim)

    def element(of: Any, at: sympy.Expr) -> sympy.Expr:
        value = reader.at(of, _moved(index, axis, at), node)
        require(_is_integer(value, of), f"{node.name} is a difference of what may be no integers")
        return value  # type: ignore[return-value]

    at = index[axis]
    if prepend is None:
        return element(input, at + 1) - element(input, at)
    require(shape_of(prepend)[axis] == 1, f"{node.name} has more than one element prepended")
    first = element(prepend, sympy.S.Zero)
    if at == 0:
        return element(input, at) - first
    every = element(input, one)
    continued = sympy.expand(every.xreplace({one: sympy.S.NegativeOne}) - first) == 0
    require(continued, f"{node.name} prepends what does not continue its input")
    return element(input, at) - every.xreplace({one: at - 1})


def _along(node: Node, index: Index, dim: Any) -> tuple[int, sympy.Symbol]:
    """The dimension that a rule looks along, and a symbol for any index in it."""
    axis = size_of(dim)
    known = axis is not None and bool(axis.is_Integer) and _dtype(node) in INTEGERS
    require(known, f"{node.name} is taken in a way that is not known here")
    return int(axis) % len(index), sympy.Dummy("at", integer=True, nonnegative=True)  # type: ignore[arg-type]


def _moved(index: Index, axis: int, at: sympy.Expr) -> Index:
    return (*index[:axis], at, *index[axis + 1 :])


def _eye(reader: MaskReader, node: Node, index: Index, *_: Any, **__: Any) -> Value:
    return converted(sympy.Eq(index[0], index[1]), example(node).dtype)


OPS: dict[str, Rule] = {
    **dict.fromkeys(_COMPARISONS, _compare),
    **dict.fromkeys(_ARITHMETIC, _calculate),
    **{f"{how}_{kind}": _logic for how in ("bitwise", "logical") for kind in _LOGIC},
    **dict.fromkeys(("bitwise_not", "logical_not"), _not),
    **dict.fromkeys(("to", "type", "type_as", "bool", "int", "long", "float", "half", "bfloat16", "double", "cpu",
                     "cuda", "_to_copy"), _cast),
    **dict.fromkeys(("div", "divide"), _divide),
    **dict.fromkeys(("neg", "negative", "abs", "absolute"), _signed),
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), _constant(0)),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), _constant(1)),
    **dict.fromkeys(("full", "full_like"), _full),
    "new_full": _new_full,
    "fill": _fill,
    "tensor": _tensor,
    "scalar_tensor": _tensor,
    "lift_fresh_copy": _lifted,
    "arange": _arange,
    "cumsum": _cumsum,
    "diff": _diff,
    **dict.fromkeys(("getitem", "index"), _getitem),
    "eye": _eye,
    "tril": _triangle(lower=True),
    "triu": _triangle(lower=False),
    "where": _where_method,
    "masked_fill": _masked_fill,
}  # fmt: skip
