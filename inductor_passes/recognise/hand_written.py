"""Attention written out: two products with a softmax between them.

    softmax(mask(scale * q k^T), -1) v    over [B, H, L, D], or [N, L, D] with heads folded into requests

``products.py`` says which products. Read from the softmax back to the first one, scores may be cast, hidden (a mask
added, ``masked_fill``, ``where``), capped (``cap * tanh(scores / cap)``) and scaled, in this order, and their heads
folded and unfolded anywhere. Weights may be cast, folded and unfolded too, and dropped out with a probability of 0 or
outside of training; nothing else may read them. A query that sees no key has NaN for its output, or the mean of all
values, where a form gives 0: so it must be proved that there is none.

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
from inductor_passes.recognise.candidate import IN_ORDER, Axes, Candidate, Refused
from inductor_passes.recognise.graph_values import Writes, drops_nothing, example, name_of, number_of, shape_of
from inductor_passes.recognise.indexing import Index, Unreadable, at_ones, input_index, require, within
from inductor_passes.recognise.mask_values import HEAD as QUERY_HEAD
from inductor_passes.recognise.mask_values import REQUEST, MaskReader, choices, converted, hides_by_numbers
from inductor_passes.recognise.products import (
    PRODUCTS,
    SCORE_PRODUCTS,
    Placed,
    Product,
    factors_of,
    placed,
    product_of,
)
from inductor_passes.recognise.repeated_kv import FEATURE

NAME = "softmax(q @ k^T) @ v"
_CASTS = ("to", "float", "type_as", "half", "bfloat16", "double", "type")
_VIEWS = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze")


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


def _softmax_before(node: Node) -> Node | None:
    """The softmax that makes the weights of a product, through casts, views and dropout."""
    factors = factors_of(node) if _is_call(node, *SCORE_PRODUCTS) else []
    weights: Any = factors[0] if len(factors) == 2 else None
    while _is_call(weights, "dropout", *_CASTS, *_VIEWS) and weights.args:
        weights = weights.args[0]
    return weights if _is_call(weights, "softmax") else None


_MULTIPLIES, _DIVIDES = ("mul", "multiply"), ("div", "divide", "truediv", "true_divide")
_STEPS = ("add", "masked_fill", "where", "tanh", *_MULTIPLIES, *_DIVIDES, *_CASTS, *_VIEWS)


def _product_before(softmax: Node) -> Node | None:
    """A product from which the softmax's input comes step by step; None where these are no scores of attention."""
    return next((n for n in _behind(softmax) if len(factors_of(n)) == 2), None)


def _tensors(node: Node) -> list[Node]:
    return [n for n in node.all_input_nodes if isinstance(example(n), torch.Tensor)]


def _behind(node: Node) -> Iterator[Node]:
    """Every product from which ``node`` comes by steps that scores may take."""
    waiting, seen = _tensors(node), set()
    while waiting:
        one = waiting.pop()
        if _is_call(one, *SCORE_PRODUCTS):
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


class _Places:
    """At which request, head, query and key each element of scores, weights and output stands."""

    def __init__(self, query: Placed) -> None:
        batch, self._heads, _, _ = query.sizes
        self.request = REQUEST if batch != 1 else sympy.S.Zero
        self.head = QUERY_HEAD if self._heads != 1 else sympy.S.Zero

    def index(self, node: Node, row: sympy.Symbol = q, column: sympy.Symbol = k) -> Index:
        """The index of an element ``[B, H, row, column]`` or ``[N, row, column]``."""
        shape = shape_of(node)
        if len(shape) == 4:
            return at_ones((self.request, self.head, row, column), shape)
        require(len(shape) == 3, f"{node.name} has {len(shape)} dimensions where scores have 3 or 4")
        return at_ones((self.request * self._heads + self.head, row, column), shape)

    def folds(self, view: Node, row: sympy.Symbol = q, column: sympy.Symbol = k) -> bool:
        """Whether a view does no more than to fold heads into requests, or to unfold them."""
        try:
            source, at = input_index(view, self.index(view, row, column))
            return within(at, {QUERY_HEAD: self._heads}) == self.index(source, row, column)
        except Unreadable:
            return False

    def reader(self, writes: Writes, query: Placed, key: Placed) -> MaskReader:
        lengths = {"batch": query.sizes[0], "query_len": query.sizes[2], "key_len": key.sizes[2]}
        return MaskReader(writes, heads=self._heads, **lengths)


def _candidate(node: Node, softmax: Node, scores_product: Node, writes: Writes) -> Candidate:
    require(_is_call(node, *PRODUCTS), f"{node.name} adds to the output of attention")
    first, second = product_of(scores_product), product_of(node)
    ordered = first.result in ("bhij", "nij") and second.left.letters in ("bhix", "nix")
    require(ordered, f"scores or weights of {node.name} are no [B, H, L, L] or [N, L, L]")
    query, key, value = placed([(first.left, "ix"), (first.right, "jx"), (second.right, "xj")], node, writes)
    tensors = (query.node, key.node, value.node)
    require(len({example(t).dtype for t in tensors}) == 1, "q, k and v of several dtypes")
    for tensor in tensors:
        written = writes.between(tensor, scores_product, node)
        require(not written, f"{tensor.name} is written to before its attention ends")
    places = _Places(query)
    for weights in _back(node, second.left.node, softmax):
        require(not _is_call(weights, "dropout") or drops_nothing(weights), "dropout, which no form has")
        require(not _is_call(weights, *_VIEWS) or places.folds(weights), f"{weights.name} rearranges weights")
    reader = places.reader(writes, query, key)
    scores = _scores(softmax, scores_product, first, places, reader)
    seen = reader.visibility(scores.visible)
    replaced, out_axes = _output(node, second, places)
    return Candidate(
        op=NAME, node=node, replaced=dict.fromkeys(replaced, 0), query=query.node, key=key.node, value=value.node,
        visible=seen.visible, tensors=seen.tensors, scale=scores.scale, finite=True, softcap=scores.softcap,
        axes=(query.axes, key.axes, value.axes), out_axes=out_axes,
    )  # fmt: skip


def _back(reader: Node, node: Node, last: Node) -> Iterator[Node]:
    """The nodes from ``node`` back to ``last``, each of which only the one before reads."""
    while True:
        require(set(node.users) == {reader}, f"{node.name}, scores or weights, is read by something else as well")
        yield node
        if node is last:
            return
        reader, node = node, node.args[0]  # type: ignore[assignment]


def _output(node: Node, product: Product, places: _Places) -> tuple[list[Node], Axes]:
    """What is replaced by attention's output, and how that lies."""
    if len(product.result) == 4:
        return [node], tuple(product.result.index(c) for c in "bhij")
    views = [user for user in node.users if _is_call(user, *_VIEWS)]
    if views and len(views) == len(node.users) and all(_unfolds(view, places) for view in views):
        return views, IN_ORDER
    return [node], (product.result.index("n"), None, product.result.index("i"), product.result.index("j"))


def _unfolds(view: Node, places: _Places) -> bool:
    return len(shape_of(view)) == 4 and places.folds(view, column=FEATURE)


# ---------------------------------------------------------------------- scores


def _scores(softmax: Node, node_of: Node, product: Product, places: _Places, reader: MaskReader) -> _Scores:
    """What happens to scores between the product, which ``node_of`` computes, and the softmax."""

    given = dict(zip(("input", "dim"), softmax.args, strict=False)) | softmax.kwargs
    after, dim = given["input"], given.get("dim")
    require(dim in (-1, example(softmax).dim() - 1), f"{softmax.name} is not over the keys")
    found = _Scores()
    user, scaled = softmax, False
    node: Any = after
    while node is not node_of:
        alone = isinstance(node, Node) and set(node.users) == {user}
        require(alone, f"scores before {user.name} are read elsewhere too")
        user, name = node, name_of(node)
        if name in _CASTS:
            require(example(node).dtype.is_floating_point, f"{node.name} rounds scores")
            node = node.args[0]
        elif name in _VIEWS:
            require(places.folds(node), f"{node.name} rearranges scores")
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
            node = _hidden(node, found, reader, node_of, places)
    require(set(node_of.users) == {user}, f"scores of {node_of.name} are read elsewhere too")
    if product.added is not None:
        visible = _added(node_of, product.added, reader, places)
        require(visible == sympy.true or not scaled, f"{node_of.name} hides scores that are scaled afterwards")
        found.visible = sympy.And(found.visible, visible)
    scale = number_of(product.scale)
    if scale is None or not 0 < scale < math.inf:
        raise Unreadable(f"{node_of.name} scales scores by no positive constant")
    found.scale *= scale
    return found


def _added(node: Node, mask: Any, reader: MaskReader, places: _Places) -> Any:
    """Where a mask that ``node`` adds to scores hides none."""
    fake = example(mask)
    require(isinstance(mask, Node) and isinstance(fake, torch.Tensor), f"{node.name} adds a number to scores")
    added = choices(reader.broadcast(mask, places.index(node), node))
    hides_by_numbers(added, fake.dtype)
    return added.get(0.0, sympy.false)


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


def _hidden(node: Node, found: _Scores, reader: MaskReader, product: Node, places: _Places) -> Any:
    """Reads one step that hides scores; returns the scores before it."""
    name = name_of(node)
    scores: Any
    mask: Any
    visible: Any
    if name == "add" and len(node.args) == 2 and not node.kwargs:
        one, other = node.args
        scores, mask = (one, other) if _leads_to(one, product) else (other, one)
        visible = _added(node, mask, reader, places)
    elif name == "masked_fill" and len(node.args) == 3 and not node.kwargs:
        scores, mask, number = node.args
        _require_hiding(number, node)
        visible = sympy.Not(converted(reader.broadcast(mask, places.index(node), node), torch.bool))
    elif name == "where" and len(node.args) == 3 and not node.kwargs:
        mask, scores, number = node.args if node.op == "call_function" else (node.args[i] for i in (1, 0, 2))
        _require_hiding(number, node)
        visible = converted(reader.broadcast(mask, places.index(node), node), torch.bool)
    else:
        raise Unreadable(f"{node.name} does to scores what no form does")
    require(_leads_to(scores, product), f"{node.name} does to scores what no form does")
    require(shape_of(node) == shape_of(scores), f"{node.name} broadcasts scores")
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
