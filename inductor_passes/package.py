"""Compile an exported program into AOTInductor's package, our passes and our lowerings in place.

A package calls what is not compiled into it, such as paged attention on a CPU, through torch's dispatcher: C++ puts the
call together from what was written down when the package was made. ``SpellOut`` writes calls of our ops down in the
way that arrives as it was meant.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx.node import Node

from custom_ops.form import NAMESPACE
from inductor_passes import compat
from inductor_passes.compile import with_passes
from inductor_passes.graph_pass import GraphPass
from inductor_passes.share_schedule import SCHEDULE

SCHEDULE_BY_NAMES = torch.ops.lowered_attn.paged_schedule_by_names.default


def package_with_passes(program: torch.export.ExportedProgram, path: Any, options: Mapping[str, Any]) -> Any:
    """Write the package of ``program``, which stays as it is, and return its path.

    ``options`` mean what they mean to ``compile_with_passes``; ``path`` is a path that ends in ``.pt2``, a seekable
    file, or None for a file in Inductor's cache.
    """
    gm = program.module(check_guards=False)
    assert isinstance(gm, torch.fx.GraphModule) and program.example_inputs is not None
    erase_assertions(gm.graph)
    with compat.prologues_first():
        return compat.compile_and_package(gm, program.example_inputs, path, with_passes(gm, options, [SpellOut()]))


def erase_assertions(graph: torch.fx.Graph) -> None:
    """Drop what export notes before every cast, the dtype at hand, which reads scores of attention once more."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        graph.erase_node(node)


class SpellOut(GraphPass):
    """Give every call of an op of ours all of its arguments, and name dtypes.

    Up to torch 2.13, C++ fails on a call with ints that were left to their defaults: only one of two lists has them.
    torch 2.11 reads dtypes wrong: it writes the numbers of one enumeration, and reads them as those of another.
    """

    def rewrite(self, graph: torch.fx.Graph) -> int:
        count = 0
        for node in graph.nodes:
            if node.op == "call_function" and getattr(node.target, "namespace", "") == NAMESPACE:
                count += _spell_out(node)
        return count


def _spell_out(node: Node) -> bool:
    given, before = len(node.args), node.kwargs
    missing = [a for a in node.target._schema.arguments[given:] if a.name not in before]  # type: ignore[union-attr]
    node.kwargs = {**before, **{a.name: a.default_value for a in missing}}
    if node.target is SCHEDULE:
        node.target = SCHEDULE_BY_NAMES
        named = {n: str(v).removeprefix("torch.") for n, v in node.kwargs.items() if isinstance(v, torch.dtype)}
        node.kwargs = {**node.kwargs, **named}
    if node.kwargs == before:
        return False
    node.meta.pop("eager_input_vals", None)  # of the arguments as they were
    return True
