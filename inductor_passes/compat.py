"""Every private Inductor name that the passes lean on, in one spelling from torch 2.11 to 2.15.

Nothing else in the project imports ``torch._inductor`` or ``torch._dynamo``, except ``pretend_gpu`` and
``pretend_parts``, which replace parts of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch._inductor import config, ir, lowering
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.select_algorithm import SymbolicGridFn, TritonTemplate, autotune_select_algorithm, realize_inputs
from torch._inductor.virtualized import V

__all__ = [
    "CustomGraphPass",
    "SymbolicGridFn",
    "TritonTemplate",
    "compile_fx",
    "config",
    "contiguous",
    "current_node",
    "empty_strided",
    "fallback",
    "graph_breaks",
    "ir",
    "known_true",
    "lower",
    "mode_options",
    "multiple_of",
    "permute",
    "realize_inputs",
    "register_lowering",
    "select",
    "size_hint",
    "static_int",
    "unit_last_stride",
]

register_lowering = lowering.register_lowering


def mode_options(mode: str) -> dict[str, Any]:
    """Inductor's config for a ``torch.compile`` mode; raises RuntimeError naming the modes for an unknown one."""
    return dict(torch._inductor.list_mode_options(mode))


def graph_breaks() -> dict[str, int]:
    """Dynamo's count of graph breaks so far in this process, by reason."""
    return dict(counters["graph_break"])


def lower(target: Any, *arguments: Any, **keywords: Any) -> Any:
    """Inductor's own lowering of an aten op."""
    return lowering.lowerings[target](*arguments, **keywords)


def fallback(target: Any) -> Callable[..., Any]:
    """A lowering that calls the op as it is."""
    return lowering.fallback_handler(target, add_to_fallback_set=False)


def permute(box: Any, order: Sequence[int]) -> Any:
    """A view with its dimensions in ``order``."""
    return lower(torch.ops.aten.permute.default, box, list(order))


def empty_strided(size: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Any:
    """A contiguous buffer that a template fills."""
    return lowering.empty_strided(size, None, dtype=dtype, device=device)


def unit_last_stride(box: Any) -> Any:
    """The value with a unit stride in its last dimension, copied only where it has none."""
    return ir.ExternKernel.require_stride1(box)


def contiguous(box: Any) -> Any:
    """The value as a contiguous buffer, copied only where it is not one."""
    return ir.ExternKernel.require_contiguous(box)


def static_int(value: Any) -> int:
    """A size as a Python int, guarded on where it is symbolic."""
    return int(V.graph.sizevars.guard_int(value))


def size_hint(value: Any) -> int:
    """A representative value of a size, without a guard: for choosing, never for correctness."""
    return int(V.graph.sizevars.optimization_hint(value))


def known_true(condition: Any) -> bool:
    """Whether a condition on sizes holds for every value they may take, without a guard."""
    return bool(V.graph.sizevars.statically_known_true(condition))


def multiple_of(value: Any, factor: int) -> bool:
    """Whether a size or stride is a multiple of ``factor`` for every value it may take, without a guard."""
    return bool(V.graph.sizevars.statically_known_multiple_of(value, factor))


def current_node() -> torch.fx.Node:
    """The FX node being lowered."""
    return V.graph.current_node


def select(
    name: str, choices: list[Any], inputs: list[Any], layout: Any, input_gen_fns: dict[int, Any] | None = None
) -> Any:
    """Autotune among ``choices`` where there are several, and return the chosen kernel's output.

    ``autotune_select_algorithm`` returns the output in 2.11 and (output, choice) from 2.13 on.
    """
    result = autotune_select_algorithm(name, choices, inputs, layout, input_gen_fns=input_gen_fns)
    return result[0] if isinstance(result, tuple) else result
