"""``torch.nn.functional.scaled_dot_product_attention``.

    softmax(scale * q k^T + mask) v    over [B, H, L, D], scale 1 / sqrt(D) where none is given

``is_causal`` is torch's: query ``i`` sees key ``j`` where ``j <= i``, both counted from 0, whatever the lengths are
(the triangle starts in the top left corner). A boolean mask is true where a key is seen. A query that sees no key gets
0, as it does from torch's CPU and math kernels; torch leaves it open, and some CUDA kernels give it something else.

Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch.fx.node import Node

from custom_ops.masks import k, q
from inductor_passes.recognise.candidate import Candidate, Refused
from inductor_passes.recognise.graph_values import Writes, example, shape_of
from inductor_passes.recognise.indexing import Unreadable, require
from inductor_passes.recognise.mask_values import MaskReader, Visibility

NAME = "scaled_dot_product_attention"
TARGETS = (torch.nn.functional.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)

CLOSED = (torch.nn.functional.multi_head_attention_forward,)
"""Functions that call it where Dynamo does not look inside."""


def find(graph: torch.fx.Graph, writes: Writes) -> Iterator[Candidate | Refused]:
    """Every call of ``scaled_dot_product_attention``, with what its mask says or why nobody knows."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in TARGETS:
            try:
                yield _candidate(node, writes)
            except Unreadable as reason:
                yield Refused(node, NAME, str(reason))
        elif node.op == "call_function" and node.target in CLOSED:
            yield Refused(node, node.target.__name__, "Dynamo's graph has it as one call, which is not looked into")


def _call(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: Any = 0.0, is_causal: Any = False,
    *, scale: Any = None, enable_gqa: Any = False,
) -> dict[str, Any]:  # fmt: skip
    """The arguments by name."""
    return dict(locals())


def _candidate(node: Node, writes: Writes) -> Candidate:
    try:
        inspect.signature(_call).bind(*node.args, **node.kwargs)
    except TypeError as error:
        raise Unreadable(f"arguments that are not known here: {error}") from None
    call = _call(*node.args, **node.kwargs)
    tensors = [call["query"], call["key"], call["value"]]
    for name, tensor in zip("qkv", tensors, strict=True):
        is_tensor = isinstance(tensor, Node) and isinstance(example(tensor), torch.Tensor)
        require(is_tensor and not example(tensor).is_nested, f"{name} is no plain tensor")
        rank = example(tensor).dim()
        require(rank == 4, f"{name} has {rank} dimensions; forms take [B, H, S, D]")
    dropout, scale, mask = (call[name] for name in ("dropout_p", "scale", "attn_mask"))
    require(isinstance(dropout, (int, float)) and dropout == 0, "dropout, which no form has")
    require(scale is None or isinstance(scale, (int, float)), "a scale that is no constant")
    require(isinstance(call["is_causal"], bool), "is_causal depends on sizes")
    require(mask is None or not call["is_causal"], "a mask and is_causal at once")
    seen = _visibility(node, mask, call["is_causal"], tensors, writes)
    return Candidate(
        op=NAME, node=node, replaced={node: 0}, query=tensors[0], key=tensors[1], value=tensors[2],
        visible=seen.visible, tensors=seen.tensors, scale=None if scale is None else float(scale), finite=seen.finite,
    )  # fmt: skip


def _visibility(node: Node, mask: Any, is_causal: bool, tensors: list[Node], writes: Writes) -> Visibility:
    if mask is None:
        return Visibility(sympy.Le(k, q) if is_causal else sympy.true, {}, False)
    require(isinstance(mask, Node) and isinstance(example(mask), torch.Tensor), "a mask that is no tensor")
    batch, _, query_len, _ = shape_of(tensors[0])
    reader = MaskReader(writes, batch=batch, query_len=query_len, key_len=shape_of(tensors[1])[2])
    try:
        return reader.read(mask, node)
    except Unreadable as reason:
        raise Unreadable(f"its mask: {reason}") from None
