"""Caches that lie in one allocation are not copied: each counts as memory of its own where the compiler looks.

Engines often allocate the keys and values of a layer, or the caches of all layers, at once, and give the model slices.
Inductor writes a mutated input in place unless another one that the op mutates has the same storage: it would copy the
value cache at every step, and all that shares its storage with it. By then AOTAutograd has replaced inputs that
overlap by their common base, so two inputs that share a storage lie apart.

Slices that are not contiguous, such as K and V of one page side by side, it takes for overlapping. They are not copied
either, but their base is no static input, so Inductor skips CUDA graphs: allocate K and V one after the other.
"""

from __future__ import annotations

import collections

import torch
from torch.fx.node import Node, map_arg

from inductor_passes import compat
from inductor_passes.graph_pass import GraphPass

STORES = (torch.ops.lowered_attn.store_kv_cache.default, torch.ops.lowered_attn.store_latent_cache.default)


class SeparateCaches(GraphPass):
    """Give every graph input that shares its storage with a stored-to cache a storage of its own, as an example.

    Only the example tensors in the nodes' meta change, of the inputs and of their views.
    """

    def rewrite(self, graph: torch.fx.Graph) -> int:
        stores = [n for n in graph.find_nodes(op="call_function", target=compat.auto_functionalized) if _is_store(n)]
        shared = {_storage(base) for store in stores for base in store.kwargs["_all_bases"]}  # type: ignore[union-attr]
        inputs = collections.Counter(_storage(node) for node in graph.find_nodes(op="placeholder"))
        crowded = [node for node in graph.nodes if _storage(node) in shared and inputs[_storage(node)] > 1]
        moved = [node for node in crowded if node.op == "placeholder"]
        views = [node for node in crowded if node.op == "call_function"]
        for node in moved:
            node.meta["val"] = _alone(node.meta["val"])
        for node in views:
            arguments, keywords = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            with _tensor(node).fake_mode:  # type: ignore[union-attr]
                node.meta["val"] = node.target(*arguments, **keywords)
        return len(moved)


def _is_store(node: Node) -> bool:
    return node.args[0] in STORES


def _tensor(node: Node) -> torch.Tensor | None:
    """What a node makes as a fake tensor, the first where it makes several."""
    value = node.meta.get("val")
    value = value[0] if isinstance(value, (list, tuple)) and value else value
    return value if isinstance(value, torch.Tensor) else None


def _storage(node: Node) -> int | None:
    tensor = _tensor(node)
    return None if tensor is None else tensor.untyped_storage()._cdata


def _alone(example: torch.Tensor) -> torch.Tensor:
    """A fake tensor with the strides and offset of ``example`` in a storage of its own."""
    with example.fake_mode:  # type: ignore[attr-defined]
        elements = example.untyped_storage().nbytes() // example.element_size()
        whole = torch.empty(elements, dtype=example.dtype, device=example.device)
        return whole.as_strided(example.shape, example.stride(), example.storage_offset())
