"""What the compiler did with a model's attention.

What was recognised, what it became, which kernel and config, what was fused into it, what was refused and why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from inductor_passes import compile_with_passes
from inductor_passes.decisions import Decision, Stage, recording


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The compiler's decisions about one run of a model. ``print`` it, or read its fields."""

    decisions: tuple[Decision, ...]
    """Every decision, in order; ``stage`` is one of ``inductor_passes.decisions.Stage``.

    On a GPU, ``"fused"`` and ``"apart"`` say what Inductor computes in the attention kernel and what it does not, both
    before attention and after it.
    """
    graph_breaks: dict[str, int]
    """Where Dynamo left the graph, by reason; empty is what you want."""
    graphs: tuple[tuple[str, str, str], ...]
    """(pass, graph before, graph after) of every pass that changed a graph."""
    device: str
    """Where the inputs lived."""

    def of_stage(self, stage: Stage) -> tuple[Decision, ...]:
        """The decisions of one stage."""
        return tuple(d for d in self.decisions if d.stage == stage)

    def __str__(self) -> str:
        grouped, lowered, refused = (self.of_stage(stage) for stage in ("grouped", "lowered", "refused"))
        lines = [
            f"{len(grouped)} attention forms grouped, {len(lowered)} lowered, {len(refused)} attention ops left alone, "
            f"{sum(self.graph_breaks.values())} graph breaks (torch {torch.__version__}, {self.device})"
        ]
        by_node: dict[str, list[Decision]] = {}
        for d in self.decisions:
            by_node.setdefault(d.node, []).append(d)
        for node, about in by_node.items():
            where = next((str(d.facts["module"]) for d in about if d.facts.get("module")), "")
            lines.append(f"\n{about[0].op}  node {node}" + (f"  in {where}" if where else ""))
            shapes = about[0].facts
            if "query" in shapes:
                lines.append(f"    query {list(shapes['query'])}  key {list(shapes['key'])}  {shapes['dtype']}")  # type: ignore[call-overload]
            lines += [f"    {d.stage}: {d.detail}" for d in about]
        lines += [f"\ngraph break ({count}x): {reason}" for reason, count in self.graph_breaks.items()]
        return "\n".join(lines)


def explain(model: Callable[..., Any], *inputs: Any, **keyword_inputs: Any) -> Explanation:
    """Compile ``model`` afresh with backend ``"lowered_attn"``, run it once on the inputs, and say what became of
    its attention.

    ``model`` is a module or function that is not compiled yet. Compile caches are off meanwhile, so every decision is
    made again and seen; what you compiled before stays as it is. A model in training mode with parameters that need
    gradients is explained as it trains, forward only. Raises whatever compiling or running the model raises.
    """
    from inductor_passes import compat

    def backend(gm: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        return compile_with_passes(gm, example_inputs, options={"force_disable_caches": True})

    before = compat.graph_breaks()
    with recording() as log:
        torch.compile(model, backend=backend)(*inputs, **keyword_inputs)
    breaks = {
        reason: n - before.get(reason, 0) for reason, n in compat.graph_breaks().items() if n > before.get(reason, 0)
    }
    tensors = [t for t in torch.utils._pytree.tree_leaves((inputs, keyword_inputs)) if isinstance(t, torch.Tensor)]
    device = str(tensors[0].device) if tensors else "no tensor inputs"
    return Explanation(tuple(log.records), breaks, tuple(log.graphs), device)
