"""Heads are merged where attention's kernel stores its output, also after an epilogue over ``[B, H, S, D]``.

The kernel writes ``[B, S, H, D]``, of which the op's output is a view. A gate on that view has the same strides in
eager code, so that merging its heads is a view too. Inductor forgets those strides once the gate reaches a product or
the graph's output through that view: it lays the gate out by heads, and a second kernel copies it.
"""

from __future__ import annotations

import operator

import torch
from torch.fx.node import Node

from inductor_passes import compat
from inductor_passes.graph_pass import GraphPass
from inductor_passes.group import GROUPED

SWAPS = {
    torch.ops.aten.permute.default: lambda node: list(node.args[1]) == [0, 2, 1, 3],
    torch.ops.aten.transpose.int: lambda node: {d % 4 for d in node.args[1:3]} == {1, 2},
}
"""Views that swap heads and tokens."""


class MergeHeads(GraphPass):
    """Keep the strides of what is computed elementwise from an attention's output, where its heads are merged."""

    def rewrite(self, graph: torch.fx.Graph) -> int:
        views = [view for target in SWAPS for view in graph.find_nodes(op="call_function", target=target)]
        merged = [view for view in views if _merges_epilogue(view)]
        for view in merged:
            value = view.all_input_nodes[0]
            with graph.inserting_before(view):
                view.replace_input_with(value, compat.keep_stride_order(graph, value, (4, 2, 3, 1)))
        return len(merged)


def _merges_epilogue(view: Node) -> bool:
    """Whether a view puts tokens before heads again, after an epilogue, for something that reads it from memory."""
    value = view.all_input_nodes[0]
    val = value.meta["val"]
    if not val.is_cuda or val.dim() != 4 or not SWAPS[view.target](view):  # type: ignore[index]
        return False
    from_memory = not any(_is_elementwise(user) for user in _readers(view))
    return from_memory and _is_epilogue(value) and _lies_dense(view)


def _is_elementwise(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def _is_epilogue(value: Node) -> bool:
    """Whether a value is computed elementwise from the output of a grouped op."""
    pending, seen = [value], {value}
    while pending and _is_elementwise(value):
        for source in pending.pop().all_input_nodes:
            if source.target is operator.getitem:
                call, output = source.args
                if call.target == GROUPED and output == 0:  # type: ignore[union-attr]
                    return True
            elif source not in seen and _is_elementwise(source):
                seen.add(source)
                pending.append(source)
    return False


def _lies_dense(view: Node) -> bool:
    """Whether a view's elements lie in memory in its own order, in eager code."""
    val = view.meta["val"]
    expected = 1
    for size, stride in zip(reversed(val.shape), reversed(val.stride()), strict=True):
        if not compat.surely(stride == expected):
            return False
        expected *= size
    return True


def _readers(view: Node) -> list[Node]:
    """What reads a view, or a view of it that keeps its order."""
    return [r for user in view.users for r in (_readers(user) if user.target in compat.VIEWS else [user])]
