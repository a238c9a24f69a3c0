"""Views as maps of indices: which element of its input each element of a view, an expansion or a repetition is.

Indices are sympy expressions. Following ``k`` from attention back to where its heads were repeated, or a mask back to
the ``arange`` that it is made of, is one walk: ask at which index the input is read.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import sympy
from torch.fx.node import Node

from inductor_passes.recognise.graph_values import example, name_of, shape_of, size_of

Index: TypeAlias = tuple[sympy.Expr, ...]


class Unreadable(Exception):
    """Raised where a graph does not say what a value is; its text is the reason."""


class Unknown(Unreadable):
    """Raised for a node that no rule knows, such as an input of the graph."""


def require(condition: object, reason: str) -> None:
    """Raise ``Unreadable`` unless the condition is true."""
    if condition is not True and condition != sympy.true:
        raise Unreadable(reason)


def input_index(node: Node, index: Sequence[sympy.Expr]) -> tuple[Node, Index]:
    """The node that a view reads, and at which index for its element ``index``.

    Raises ``Unreadable`` where the node is no view, expansion or repetition that is known here.
    """
    rule = RULES.get(name_of(node))
    if rule is None or node.op not in ("call_function", "call_method"):
        raise Unknown(f"{node.name} is made by {name_of(node)}, which is not known here")
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or not hasattr(example(source), "shape"):
        raise Unreadable(f"{node.name} reads no tensor")
    require(example(source).dtype == example(node).dtype, f"{node.name} reads memory as another dtype")
    bound = arguments_of(rule, node, tuple(index), source, *node.args[1:], **node.kwargs)
    found = rule(*bound.args, **bound.kwargs)
    return source, at_ones(found, shape_of(source))


def arguments_of(rule: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """A node's arguments as a rule's; ``Unreadable`` where the rule does not know them."""
    try:
        return inspect.signature(rule).bind(*arguments, **keywords)
    except TypeError as error:
        raise Unreadable(f"arguments that are not known here: {error}") from None


def at_ones(index: Sequence[sympy.Expr], shape: Sequence[sympy.Expr]) -> Index:
    """The index with 0 where there is one element."""
    require(len(index) == len(shape), "an index of another rank")
    return tuple(sympy.S.Zero if size == 1 else i for i, size in zip(index, shape, strict=True))


def within(index: Sequence[sympy.Expr], lengths: Mapping[sympy.Symbol, sympy.Expr]) -> Index:
    """The index, where each symbol is less than its length: ``h % H`` is ``h``, and ``h // H`` is 0."""

    def settled(e: sympy.Expr) -> sympy.Expr:
        number, size = e.args if isinstance(e, sympy.Mod) else e.args[0].as_numer_denom()
        if number not in lengths or (lengths[number] <= size) != sympy.true:
            return e
        return number if isinstance(e, sympy.Mod) else sympy.S.Zero

    return tuple(sympy.expand(i.replace(lambda e: isinstance(e, (sympy.Mod, sympy.floor)), settled)) for i in index)


def _same(node: Node, index: Index, source: Node, *_: Any, **__: Any) -> Index:
    return index


def _number(value: Any, what: str) -> sympy.Expr:
    size = size_of(value)
    if size is None:
        raise Unreadable(f"{what} is no integer that the graph knows")
    return size


def _axis(value: Any, rank: int) -> int:
    axis = _number(value, "a dimension")
    require(axis.is_Integer, "a dimension that is not constant")
    return int(axis) % rank


def _expand(node: Node, index: Index, source: Node, *_: Any, **__: Any) -> Index:
    """Aligned at the right; ``at_ones`` does the rest."""
    return index[len(index) - len(shape_of(source)) :]


def _expand_as(node: Node, index: Index, source: Node, other: Any) -> Index:
    return _expand(node, index, source)


def _unsqueeze(node: Node, index: Index, source: Node, dim: Any) -> Index:
    axis = _axis(dim, len(index))
    return index[:axis] + index[axis + 1 :]


def _transpose(node: Node, index: Index, source: Node, dim0: Any, dim1: Any) -> Index:
    one, other = _axis(dim0, len(index)), _axis(dim1, len(index))
    moved = list(index)
    moved[one], moved[other] = moved[other], moved[one]
    return tuple(moved)


def _t(node: Node, index: Index, source: Node) -> Index:
    return index[::-1]


def _permute(node: Node, index: Index, source: Node, *dims: Any) -> Index:
    order = [_axis(d, len(index)) for d in (dims[0] if isinstance(dims[0], (list, tuple)) else dims)]
    found = dict(zip(order, index, strict=True))
    return tuple(found[axis] for axis in range(len(index)))


def _getattr(node: Node, index: Index, source: Node, name: str) -> Index:
    if name == "mT":
        return _mt(node, index, source)
    if name == "T" and len(index) == 2:
        return index[::-1]
    raise Unreadable(f"{node.name} reads the attribute {name}")


def _mt(node: Node, index: Index, source: Node) -> Index:
    return (*index[:-2], index[-1], index[-2])


def _select(node: Node, index: Index, source: Node, dim: Any, at: Any) -> Index:
    shape = shape_of(source)
    axis = _axis(dim, len(shape))
    return (*index[:axis], _within(_number(at, "an index"), shape[axis]), *index[axis:])


def _within(at: sympy.Expr, size: sympy.Expr) -> sympy.Expr:
    """A Python index from the front."""
    if (at >= 0) == sympy.true:
        return at
    require(at < 0, "an index that may count from either end")
    return at + size


def _narrow(node: Node, index: Index, source: Node, dim: Any, start: Any, length: Any) -> Index:
    return _slice(node, index, source, dim, start, None)


def _slice(
    node: Node, index: Index, source: Node, dim: Any = 0, start: Any = None, end: Any = None, step: Any = 1
) -> Index:
    axis = _axis(dim, len(index))
    moved = list(index)
    moved[axis] = _from_slice(index[axis], slice(start, end, step), shape_of(source)[axis])
    return tuple(moved)


def _from_slice(at: sympy.Expr, part: slice, size: sympy.Expr) -> sympy.Expr:
    step = sympy.S.One if part.step is None else _number(part.step, "a step")
    require(step >= 1, "a step backwards")
    if part.start is None:
        return at * step
    start = _number(part.start, "the start of a slice")
    if (start >= 0) != sympy.true:
        require(start < 0, "a slice that may start at either end")
        require(start + size >= 0, "a slice that may start before the first element")
        start = start + size
    return start + at * step


def _getitem(node: Node, index: Index, source: Node, item: Any) -> Index:
    items = list(item) if isinstance(item, (list, tuple)) else [item]
    shape = shape_of(source)
    taken = sum(1 for i in items if i is not None and i is not Ellipsis)
    if Ellipsis in [i for i in items if i is None or i is Ellipsis]:
        place = next(n for n, i in enumerate(items) if i is Ellipsis)
        items[place : place + 1] = [slice(None)] * (len(shape) - taken)
    else:
        items += [slice(None)] * (len(shape) - taken)
    left, sizes, found = list(index), list(shape), []
    for i in items:
        if i is None:
            left.pop(0)
        elif isinstance(i, slice):
            found.append(_from_slice(left.pop(0), i, sizes.pop(0)))
        else:
            found.append(_within(_number(i, f"an index of {node.name}"), sizes.pop(0)))
    require(not left, "an index of another rank")
    return tuple(found)


def _repeat(node: Node, index: Index, source: Node, *sizes: Any) -> Index:
    """Only where what is repeated has one element, or is repeated once: else it starts again and again."""
    times = [_number(s, "a repetition") for s in (sizes[0] if isinstance(sizes[0], (list, tuple)) else sizes)]
    shape = shape_of(source)
    lead = len(times) - len(shape)
    for size, count in zip(shape, times[lead:], strict=True):
        require(size == 1 or count == 1, f"{node.name} repeats whole dimensions, one after another")
    return index[lead:]


def _repeat_interleave(node: Node, index: Index, source: Node, repeats: Any, dim: Any = None, **_: Any) -> Index:
    require(dim is not None, f"{node.name} flattens what it repeats")
    times, axis = _number(repeats, "a repetition"), _axis(dim, len(index))
    require(times >= 1, "a repetition of nothing")
    moved = list(index)
    moved[axis] = sympy.floor(index[axis] / times)
    return tuple(moved)


def _reshape(node: Node, index: Index, source: Node, *_: Any, **__: Any) -> Index:
    """Dimensions split, joined or kept, from the left; a split or joined run has constant sizes but its first."""
    old, new = list(shape_of(source)), list(shape_of(node))
    left, found = list(index), []
    while old or new:
        if old and old[0] == 1:
            old.pop(0)
            found.append(sympy.S.Zero)
        elif new and new[0] == 1:
            new.pop(0)
            left.pop(0)
        elif old and new and old[0] == new[0]:
            old.pop(0)
            new.pop(0)
            found.append(left.pop(0))
        else:
            sizes, joined = _run(old, new)
            if joined:  # one new dimension holds several old ones
                found += _digits(left.pop(0), sizes)
                del old[: len(sizes)], new[:1]
            else:
                at = sympy.S.Zero
                for size in sizes:
                    at = at * size + left.pop(0)
                found.append(at)
                del new[: len(sizes)], old[:1]
    return tuple(found)


def _run(old: list[sympy.Expr], new: list[sympy.Expr]) -> tuple[list[sympy.Expr], bool]:
    """The sizes on the longer side that make up the first size on the other, and whether the longer side is ``old``."""
    for shorter, longer, joined in ((new, old, True), (old, new, False)):
        for count in range(2, len(longer) + 1):
            if shorter and sympy.expand(sympy.Mul(*longer[:count]) - shorter[0]) == 0:
                return longer[:count], joined
    raise Unreadable("a reshape that neither splits nor joins whole dimensions")


def _digits(at: sympy.Expr, sizes: list[sympy.Expr]) -> list[sympy.Expr]:
    """An index into several dimensions at once as one index each."""
    digits: list[sympy.Expr] = []
    for n, size in enumerate(reversed(sizes)):
        last = n == len(sizes) - 1
        digits.insert(0, at if last else sympy.Mod(at, size))
        at = at if last else sympy.floor(at / size)
    return digits


RULES: dict[str, Callable[..., Index]] = {
    "expand": _expand, "broadcast_to": _expand, "expand_as": _expand_as, "unsqueeze": _unsqueeze,
    "transpose": _transpose, "swapaxes": _transpose, "swapdims": _transpose, "t": _t, "numpy_T": _t, "mT": _mt,
    "permute": _permute,
    "getattr": _getattr, "select": _select, "narrow": _narrow, "slice": _slice, "getitem": _getitem,
    "repeat": _repeat, "repeat_interleave": _repeat_interleave, "reshape": _reshape, "view": _reshape,
    "view_as": _reshape, "reshape_as": _reshape, "squeeze": _reshape, "flatten": _reshape, "unflatten": _reshape,
    "contiguous": _same, "clone": _same, "detach": _same, "alias": _same,
}  # fmt: skip
