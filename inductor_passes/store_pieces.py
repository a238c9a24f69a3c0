"""A latent that is joined to be stored is stored in pieces: its cat, and the kernel around it, are not needed.

The latent of a token is the norm of one part of a projection beside the RoPE of another. As a cat, the two meet in a
kernel of their own, after the norm's reduction: two launches before the store is done, three where attention reads the
new latents too. In pieces, each is stored as it is made, in the norm's kernel, which writes the whole latent as well
where something reads it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx.node import Node

from custom_ops.form import NAMESPACE
from custom_ops.op import library
from inductor_passes import compat
from inductor_passes.graph_pass import GraphPass

STORE = torch.ops.lowered_attn.store_latent_cache.default
CAT = torch.ops.aten.cat.default

library.define(
    "store_latent_pieces(Tensor[] pieces, Tensor(a!) latent_cache, Tensor slot_mapping) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _store_pieces(pieces: Sequence[Tensor], latent_cache: Tensor, slot_mapping: Tensor) -> Tensor:
    """``store_latent_cache`` of pieces ``[T, ...]`` side by side, and what they are as one; for the compiler alone."""
    latent = torch.cat(list(pieces), 1)
    STORE(latent, latent_cache, slot_mapping)
    return latent


for _device in ("CPU", "CUDA"):
    library.impl("store_latent_pieces", _store_pieces, _device)
torch.library.register_fake(f"{NAMESPACE}::store_latent_pieces", _store_pieces, lib=library)
PIECES = torch.ops.lowered_attn.store_latent_pieces.default


class StorePieces(GraphPass):
    """Rewrite ``store_latent_cache`` of a cat to a store of what the cat joins, where Inductor stores by scatter.

    What reads the latent after the store reads the store's output instead.
    """

    def rewrite(self, graph: torch.fx.Graph) -> int:
        count = 0
        for node in graph.find_nodes(op="call_function", target=compat.auto_functionalized):
            if node.args[0] is not STORE:
                continue
            latents = _behind_views(node.kwargs["latent"])
            if _joins_columns(latents[-1], latents[0]):
                _store_what_is_joined(node, latents)
                count += 1
        return count


def _behind_views(latent: Node) -> list[Node]:
    """``latent`` and the nodes that it is a view of, in the same order of elements: the earliest comes last."""
    chain = [latent]
    while chain[-1].target in compat.VIEWS:
        chain.append(chain[-1].args[0])  # type: ignore[arg-type]
    return chain


def _joins_columns(cat: Node, latent: Node) -> bool:
    """Whether ``cat`` is one of pieces ``[T, ...]`` of one dtype, side by side, on CUDA, and ``latent`` is the same."""
    example = latent.meta["val"]
    if cat.target is not CAT or cat.meta["val"].shape != example.shape or not example.is_cuda:
        return False
    pieces, dim = cat.args[0], (*cat.args[1:], cat.kwargs.get("dim", 0))[0]
    examples = [piece.meta["val"] for piece in pieces]  # type: ignore[union-attr]
    alike = all(t.dim() == 2 and t.dtype == example.dtype and isinstance(t.shape[1], int) for t in examples)
    return alike and dim in (1, -1)


def _store_what_is_joined(node: Node, latents: list[Node]) -> None:
    graph, cat = node.graph, latents[-1]
    example = cat.meta["val"]
    position = {other: i for i, other in enumerate(graph.nodes)}
    node.args = (PIECES,)
    node.kwargs = {**{n: v for n, v in node.kwargs.items() if n != "latent"}, "pieces": cat.args[0]}
    node.meta["val"] = (example, *node.meta["val"][1:])
    node.meta.pop("eager_input_vals", None)  # of the arguments as they were
    same = [latent for latent in latents if latent.meta["val"].shape == example.shape]
    readers = [(user, latent) for latent in same for user in latent.users if position[user] > position[node]]
    if readers:
        with graph.inserting_after(node):
            joined = graph.call_function(operator.getitem, (node, 0))
        joined.meta["val"] = example
        for user, latent in readers:
            user.replace_input_with(latent, joined)
    for latent in latents:
        if not latent.users:
            graph.erase_node(latent)
