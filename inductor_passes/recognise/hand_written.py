"""Attention written out: two products with a softmax between them.

    softmax(mask(scale * q k^T), -1) v    over [B, H, L, D]

Products are ``matmul``, ``@`` or ``einsum`` over ``[B, H, L, D]``. Read from the softmax back to the first product,
scores may be cast, hidden (a mask added, ``masked_fill``, ``where``), capped (``cap * tanh(scores / cap)``) and scaled,
in this order. Weights may be cast, and dropped out with a probability of 0 or outside of training; nothing else may
read them. A query that sees no key has NaN for its output, or the mean of all values, where a form gives 0: so it must
be proved that there is none.

Source: Vaswani et al., "Attention Is All You Need", section 3.2.1, https://arxiv.org/abs/1706.03762.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch.fx.node import Node

from custom_ops.masks import k, q
from inductor_passes.recognise.candidate import Candidate, Refused
from inductor_passes.recognise.graph_values import Writes, drops_nothing, example, name_of, number_of, shape_of
from inductor_passes.recognise.indexing import Unreadable, input_index, require
from inductor_passes.recognise.mask_values import HEAD as QUERY_HEAD
from inductor_passes.recognise.mask_values import REQUEST, MaskReader, Visibility, choices, converted, hides_by_numbers
from inductor_passes.recognise.repeated_kv import BATCH, FEATURE, HEAD, TOKEN

NAME = "softmax(q @ k^T) @ v"
_CASTS = ("to", "float", "type_as", "half", "bfloat16", "double", "type")
_PRODUCTS = ("matmul", "einsum")


def find(graph: torch.fx.Graph, writes: Writes) -> Iterator[Candidate | Refused]:
    """Every product with a softmax of a product, or why it is not one of the forms."""
    for node in list(graph.nodes):
        softmax = _softmax_before(node)
        product = None if softmax is None else _product_before(softmax)
        if softmax is None or product is None:
            continue
        try:
            yield _candidate(node, softmax, product, writes)
        except Unreadable as reason:
            yield Refused(node, NAME, str(reason))


def _is_call(node: Any, *names: str) -> bool:
    return isinstance(node, Node) and node.op in ("call_function", "call_method") and name_of(node) in names


def _tensors(node: Node) -> list[Node]:
    return [n for n in node.all_input_nodes if isinstance(example(n), torch.Tensor)]


def _softmax_before(node: Node) -> Node | None:
    """The softmax that makes the weights of a product, through casts and dropout."""
    operands = _tensors(node) if _is_call(node, *_PRODUCTS) else []
    weights = operands[0] if len(operands) == 2 else None
    while _is_call(weights, "dropout", *_CASTS) and weights.args:  # type: ignore[union-attr]
        weights = weights.args[0]  # type: ignore[union-attr, assignment]
    return weights if _is_call(weights, "softmax") else None


_MULTIPLIES, _DIVIDES = ("mul", "multiply"), ("div", "divide", "truediv", "true_divide")
_STEPS = ("add", "masked_fill", "where", "tanh", *_MULTIPLIES, *_DIVIDES, *_CASTS)


def _product_before(softmax: Node) -> Node | None:
    """A product from which the softmax's input comes step by step; None where these are no scores of attention."""
    return next((n for n in _behind(softmax) if len(_tensors(n)) == 2), None)


def _behind(node: Node) -> Iterator[Node]:
    """Every product from which ``node`` comes by steps that scores may take."""
    waiting, seen = _tensors(node), set()
    while waiting:
        one = waiting.pop()
        if _is_call(one, *_PRODUCTS):
            yield one
        elif one not in seen and _is_call(one, *_STEPS):
            seen.add(one)
            waiting += _tensors(one)


def _leads_to(value: Any, product: Node) -> bool:
    return value is product or (_is_call(value, *_STEPS) and product in _behind(value))


@dataclasses.dataclass
class _Scores:
    """What was read of the way from the softmax back to the product."""

    visible: sympy.Basic = sympy.true
    scale: float = 1.0
    softcap: float = 0.0


def _candidate(node: Node, softmax: Node, product: Node, writes: Writes) -> Candidate:
    for weights in _back(node, _tensors(node)[0], softmax):
        require(not _is_call(weights, "dropout") or drops_nothing(weights), "dropout, which no form has")
    query, key = _query_and_key(product)
    value = _value(node)
    tensors = (query, key, value)
    for name, tensor in zip("qkv", tensors, strict=True):
        rank = example(tensor).dim()
        require(rank == 4, f"{name} has {rank} dimensions; forms take [B, H, S, D]")
    require(len({example(t).dtype for t in tensors}) == 1, "q, k and v of several dtypes")
    for tensor in tensors:
        require(not writes.between(tensor, product, node), f"{tensor.name} is written to before its attention ends")
    batch, _, query_len, _ = shape_of(query)
    reader = MaskReader(writes, batch=batch, query_len=query_len, key_len=shape_of(key)[2])
    scores = _scores(softmax, product, reader)
    seen: Visibility = reader.visibility(scores.visible)
    return Candidate(
        op=NAME, node=node, replaced={node: 0}, query=query, key=key, value=value, visible=seen.visible,
        tensors=seen.tensors, scale=scores.scale, finite=True, softcap=scores.softcap,
    )  # fmt: skip


def _back(reader: Node, node: Node, last: Node) -> Iterator[Node]:
    """The nodes from ``node`` back to ``last``, each of which only the one before reads."""
    while True:
        require(set(node.users) == {reader}, f"{node.name}, scores or weights, is read by something else as well")
        yield node
        if node is last:
            return
        reader, node = node, node.args[0]  # type: ignore[assignment]


def _query_and_key(product: Node) -> tuple[Node, Node]:
    query, key = _tensors(product)
    if name_of(product) == "einsum":
        (b, h, i, d), (b2, h2, j, d2), result = _equation(product)
        alike = (b, h, d) == (b2, h2, d2) and result == (b, h, i, j) and len({b, h, i, j, d}) == 5
        require(alike, f"{product.name} is no product over [B, H, L, D]")
        return query, key
    require(product.args == (query, key) and not product.kwargs, f"arguments of {product.name} that are not known here")
    require(example(key).dim() == 4, f"k has {example(key).dim()} dimensions; forms take [B, H, S, D]")
    source, index = input_index(key, (BATCH, HEAD, FEATURE, TOKEN))
    shape = shape_of(source)
    same = len(index) == 4 and all(i == j or size == 1 for i, j, size in zip(index, _IN_ORDER, shape, strict=True))
    require(same, f"{key.name} is not the transpose of [B, H, S, D]")
    return query, source


_IN_ORDER = (BATCH, HEAD, TOKEN, FEATURE)
_INDICES = (REQUEST, QUERY_HEAD, q, k)


def _value(node: Node) -> Node:
    weights, value = _tensors(node)
    if name_of(node) == "einsum":
        (b, h, i, j), (b2, h2, j2, d), result = _equation(node)
        alike = (b, h, j) == (b2, h2, j2) and result == (b, h, i, d) and len({b, h, i, j, d}) == 5
        require(alike, f"{node.name} is no product over [B, H, L, D]")
    else:
        require(node.args == (weights, value) and not node.kwargs, f"arguments of {node.name} that are not known here")
    return value


def _equation(node: Node) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    equation, *operands = node.args
    flat = list(operands[0]) if operands and isinstance(operands[0], (list, tuple)) else operands
    plain = isinstance(equation, str) and "->" in equation and "." not in equation and flat == _tensors(node)
    require(plain and not node.kwargs, f"{node.name} is spelled in a way that is not known here")
    inputs, _, result = str(equation).replace(" ", "").partition("->")
    parts = [tuple(part) for part in (*inputs.split(","), result)]
    require([len(p) for p in parts] == [4, 4, 4], f"{node.name} is no product over [B, H, L, D]")
    return parts[0], parts[1], parts[2]


# ---------------------------------------------------------------------- scores


def _scores(softmax: Node, product: Node, reader: MaskReader) -> _Scores:
    """What happens to scores between the product and the softmax."""

    given = dict(zip(("input", "dim"), softmax.args, strict=False)) | softmax.kwargs
    after, dim = given["input"], given.get("dim")
    require(dim in (-1, 3), f"{softmax.name} is not over the keys")
    found = _Scores()
    user, scaled = softmax, False
    node: Any = after
    while node is not product:
        alone = isinstance(node, Node) and set(node.users) == {user}
        require(alone, f"scores before {user.name} are read elsewhere too")
        user, name = node, name_of(node)
        if name in _CASTS:
            require(example(node).dtype.is_floating_point, f"{node.name} rounds scores")
            node = node.args[0]
        elif name in (*_MULTIPLIES, *_DIVIDES):
            node, factor = _factor(node)
            found.scale *= factor
            scaled = True
        elif name == "tanh":
            # c * tanh(f * s), with everything else multiplied into f, caps c * f * s at c.
            require(not found.softcap and len(node.args) == 1, f"{node.name} does to scores what no form does")
            found.softcap, node, scaled = found.scale, node.args[0], True
        else:
            require(not scaled, f"{node.name} hides scores that are scaled afterwards")
            node = _hidden(node, found, reader, product)
    require(set(product.users) == {user}, f"scores of {product.name} are read elsewhere too")
    return found


def _factor(node: Node) -> tuple[Any, float]:
    """What a node scales, and by which number."""
    require(len(node.args) == 2 and not node.kwargs, f"arguments of {node.name} that are not known here")
    one: Any
    other: Any
    one, other = node.args
    if number_of(one) is not None and name_of(node) in _MULTIPLIES:
        one, other = other, one
    factor = number_of(other)
    if factor is None or not 0 < factor < math.inf:
        raise Unreadable(f"{node.name} scales scores by no positive constant")
    return one, factor if name_of(node) in _MULTIPLIES else 1 / factor


def _hidden(node: Node, found: _Scores, reader: MaskReader, product: Node) -> Any:
    """Reads one step that hides scores; returns the scores before it."""
    name = name_of(node)
    scores: Any
    mask: Any
    if name == "add" and len(node.args) == 2 and not node.kwargs:
        one, other = node.args
        scores, mask = (one, other) if _leads_to(one, product) else (other, one)
        fake = example(mask)
        require(isinstance(mask, Node) and isinstance(fake, torch.Tensor), f"{node.name} adds a number to scores")
        added = choices(reader.broadcast(mask, _INDICES, node))
        hides_by_numbers(added, fake.dtype)
        visible: Any = added.get(0.0, sympy.false)
    elif name == "masked_fill" and len(node.args) == 3 and not node.kwargs:
        scores, mask, number = node.args
        _require_hiding(number, node)
        visible = sympy.Not(converted(reader.broadcast(mask, _INDICES, node), torch.bool))
    elif name == "where" and len(node.args) == 3 and not node.kwargs and node.op == "call_function":
        mask, scores, number = node.args
        _require_hiding(number, node)
        visible = converted(reader.broadcast(mask, _INDICES, node), torch.bool)
    else:
        raise Unreadable(f"{node.name} does to scores what no form does")
    require(_leads_to(scores, product), f"{node.name} does to scores what no form does")
    require(shape_of(node) == shape_of(product), f"{node.name} broadcasts scores")
    found.visible = sympy.And(found.visible, visible)
    return scores


def _require_hiding(number: Any, node: Node) -> None:
    """``number`` hides a score whatever it was; see ``hides_by_numbers``."""
    value = _filled_with(number)
    least = torch.finfo(torch.bfloat16).min
    hides = value is not None and (value == -math.inf or (value <= least and example(node).dtype != torch.float16))
    require(hides, f"{node.name} replaces scores by what may not hide them")


def _filled_with(value: Any) -> float | None:
    """A number, or that of a tensor of one number."""
    while _is_call(value, "tensor", "full", "scalar_tensor", "to"):
        value = value.args[0 if name_of(value) != "full" else 1]
    return number_of(value)
