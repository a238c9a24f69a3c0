"""One tile schedule a step: every paged attention call of a graph that can read the same one does.

A model asks for a schedule in each of its layers, with the same lengths. The schedule depends on lengths and shapes
alone, so one launch serves them all: 36 layers would otherwise launch it 36 times, at 2 to 7 us each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch.fx.node import Node

from custom_ops.paged.call import PagedCall
from custom_ops.paged.latent import latent_call
from custom_ops.paged.masks import MODES
from custom_ops.paged.schedule import ScheduleCall
from inductor_passes import compat
from inductor_passes.graph_pass import GraphPass

SCHEDULE = torch.ops.lowered_attn.paged_schedule.default
ATTENTION = torch.ops.lowered_attn.paged_attention.default
LATENT_ATTENTION = torch.ops.lowered_attn.paged_latent_attention.default
CALLS: dict[Any, Callable[..., PagedCall]] = {ATTENTION: PagedCall, LATENT_ATTENTION: latent_call}
"""Every op that takes a schedule, and what makes a call of its arguments."""


class ShareSchedule(GraphPass):
    """Keep the first of several ``paged_schedule`` calls with the same arguments.

    Tensors are the same where one node makes them; sizes where they are one number or one symbolic expression;
    everything else where it is equal. A call of attention without a schedule makes its own inside, so on CUDA it gets
    one first.
    """

    def uuid(self) -> str:
        """Modes are in it: a graph names its mode alone, and users' own are in no source file that is hashed."""
        modes = [(name, str(mode.visible), [str(o) for o in mode.operands]) for name, mode in sorted(MODES.items())]
        return f"{super().uuid()}:{modes}"

    def rewrite(self, graph: torch.fx.Graph) -> int:
        for target in CALLS:
            for node in graph.find_nodes(op="call_function", target=target):
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


def call_of(node: Node) -> PagedCall:
    """The call that a node of ``CALLS`` describes, with fake tensors."""
    arguments, keywords = compat.example_arguments(node)
    return CALLS[node.target](*arguments, **keywords)


def _give_schedule(node: Node) -> None:
    """Put a ``paged_schedule`` call before an attention call that has none."""
    bound = bound_arguments(node)
    if bound["schedule"] is not None or not bound["q"].meta["val"].is_cuda:
        return
    call = ScheduleCall.of(call_of(node))
    tensors, others = (dataclasses.fields(ScheduleCall)[part] for part in (slice(4), slice(4, None)))
    names = {field.name: getattr(call, field.name) for field in others}
    graph = node.graph
    with graph.inserting_before(node):
        if isinstance(call.num_tokens, torch.SymInt):
            names["num_tokens"] = graph.call_function(torch.ops.aten.sym_size.int, (bound["q"], 0))
            names["num_tokens"].meta["val"] = call.num_tokens
        made = graph.call_function(SCHEDULE, tuple(bound[field.name] for field in tensors), names)
    with call.context_lens.fake_mode:  # type: ignore[attr-defined]
        made.meta["val"] = SCHEDULE(**vars(call))
    position = [argument.name for argument in node.target._schema.arguments].index("schedule")  # type: ignore[union-attr]
    if len(node.args) > position:
        node.update_arg(position, made)
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
