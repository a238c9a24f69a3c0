"""An inspection as one HTML page: nothing is loaded from elsewhere, and no script runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from inductor_passes.gpu_facts import peak
from lowered_attn.inspect.calls import Call
from lowered_attn.inspect.capture import Inspection, Kernel
from lowered_attn.inspect.lines import Line, changes, graph_lines, source_lines
from lowered_attn.inspect.style import CSS
from lowered_attn.inspect.text import RESOURCES, SIGNS, amount, compiled_how, duration, resources_of, verdict

SECTIONS = {
    "decisions": "Decisions",
    "graphs": "Graphs",
    "attention": "Masks",
    "roofline": "Roofline",
    "kernels": "Kernels",
    "code": "Generated code",
}
FORBID = "default-src 'none'; style-src 'unsafe-inline'"
"""The page's own policy: a browser loads nothing for it and runs nothing in it."""


def render(inspection: Inspection) -> str:
    """The whole page."""
    parts = {
        "decisions": _decisions(inspection),
        "graphs": _graphs(inspection),
        "attention": _masks(inspection.calls),
        "roofline": _roofline(inspection),
        "kernels": _kernels(inspection),
        "code": _code(inspection.kernels),
    }
    links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title in SECTIONS.items())
    body = "\n".join(
        f'<section id="{name}"><h2>{SECTIONS[name]}</h2>\n{"".join(part)}</section>' for name, part in parts.items()
    )
    name = escape(inspection.name)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{FORBID}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name} on {escape(inspection.arch)}</title>
<style>{CSS}</style>
</head>
<body>
<a class="skip" href="#decisions">Skip to the decisions</a>
<header>
<h1>{name}</h1>
<p class="verdict">{escape(verdict(inspection))}</p>
<p class="soft">Compiled {escape(compiled_how(inspection))}.</p>
<nav aria-label="Sections"><ul>{links}</ul></nav>
</header>
<main>
{body}
</main>
</body>
</html>
"""


def _scroll(label: str, inside: str) -> str:
    """A part that may be wider than the screen: the keyboard can reach and move it."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">{inside}</div>\n'


def _table(label: str, heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """`rows` are HTML already; `numbers` are the columns to align to the right."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = "".join(
        "<tr>"
        + "".join(f'<td class="number">{c}</td>' if i in numbers else f"<td>{c}</td>" for i, c in enumerate(row))
        + "</tr>"
        for row in rows
    )
    table = f"<table><caption>{escape(label)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return _scroll(label, table)


def _block(label: str, lines: Iterable[Line]) -> str:
    return _scroll(label, f"<pre>{''.join(map(_shown, lines))}</pre>")


def _shown(line: Line) -> str:
    kinds = " ".join(filter(None, (line.kind, "matched" if line.matched else "")))
    sign = SIGNS[line.kind] + " " if line.kind in ("added", "removed", "fused") else "  "
    return f"<span{f' class={chr(34)}{kinds}{chr(34)}' if kinds else ''}>{escape(sign + line.text)}</span>"


def _details(title: str, inside: str, is_open: bool = False) -> str:
    return f"<details{' open' if is_open else ''}><summary>{title}</summary>\n{inside}</details>\n"


def _decisions(inspection: Inspection) -> Iterator[str]:
    if inspection.decisions:
        rows = [
            (
                f'<span class="stage {d.stage}">{d.stage}</span>',
                f"<code>{escape(d.op)}</code>",
                f"<code>{escape(d.node)}</code> {escape(str(d.facts.get('module', '')))}",
                escape(d.detail),
            )
            for d in inspection.decisions
        ]
        yield _table("What the compiler decided about each attention op", ("Stage", "Op", "Node", "What and why"), rows)
    else:
        yield "<p>The compiler found nothing to decide about: no attention op is in the graph.</p>\n"
    if inspection.breaks:
        rows = [(f"{count}", escape(reason)) for reason, count in inspection.breaks.items()]  # type: ignore[misc]
        yield _table("Graph breaks", ("Times", "Reason"), rows, (0,))


def _graphs(inspection: Inspection) -> Iterator[str]:
    matched = [d.node for d in inspection.decisions]
    yield "<p class='soft'>A bar at the left marks the nodes that the decisions above name.</p>\n"
    for i, graph in enumerate(inspection.graphs):
        title = f"Your graph {i + 1} of {len(inspection.graphs)}, as Dynamo traced it"
        yield _details(title, _block(title, graph_lines(graph, matched)))
    for name, before, after in inspection.passes:
        yield f"<h3>Pass {escape(name)}</h3>\n" + _block(f"Changes of {name}", changes(before, after, matched))
        for when, graph in (("before", before), ("after", after)):
            title = f"The whole graph {when} {name}"
            yield _details(escape(title), _block(title, graph_lines(graph, matched)))
    if not inspection.passes:
        yield "<p>No pass changed a graph.</p>\n"


def _masks(calls: Iterable[Call]) -> Iterator[str]:
    drawn: dict[str, list[str]] = {}
    notes: dict[str, str] = {}
    for call in calls:
        if call.picture is not None:
            svg = call.picture.svg().replace(' xmlns="http://www.w3.org/2000/svg"', "")  # HTML knows it
            drawn.setdefault(svg, []).append(call.node)
            notes[svg] = call.picture.note
    for svg, nodes in drawn.items():
        which = f"<code>{escape(', '.join(nodes))}</code>"
        note = f" Drawn for {escape(notes[svg])}." if notes[svg] else ""
        picture = _scroll(f"Mask of {', '.join(nodes)}", svg)
        yield f"<figure>{picture}<figcaption class='soft'>{which}.{note}</figcaption></figure>\n"
    if not drawn:
        yield "<p>There is no mask of ours to draw.</p>\n"


def _roofline(inspection: Inspection) -> Iterator[str]:
    rows = []
    for call in inspection.calls:
        least = call.roofline(inspection.arch)
        rows.append((
            f"<code>{escape(call.node)}</code>", call.phase, escape(call.shapes), amount(call.flops, "FLOP"),
            amount(call.bytes, "B"), f"{least.intensity:.3g}", duration(least.seconds), least.bound_by,
            escape(call.bound),
        ))  # fmt: skip
    if not rows:
        yield "<p>There is no attention call to measure.</p>\n"
        return
    heads = ("Node", "Phase", "Sizes", "FLOP", "Bytes", "FLOP/B", "Least time", "Bound by", "Counts are")
    yield _table("Attention calls, by the GPU's data sheet", heads, rows, (3, 4, 5, 6))
    yield f"<figure>{_scroll('Roofline', _chart(inspection))}</figure>\n"


def _chart(inspection: Inspection) -> str:
    """Operations a byte to the right, attainable operations a second upwards; both logarithmic."""
    limits = peak(inspection.arch)
    top = limits.flops(inspection.calls[0].dtype)
    points = [(max(c.roofline(inspection.arch).intensity, 0.1), c) for c in inspection.calls]
    left, right = -1.0, max(4.0, *(math.log10(x) + 0.5 for x, _ in points))
    high = math.log10(top) + 0.3
    low = math.log10(limits.bandwidth) + left

    def x_of(intensity: float) -> float:
        return 60 + 560 * (math.log10(intensity) - left) / (right - left)

    def y_of(flops: float) -> float:
        return 260 - 230 * (math.log10(flops) - low) / (high - low)

    ridge = top / limits.bandwidth
    path = f"M{x_of(10**left):.1f} {y_of(limits.bandwidth * 10**left):.1f}L{x_of(ridge):.1f} {y_of(top):.1f}H620"
    marks = []
    for intensity, call in points:
        flops = min(limits.flops(call.dtype), intensity * limits.bandwidth)
        about = escape(f"{call.node}: {amount(flops, 'FLOP/s')} at {intensity:.3g} FLOP/B")
        marks.append(
            f'<circle class="point" cx="{x_of(intensity):.1f}" cy="{y_of(flops):.1f}" r="5">'
            f"<title>{about}</title></circle>"
        )
    ticks = "".join(
        f'<text x="{x_of(10.0**i):.1f}" y="278" text-anchor="middle">{10.0**i:g}</text>'
        for i in range(math.ceil(left), math.floor(right) + 1)
    )
    label = escape(
        f"{inspection.gpu}: {amount(limits.bandwidth, 'B/s')}, {amount(top, 'FLOP/s')}; a dot is the most that a call "
        "can reach"
    )
    return (
        f'<svg class="roof" viewBox="0 0 640 310" width="640" height="310" role="img" aria-label="{label}">'
        f'<path class="axis" d="M60 20V260H620" fill="none"/><path class="limit" d="{path}"/>{"".join(marks)}{ticks}'
        f'<text x="340" y="300" text-anchor="middle">operations a byte</text><text x="60" y="12">{label}</text></svg>'
    )


def _kernels(inspection: Inspection) -> Iterator[str]:
    rows = []
    for kernel in inspection.kernels:
        values = [escape(value) for value in resources_of(kernel)]
        problems = kernel.resources.problems if kernel.resources is not None else []
        problem = escape("; ".join(problems)) or "none"
        rows.append((f"<code>{escape(kernel.name)}</code>", kernel.phase, *values, problem))
    if rows:
        heads = ("Kernel", "Phase", *map(str.capitalize, RESOURCES), "Problems")
        yield _table("Registers are a thread's, shared memory is bytes a block", heads, rows, (2, 3, 4))
    else:
        yield "<p>No kernel was generated.</p>\n"
    if inspection.outside:
        rows = [(f"<code>{escape(name)}</code>", f"{count}") for name, count in inspection.outside.items()]
        yield _table("Calls that have no generated code", ("Call", "Times"), rows, (1,))


def _code(kernels: Iterable[Kernel]) -> Iterator[str]:
    for kernel in kernels:
        inside = f"<p class='soft'>Computes {escape(', '.join(kernel.fuses))}.</p>\n" if kernel.fuses else ""
        marked = ""
        if kernel.source:
            source = source_lines(kernel.source, kernel.from_template)
            if kernel.from_template:
                inside += f"<p>{_fused_sentence(len(source.fused))}</p>\n"
                marked = f", {len(source.fused)} fused lines"
            inside += _block(f"Triton of {kernel.name}", source.body)
            for title, lines in (("Functions that it calls", source.helpers), ("Imports and settings", source.head)):
                if lines:
                    inside += _details(title, _block(f"{title} of {kernel.name}", lines))
        else:
            inside += "<p>An op launches this kernel itself: custom_ops/kernels has its source.</p>\n"
        if kernel.resources is not None:
            ptx = [Line(line) for line in kernel.resources.ptx.splitlines()]
            inside += _details(f"PTX, {len(ptx)} lines", _block(f"PTX of {kernel.name}", ptx))
        yield _details(f"<code>{escape(kernel.name)}</code> ({kernel.phase}{marked})", inside, kernel.from_template)


def _fused_sentence(count: int) -> str:
    if count == 0:
        return "An attention template into which nothing is fused: it stores what it computes."
    return f"An attention template. Inductor fused other ops into it: the {count} marked lines, each with a “&gt;”."
