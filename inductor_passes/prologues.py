"""Which queries the attention kernel computes itself, where it loads them: RoPE, a scale, a cast.

A program loads its tile of queries once, so what was computed elementwise on the way to the kernel can be computed
there, and the result is neither written nor read. Keys and values are loaded again for every tile of queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from custom_ops.kernels.specialise import loads_in_parts, padded_dim
from inductor_passes import QUERIES_OPTION, compat
from inductor_passes.graph_pass import GraphPass, describe
from inductor_passes.group import GROUPED

SLOW = frozenset({"cos", "sin", "tan", "rand", "randn", "randint64"})
"""Operations with long code, which takes the registers that the kernel has left or more."""
GATHER = "indirect_indexing"
"""The check of an index calls a function, around which Hopper's matrix instructions run one by one."""

MOST_COLUMNS = 128
"""The kernel keeps in registers what it computed: a wider query leaves too few for the products (Hopper ran its matrix
instructions one by one at 256)."""
MOST_LOADS = 6 * 128
"""Loads an element times columns: those of a tile are in flight together. RoPE of 128 columns has 5 where it is written
``x * cos + cat(-x2, x1) * sin``, and costs 206 registers; as ``cat(x1 * cos - x2 * sin, ...)`` it has 8 and spilled."""

_VIEWS = (*compat.VIEWS, torch.ops.aten.permute.default, torch.ops.aten.transpose.int)


WANTED = "lowered_attn.compute_queries"
"""Mark of calls whose queries may be computed in the kernel, in ``node.meta``."""


class ComputeQueries(GraphPass):
    """Mark grouped calls as those whose kernel may compute the queries."""

    def rewrite(self, graph: torch.fx.Graph) -> int:
        calls = graph.find_nodes(op="call_function", target=GROUPED)
        for node in calls:
            node.meta[WANTED] = True
        return len(calls)


class Query(NamedTuple):
    """A query as the template takes it."""

    box: Any
    """The value, its dimensions in ``order``."""
    order: tuple[int, ...] | None
    """The order of its dimensions (batch, head, token, element) where the kernel may compute it, else None."""
    refusal: str = ""
    """Why not, where something computes it elementwise."""


def offer(box: Any, head_dim: int, orders: Sequence[tuple[int, ...]]) -> Query:
    """The first argument of the node being lowered, ``box``, as one that the kernel computes if nothing is against it.

    ``orders``: those of its dimensions that a template knows.
    """
    value = compat.elementwise(box)
    if value is None:
        return Query(box, None)
    call = compat.current_node()
    if not call.meta.get(WANTED):
        return Query(box, None, f'it would be computed in the kernel with options={{"{QUERIES_OPTION}": True}}')
    node = call.all_input_nodes[0]
    others, slow = other_readers(node, call), sorted(value.operations & SLOW)
    if others:
        return Query(box, None, f"its result is also read by {', '.join(others)}")
    if slow:
        return Query(box, None, f"{' and '.join(slow)} on the way takes too many registers")
    if GATHER in value.operations:
        return Query(box, None, "it reads a table at indices that are data, and a kernel that checks them is slower")
    if padded_dim(head_dim) > MOST_COLUMNS:
        return Query(box, None, f"a tile of {head_dim} columns leaves no registers to compute it in")
    if loads_in_parts(head_dim):
        return Query(box, None, f"a tile of {head_dim} columns is loaded in two parts")
    if value.loads * padded_dim(head_dim) > MOST_LOADS:
        return Query(box, None, f"{value.loads} loads an element of {head_dim} columns take too many registers")
    stride = node.meta["val"].stride()
    token_major = compat.surely(stride[2] >= stride[1])
    for order in sorted(orders, reverse=token_major):
        moved = compat.computed_in_order(box, order, value)
        if moved is not None:
            return Query(moved, order)
    return Query(box, None, "it lies in memory in an order that the kernel does not know")


def other_readers(node: torch.fx.Node, call: torch.fx.Node) -> list[str]:
    """What reads a value, or a value that it is a view of, beside an attention ``call``, or that as k or v again."""
    value = _viewed(node)
    arguments = [_viewed(argument) for argument in call.args if isinstance(argument, torch.fx.Node)]
    again = ["attention again"] if arguments.count(value) > 1 else []
    return list(dict.fromkeys(again + [describe(reader) for reader in _readers(value) if reader is not call]))


def _viewed(node: torch.fx.Node) -> torch.fx.Node:
    while node.target in _VIEWS:
        node = node.all_input_nodes[0]
    return node


def _readers(node: torch.fx.Node) -> list[torch.fx.Node]:
    return [r for user in node.users for r in (_readers(user) if user.target in _VIEWS else [user])]
