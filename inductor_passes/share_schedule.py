"""One tile schedule a step: every paged attention call of a graph that can read the same one does.

A model asks for a schedule in each of its layers, with the same lengths. The schedule depends on lengths and shapes
alone, so one launch serves them all: 36 layers would otherwise launch it 36 times, at 2 to 7 us each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx.node import Node

from custom_ops.paged.layout import LAYOUTS
from custom_ops.paged.masks import MODES
from inductor_passes.graph_pass import GraphPass

SCHEDULE = torch.ops.lowered_attn.paged_schedule.default
ATTENTION = torch.ops.lowered_attn.paged_attention.default
SCHEDULE_AT = 10
"""Position of ``schedule`` among the arguments of ``paged_attention``."""
SHARED_NAMES = ("mode", "block_size", "window", "prefix_hole", "layout", "impl", "shape_class")
"""Arguments that both ops have under one name."""


class ShareSchedule(GraphPass):
    """Keep the first of several ``paged_schedule`` calls with the same arguments.

    Tensors are the same where one node makes them; sizes where they are one number or one symbolic expression;
    everything else where it is equal. A call of ``paged_attention`` without a schedule makes its own inside, so on CUDA
    it gets one first.
    """

    def uuid(self) -> str:
        """Modes are in it: a graph names its mode alone, and users' own are in no source file that is hashed."""
        modes = [(name, str(mode.visible), [str(o) for o in mode.operands]) for name, mode in sorted(MODES.items())]
        return f"{super().uuid()}:{modes}"

    def rewrite(self, graph: torch.fx.Graph) -> int:
        for node in graph.find_nodes(op="call_function", target=ATTENTION):
            _give_schedule(node)
        kept: dict[object, Node] = {}
        count = 0
        for node in graph.find_nodes(op="call_function", target=SCHEDULE):
            first = kept.setdefault(_key(node), node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)
                count += 1
        return count


def _give_schedule(node: Node) -> None:
    """Put a ``paged_schedule`` call before an attention call that has none."""
    bound = bound_arguments(node)
    q, k_cache, context_lens = (bound[name].meta["val"] for name in ("q", "k_cache", "context_lens"))
    if bound["schedule"] is not None or not q.is_cuda:
        return
    sizes = LAYOUTS[bound["layout"]].sizes(k_cache)
    graph = node.graph
    with graph.inserting_before(node):
        tokens = q.shape[0]
        if isinstance(tokens, torch.SymInt):
            tokens = graph.call_function(torch.ops.aten.sym_size.int, (bound["q"], 0))
            tokens.meta["val"] = q.shape[0]
        made = graph.call_function(
            SCHEDULE,
            tuple(bound[name] for name in ("cu_seqlens_q", "context_lens", "valid_lens", "request_values")),
            {
                "num_tokens": tokens,
                "num_heads": int(q.shape[1]),
                "num_kv_heads": int(sizes.kv_heads),
                "head_dim": int(sizes.head_dim),
                "page_size": int(sizes.page_size),
                "dtype": q.dtype,
                "cache_dtype": k_cache.dtype,
                "direct": bound["k"] is not None,
                **{name: bound[name] for name in SHARED_NAMES},
            },
        )
    with context_lens.fake_mode:
        arguments, keywords = torch.fx.node.map_arg((made.args, made.kwargs), lambda n: n.meta["val"])
        made.meta["val"] = SCHEDULE(*arguments, **keywords)
    if len(node.args) > SCHEDULE_AT:
        node.update_arg(SCHEDULE_AT, made)
    else:
        node.update_kwarg("schedule", made)


def _key(node: Node) -> object:
    """What two calls have in common if they compute the same."""
    bound = bound_arguments(node)
    return tuple((name, _comparable(value)) for name, value in sorted(bound.items()))


def bound_arguments(node: Node) -> dict[str, Any]:
    """Arguments by name, defaults included: two spellings of one call are one."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    bound = {a.name: a.default_value for a in schema if a.has_default_value()}
    bound.update(zip((a.name for a in schema), node.args, strict=False))
    bound.update(node.kwargs)
    return bound


def _comparable(value: Any) -> object:
    if isinstance(value, (list, tuple)):
        return tuple(_comparable(v) for v in value)
    if isinstance(value, Node):
        example = value.meta.get("val")
        if isinstance(example, torch.SymInt):
            return "size", example.node.expr
        return ("size", example) if isinstance(example, int) else ("node", value)
    return value
