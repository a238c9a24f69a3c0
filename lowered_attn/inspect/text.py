"""An inspection as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lowered_attn.inspect.calls import Call
from lowered_attn.inspect.capture import Inspection, Kernel
from lowered_attn.inspect.lines import Line, changes, graph_lines, source_lines

SIGNS = {"removed": "-", "added": "+", "fused": ">", "gap": " ", "": " "}
RESOURCES = ("registers", "spilled bytes", "shared memory", "matrix instructions")


def amount(number: float, unit: str) -> str:
    """The number with a prefix, as in "1.07 GFLOP"."""
    for power, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= power:
            return f"{number / power:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}"


def duration(seconds: float) -> str:
    """Microseconds, or milliseconds where they are many."""
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def resources_of(kernel: Kernel) -> tuple[str, ...]:
    """The values of `RESOURCES`, or the reason why there are none and blanks."""
    r = kernel.resources
    if r is None:
        return (kernel.problem, *[""] * (len(RESOURCES) - 1))
    counts = {"wgmma": r.wgmma, "mma": r.mma, "tcgen05": r.tcgen05}
    used = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    return str(r.registers), str(r.spills), f"{r.shared_memory:,}", used or "none"


def verdict(inspection: Inspection) -> str:
    """The outcome in a sentence."""
    refused = sum(d.stage == "refused" for d in inspection.decisions)
    if not inspection.recognised:
        found = f"{_count(refused, 'attention op')} left alone" if refused else "there is no attention op in the graph"
        return f"Nothing was recognised: {found}, and the callable compiles as it does with Inductor alone."
    forward = [call for call in inspection.calls if call.phase == "forward"]
    taken = sum(d.stage == "lowered" and d.facts.get("kernel") == "cudnn" for d in inspection.decisions)
    fused = sum(bool(k.from_template and source_lines(k.source, True).fused) for k in inspection.kernels)
    return (
        f"{_count(len(forward) + taken, 'attention call')} lowered, {refused} left alone, "
        f"{_count(sum(inspection.breaks.values()), 'graph break')}; "
        f"other ops fused into {_count(fused, 'attention kernel')}."
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def compiled_how(inspection: Inspection) -> str:
    """What was compiled, and with which options."""
    phases = "forward and backward" if inspection.trains else "forward only"
    options = "default options" if inspection.library else "library_kernels=False, so that every kernel can be shown"
    return f"{phases}, for {inspection.gpu} ({inspection.arch}), {inspection.versions}, {options}"


def render(inspection: Inspection, ptx: bool = False) -> str:
    """The whole inspection; PTX on request, because it is long."""
    return "\n".join(_parts(inspection, ptx)) + "\n"


def _parts(inspection: Inspection, ptx: bool) -> Iterator[str]:
    matched = [d.node for d in inspection.decisions]
    yield f"{inspection.name}\n{verdict(inspection)}\nCompiled: {compiled_how(inspection)}"
    yield _title("Decisions")
    for d in inspection.decisions:
        where = f" in {d.facts['module']}" if d.facts.get("module") else ""
        yield f"{d.stage:10} {d.op} (node {d.node}{where}): {d.detail}"
    yield from (f"graph break ({count}x): {reason}" for reason, count in inspection.breaks.items())
    for i, graph in enumerate(inspection.graphs):
        yield _title(f"Your graph {i + 1} of {len(inspection.graphs)}, as Dynamo traced it (* matched)")
        yield from _lines(graph_lines(graph, matched))
    for name, before, after in inspection.passes:
        yield _title(f"Pass {name} (- before, + after, * matched)")
        yield from _lines(changes(before, after, matched))
    yield _title("Attention")
    for call in inspection.calls:
        yield from _call(call, inspection.arch)
    yield _title("Resources")
    for kernel in inspection.kernels:
        values = zip(RESOURCES, resources_of(kernel), strict=True)
        numbers = kernel.problem or ", ".join(f"{name} {value}" for name, value in values)
        yield f"{kernel.name} ({kernel.phase}): {numbers}"
        yield from (f"    problem: {p}" for p in (kernel.resources.problems if kernel.resources else ()))
    yield from (f"{count}x {name}: no generated code" for name, count in inspection.outside.items())
    for kernel in inspection.kernels:
        if kernel.source:
            source = source_lines(kernel.source, kernel.from_template)
            yield _title(f"{kernel.name} ({kernel.phase}): computes {', '.join(kernel.fuses)} (> fused)")
            yield from _lines([*source.head, Line(""), *source.body, Line(""), *source.helpers])
        if ptx and kernel.resources is not None:
            yield _title(f"PTX of {kernel.name}")
            yield kernel.resources.ptx


def _call(call: Call, arch: str) -> Iterator[str]:
    least = call.roofline(arch)
    yield f"{call.op} (node {call.node}, {call.phase}): {call.shapes}, {call.dtype}"
    yield (
        f"    {amount(call.flops, 'FLOP')}, {amount(call.bytes, 'B')} ({call.bound}); {least.intensity:.3g} FLOP/B; "
        f"roofline of {arch}: {duration(least.seconds)}, bound by {least.bound_by}"
    )
    if call.picture is not None:
        yield call.picture.text() + (f"\n({call.picture.note})" if call.picture.note else "")


def _title(text: str) -> str:
    return f"\n== {text}"


def _lines(lines: Iterable[Line]) -> Iterator[str]:
    for line in lines:
        yield f"{'*' if line.matched else ' '}{SIGNS[line.kind]} {line.text}".rstrip()
