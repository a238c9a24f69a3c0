"""RoPE's cosines and sines are computed once a step, not by every kernel that turns something, for each of its heads.

A layer computes them from positions, and Inductor inlines them wherever they are read: into the RoPE of q and of k, in
every layer. That is slow arithmetic times heads and layers, and RoPE around it becomes too long to be inlined itself
(30 operations): the kernel that stores the key would have another one before it, and so would the one that joins q.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx.node import Node

from custom_ops.form import NAMESPACE
from custom_ops.op import library
from inductor_passes import compat
from inductor_passes.graph_pass import GraphPass

TURNS = (torch.ops.aten.cos.default, torch.ops.aten.sin.default)
LEAST_OPERATIONS = 3
"""Pointwise operations up to a cosine from which it is kept: RoPE by halves reads it twice and the sine twice, beside
about 20 operations of its own."""

library.define("computed_once(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
for _device in ("CPU", "CUDA"):
    library.impl("computed_once", torch.clone, _device)
torch.library.register_fake(f"{NAMESPACE}::computed_once", torch.empty_like, lib=library)
ONCE = torch.ops.lowered_attn.computed_once.default


@compat.register_lowering(ONCE, type_promotion_kind=None)
def lower_computed_once(x: Any) -> Any:
    """``x`` itself, in memory: nothing that reads it computes it again. Made by ``ShareAngles`` alone."""
    x.realize()
    return x


class ShareAngles(GraphPass):
    """Keep one of equal cosines and of equal sines that take some computing, and let all that read them read that."""

    def rewrite(self, graph: torch.fx.Graph) -> int:
        numbers: dict[object, int] = {}
        number_of: dict[Node, int] = {}
        operations: dict[Node, int] = {}
        kept: dict[int, Node] = {}
        count = 0
        for node in list(graph.nodes):
            # Two nodes have one number if they compute the same: the graph is functional here.
            key = _computation(node, number_of) if _is_pure(node) else node
            number = number_of[node] = numbers.setdefault(key, len(numbers))
            operations[node] = _operations(node, operations)
            if node.target not in TURNS or operations[node] < LEAST_OPERATIONS:
                continue
            if number not in kept:
                with graph.inserting_after(node):
                    once = kept[number] = graph.call_function(ONCE, (node,))
                once.meta["val"], number_of[once], operations[once] = node.meta["val"], number, 0
                node.replace_all_uses_with(once, delete_user_cb=lambda user, once=once: user is not once)
            else:
                node.replace_all_uses_with(kept[number])
                _erase(node)
            count += 1
        return count


def _is_pure(node: Node) -> bool:
    """Whether a node's arguments alone say what it computes."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return not node.target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in node.target.tags


def _computation(node: Node, number_of: dict[Node, int]) -> object:
    """What a node computes: its target and its arguments, nodes among them by their numbers."""

    def comparable(value: Any) -> object:
        if isinstance(value, Node):
            return "node", number_of[value]
        if isinstance(value, (list, tuple)):
            return tuple(comparable(v) for v in value)
        return type(value), value

    keywords = sorted(node.kwargs.items())
    return node.target, comparable(node.args), tuple((name, comparable(value)) for name, value in keywords)


def _operations(node: Node, operations: dict[Node, int]) -> int:
    """Pointwise operations that whoever reads a node inlines, from what lies in memory on."""
    if not _is_pure(node):
        return 0
    of_inputs = sum(operations[other] for other in node.all_input_nodes)
    if torch.Tag.pointwise in node.target.tags or not node.all_input_nodes:  # type: ignore[union-attr]
        return of_inputs + 1
    return of_inputs if node.target in compat.VIEWS else 0


def _erase(node: Node) -> None:
    """Drop a node that nothing reads, and what only it read."""
    unread = [node]
    while unread:
        node = unread.pop()
        if not node.users and _is_pure(node):
            inputs = node.all_input_nodes
            node.graph.erase_node(node)
            unread += inputs
