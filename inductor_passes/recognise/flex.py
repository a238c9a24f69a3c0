"""``torch.nn.attention.flex_attention``.

    softmax(score_mod(scale * q k^T) where mask_mod(b, h, q_idx, kv_idx)) v    over [B, H, L, D]

Dynamo keeps the call as one node with the graphs of both functions. The ``score_mod`` must leave scores as they are,
cap them, ``cap * tanh(score / cap)``, or hide some, ``where(seen, score, -inf)``. ``block_masks.py`` proves that the
blocks hide nothing else. A query that sees no key gets 0, with a log-sum-exp of -inf.

Source: https://docs.pytorch.org/docs/stable/nn.attention.flex_attention.html.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import sympy
import torch
from torch.fx.node import Node

from inductor_passes.recognise.block_masks import WHOLE, Blocks, require_following
from inductor_passes.recognise.candidate import Candidate, Refused
from inductor_passes.recognise.graph_values import Writes, example, name_of, number_of, shape_of, size_of
from inductor_passes.recognise.indexing import Unreadable, require
from inductor_passes.recognise.mask_values import MaskReader, converted
from inductor_passes.recognise.scalar_masks import ModReader

NAME = "flex_attention"
LN_2 = math.log(2.0)
"""The node's log-sum-exp counts in base 2; flex_attention multiplies it by this."""


def find(graph: torch.fx.Graph, writes: Writes, trust_block_masks: bool = False) -> Iterator[Candidate | Refused]:
    """Every call of ``flex_attention``, with what its functions say or why nobody knows.

    ``trust_block_masks``: take blocks that are inputs of the graph for those of their ``mask_mod``.
    """
    for node in list(graph.nodes):
        if isinstance(node.target, torch._ops.HigherOrderOperator) and node.target.name() == NAME:
            try:
                yield _candidate(node, writes, trust_block_masks)
            except Unreadable as reason:
                yield Refused(node, NAME, str(reason))


def _candidate(node: Node, writes: Writes, trust: bool) -> Candidate:
    require(len(node.args) == 9 and not node.kwargs, "arguments that are not known here")
    arguments: tuple[Any, ...] = node.args
    query, key, value, score_mod, block_mask, scale, options, score_values, mask_values = arguments
    tensors: list[Node] = [query, key, value]
    dtypes = {example(t).dtype for t in tensors}
    require(len(dtypes) == 1, f"q, k and v of {len(dtypes)} dtypes")
    factor = number_of(scale)
    require(factor is not None, "a scale that is no constant")
    _check_options(options)
    batch, _, query_len, _ = shape_of(query)
    lengths = {"batch": batch, "query_len": query_len, "key_len": shape_of(key)[2]}
    outer = MaskReader(writes, **lengths)
    *parts, mask_mod = block_mask
    blocks = _blocks(parts, lengths)
    masked = _visible(node, mask_mod, mask_values, outer, lengths)
    seen = outer.visibility(masked)
    require_following(blocks, seen, node, writes, lengths, trust)
    capped, shown = _scores(node, score_mod, score_values, outer, lengths)
    seen = outer.visibility(sympy.And(masked, shown))
    return Candidate(
        op=NAME, node=node, replaced=_results(node), query=tensors[0], key=tensors[1], value=tensors[2],
        visible=seen.visible, tensors=seen.tensors, scale=factor, softcap=capped,
    )  # fmt: skip


def _check_options(options: Mapping[str, Any]) -> None:
    """Most of ``kernel_options`` is tuning of torch's own kernels; what is not must be as it is by default."""
    chosen = options.get("BACKEND", "AUTO")
    require(chosen == "AUTO", f"kernel_options ask for the kernel {chosen!r} by name")
    require(options.get("WRITE_DQ", True) is True, "kernel_options leave the gradient of q out")


def _blocks(parts: list[Any], lengths: Mapping[str, sympy.Expr]) -> Blocks:
    """The parts of ``BlockMask.as_tuple()`` that say which blocks the forward reads."""
    (rows, columns), numbers, tensors = parts[-2:], parts[:2], parts[2:6]
    fixed = isinstance(rows, int) and isinstance(columns, int)
    require(fixed and all(isinstance(t, Node) for t in tensors[:2]), "a BlockMask of another make")
    if (rows, columns) != (WHOLE, WHOLE):
        for number, length in zip(numbers, (lengths["query_len"], lengths["key_len"]), strict=True):
            made_for = size_of(number)
            alike = made_for is not None and sympy.expand(made_for - length) == 0
            require(alike, f"its BlockMask is made for {made_for} where there are {length}")
    return Blocks((tensors[0], tensors[1]), (tensors[2], tensors[3]), (rows, columns))


def _mod(node: Node, mod: Any) -> tuple[torch.fx.Graph, list[Node], Any]:
    """A function's own graph, its inputs and what it returns."""
    owner = node.graph.owning_module
    module = getattr(owner, str(mod.target), None) if isinstance(mod, Node) and mod.op == "get_attr" else None
    require(isinstance(module, torch.fx.GraphModule), "a function whose graph is not known")
    graph = module.graph  # type: ignore[union-attr]
    nodes = list(graph.nodes)
    result = nodes[-1].args[0]
    result = result[0] if isinstance(result, (tuple, list)) else result
    return graph, [n for n in nodes if n.op == "placeholder"], result


def _visible(
    node: Node, mask_mod: Any, values: Any, outer: MaskReader, lengths: Mapping[str, sympy.Expr]
) -> sympy.Basic:
    graph, inputs, result = _mod(node, mask_mod)
    reader = ModReader(graph, outer, node, lengths)
    reader.call(inputs[:4], inputs[4:], list(values))
    try:
        visible: Any = converted(reader.at(result, (), list(graph.nodes)[-1]), torch.bool)
        outer.visibility(visible)
    except Unreadable as reason:
        raise Unreadable(f"its mask_mod: {reason}") from None
    return visible


def _scores(
    node: Node, score_mod: Any, values: Any, outer: MaskReader, lengths: Mapping[str, sympy.Expr]
) -> tuple[float, sympy.Basic]:
    """The soft-cap of a ``score_mod``, 0 for none, and where it lets scores be."""
    graph, inputs, result = _mod(node, score_mod)
    score, *indices = inputs[:5]
    reader = ModReader(graph, outer, node, lengths)
    reader.call(indices, inputs[5:], list(values))
    shown: sympy.Basic = sympy.true
    try:
        while isinstance(result, Node) and name_of(result) == "where" and result.op == "call_function":
            condition, result, hidden = _where(result)
            require(_number(hidden) == -math.inf, "it replaces scores by numbers")
            seen: Any = converted(reader.at(condition, (), list(graph.nodes)[-1]), torch.bool)
            outer.visibility(seen)
            shown = sympy.And(shown, seen)
        return (0.0 if result is score else _soft_cap(result, score)), shown
    except Unreadable as reason:
        raise Unreadable(f"its score_mod: {reason}") from None


def _where(node: Node) -> tuple[Any, Any, Any]:
    require(len(node.args) == 3 and not node.kwargs, "it replaces scores in a way that is not known here")
    return node.args  # type: ignore[return-value]


def _soft_cap(result: Any, score: Node) -> float:
    """``cap`` of ``cap * tanh(score / cap)``."""
    factor, bent = _factor(result, "mul")
    require(isinstance(bent, Node) and name_of(bent) == "tanh" and len(bent.args) == 1, CHANGED)
    divided = bent.args[0]
    if isinstance(divided, Node) and name_of(divided) in ("div", "truediv", "true_divide"):
        scaled, divisor = divided.args
        cap = _number(divisor)
    else:
        inverse, scaled = _factor(divided, "mul")
        cap = 1 / inverse if inverse else 0.0
    require(scaled is score and cap == factor and 0 < cap < math.inf, CHANGED)
    return factor


CHANGED = "it changes scores, and by more than a soft-cap"


def _factor(value: Any, name: str) -> tuple[float, Any]:
    """The number and the other factor of a product."""
    require(isinstance(value, Node) and name_of(value) == name and len(value.args) == 2, CHANGED)
    numbers = [a for a in value.args if isinstance(a, (int, float))]
    others = [a for a in value.args if isinstance(a, Node)]
    require(len(numbers) == 1 and len(others) == 1, CHANGED)
    return float(numbers[0]), others[0]


def _number(value: Any) -> float:
    """A number, or a tensor that is made of one."""
    if isinstance(value, Node) and name_of(value) in ("tensor", "scalar_tensor", "full") and value.args:
        value = value.args[-1]
    require(isinstance(value, (int, float)), "a number that is not in the graph")
    return float(value)


def _results(node: Node) -> dict[Node, int]:
    """The nodes that hold the output and the natural log-sum-exp."""
    replaced: dict[Node, int] = {}
    for user in node.users:
        require(user.target is operator.getitem and user.args[1] in (0, 1, 2), "its results are used as one")
        which = user.args[1]
        require(which != 2 or not user.users, "its greatest scores are read")
        if which != 1 or not user.users:
            replaced[user] = 0 if which == 0 else 1
            continue
        for scaled in user.users:
            natural = name_of(scaled) == "mul" and set(scaled.args) == {user, LN_2} and not scaled.kwargs
            require(natural, "its log-sum-exp is read in base 2")
            replaced[scaled] = 1
    return replaced
