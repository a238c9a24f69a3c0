"""What Inductor fused into our kernels and what it left apart, for ``explain``: read from its final schedule."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from inductor_passes import compat, decisions
from inductor_passes.graph_pass import describe

AGAIN = "its tiles are loaded again for every tile of queries, so it is computed once"
"""Why keys and values are no prologue."""

NORM = "it is part of a kernel that reduces (a norm)"
MORE = "it is part of a kernel that computes more, which was fused first"
OVER_TILES = "it reduces over more than the tile that a program has"


@dataclasses.dataclass(frozen=True)
class Call:
    """A call that a kernel of ours takes."""

    op: str
    """The form's name, or the op's."""
    node: str
    """Name of its node in the FX graph."""
    inputs: Mapping[str, str]
    """Buffers by what they are to it, such as ``q``."""
    apart: Mapping[str, str]
    """Why an input is not computed in the kernel, by what it is to the call."""
    opaque: str = ""
    """Why nothing is fused into the kernel, where Inductor cannot: it is no template."""
    settle: Callable[[bool], str] | None = None
    """Where autotuning decides: told whether the kernel is opaque, it records the decision, and returns ``opaque``."""


# Of every graph that is being compiled, its calls by the name of the output's buffer.
_calls: weakref.WeakKeyDictionary[Any, dict[str, Call]] = weakref.WeakKeyDictionary()


def watch(
    out: Any, op: str, inputs: Mapping[str, Any], apart: Mapping[str, str], opaque: str = "",
    settle: Callable[[bool], str] | None = None,
) -> None:  # fmt: skip
    """Remember a lowered call: ``out`` is its output, ``inputs`` what it reads, all of them in memory."""
    if decisions.is_recording():
        names = {name: box.get_name() for name, box in inputs.items()}
        call = Call(op, compat.current_node().name, names, apart, opaque, settle)
        _calls.setdefault(compat.current_graph(), {})[out.get_name()] = call


class ReportFusions:
    """Record what became of the computations around every watched call of a graph that has just been scheduled."""

    def __init__(self, then: Callable[[list[Any]], list[Any]] | None) -> None:
        self.then = then
        """The user's own function in the same place."""

    def __call__(self, nodes: list[Any]) -> list[Any]:
        kernels = {name: node for node in nodes for name in node.get_buffer_names()}
        for buffer, call in _calls.pop(compat.current_graph(), {}).items():
            if buffer in kernels:  # else nothing reads it, and it is gone
                _report(call, buffer, kernels)
        return self.then(nodes) if self.then is not None else nodes


def _report(call: Call, buffer: str, kernels: Mapping[str, Any]) -> None:
    """``kernels``: what the schedule launches, by the buffers that it writes; several buffers may have one."""
    kernel = kernels[buffer]
    parts = kernel.get_nodes()
    at = next(i for i, part in enumerate(parts) if buffer in part.get_buffer_names())
    if call.settle is not None:
        call = dataclasses.replace(call, opaque=call.settle(compat.is_extern(kernel, parts[at])))
    # Later nodes alone, for a view of the output has the origins of all that the output is made of.
    attention = max(parts[at].node.get_origins())
    generated = {name: other for name, other in kernels.items() if other is not kernel and compat.is_generated(other)}
    roles: dict[str, list[str]] = {}
    for role, name in call.inputs.items():
        roles.setdefault(name, []).append(role)

    pending: list[torch.fx.Node] = []
    for part in parts[:at]:
        pending += _origins(part)
        for name in part.get_buffer_names() & roles.keys():
            _record(call, "fused", f"{roles[name][0]} is computed where it is loaded: {_names(pending)}")
            pending = []
    epilogue = [origin for part in parts[at + 1 :] for origin in _origins(part) if origin > attention]
    if epilogue:
        _record(call, "fused", f"into the store of the output: {_names(epilogue)}")

    for name in (name for name in roles if name in generated):
        producer = generated[name]
        what = f"{' and '.join(roles[name])} ({_names(_origins(producer))})"
        _apart(call, what, call.apart.get(roles[name][0]) or _why_no_prologue(call, producer, kernel))
    writes = {name for part in parts[at:] for name in part.get_buffer_names()}
    for consumer in {id(other): other for other in generated.values() if other.used_buffer_names() & writes}.values():
        what = _names(origin for origin in _origins(consumer) if origin > attention)
        why = call.opaque or f"Inductor says: {compat.why_apart(kernel, consumer)}"
        _apart(call, what, OVER_TILES if consumer.is_reduction() else why)


def _why_no_prologue(call: Call, producer: Any, kernel: Any) -> str:
    if producer.is_reduction():
        return NORM
    if call.opaque:
        return call.opaque
    if not producer.get_buffer_names() <= kernel.used_buffer_names():
        return MORE
    return f"Inductor says: {compat.why_apart(producer, kernel)}"


def _origins(kernel: Any) -> list[torch.fx.Node]:
    """The FX nodes that a kernel, or a part of one, computes, in their order, without layouts and attention itself."""
    origins = {origin for part in kernel.get_nodes() for origin in part.node.get_origins()}
    views = (*compat.VIEWS, *compat.MOVES, compat.KEEPS_STRIDES)
    computing = [origin for origin in origins if origin.op == "call_function" and origin.target not in views]
    # Attention itself gives a tuple.
    return sorted(origin for origin in computing if isinstance(origin.meta.get("val"), torch.Tensor))


def _names(origins: Iterable[torch.fx.Node]) -> str:
    return ", ".join(dict.fromkeys(describe(node) for node in origins)) or "a copy"


def _apart(call: Call, what: str, why: str) -> None:
    _record(call, "apart", f"{what} stays a kernel of its own: {why}")


def _record(call: Call, stage: decisions.Stage, detail: str) -> None:
    decisions.record(decisions.Decision(stage, call.op, call.node, detail))
