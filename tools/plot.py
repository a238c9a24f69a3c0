"""Plots of results files: a bar a variant, or a dot a point of the sweep. SVG; needs matplotlib (the `bench` extra)."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tools.report import Document, digest, is_memory_bound, is_timed, rate
from tools.report_sweep import AT_LEAST, MASKS, standing

COLUMNS = 2
OURS, OURS_OTHER, PEER, INK = "#c2410c", "#fdba74", "#cbd5e1", "#1f2937"
MAIN = ("ours-compiled", "ours-autotuned", "ours")
"""Our variants in the stronger colour."""
BAR_HEIGHT_IN, HEAD_IN = 0.24, 0.62
"""Height of a bar, and of a panel's title and margins, in inches."""
# Text stays text (small file, searchable); ids are hashed with a fixed salt, so that equal data gives equal files.
STYLE: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "lowered-attn", "font.size": 8}
DIMS = {"64": "#2563eb", "96": "#0d9488", "128": "#c2410c", "192/128": "#7c3aed", "256": "#4b5563"}
"""Colours of the sweep's head dims."""


def draw(document: Document, cases: Sequence[Any] | None = None) -> str:
    """SVG text with the rate of every variant that gave a right result, fastest first.

    `cases` are those of `document` that are drawn, all where None; one without a right result is left out. Each
    panel has its own scale from 0. The same data gives the same bytes with the same matplotlib.
    """
    panels = [
        (case, sorted((row for row in case["rows"] if is_timed(row)), key=lambda row: row["ms"]))
        for case in (document["cases"] if cases is None else cases)
    ]
    panels = [(case, rows) for case, rows in panels if rows]
    memory_bound = [is_memory_bound(case, document["host"]) for case, _ in panels]
    count = max(1, math.ceil(len(panels) / COLUMNS))
    lines = [panels[i * COLUMNS : (i + 1) * COLUMNS] for i in range(count)]
    slots = [max((len(rows) for _, rows in line), default=1) for line in lines]
    heights = [HEAD_IN + BAR_HEIGHT_IN * n for n in slots]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, sum(heights)), layout="constrained", facecolor="white")
        axes = figure.subplots(count, COLUMNS, squeeze=False, gridspec_kw={"height_ratios": heights})
        for index, ax in enumerate(axes.flat):
            if index < len(panels):
                _panel(ax, slots[index // COLUMNS], memory_bound[index], *panels[index])
            else:
                ax.set_axis_off()
        return _svg(figure, document)


def _svg(figure: Figure, document: Document) -> str:
    out = io.StringIO()
    figure.savefig(
        out,
        format="svg",
        metadata={
            "Date": None,
            "Title": f"Attention on {document['host']['gpu']}",
            "Description": f"data {digest(document)}",
        },
    )
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _panel(ax: Any, slots: int, memory_bound: bool, case: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """One case's bars, fastest on top, in room for `slots` of them."""
    rates = [1 / row["ms"] for row in rows]  # within a case every rate is its constant over the time
    colours = [PEER if not row["ours"] else OURS if row["variant"] in MAIN else OURS_OTHER for row in rows]
    bars = ax.barh(range(len(rows)), rates, height=0.74, color=colours)
    ax.bar_label(bars, [f"{rate(row, memory_bound)}, {row['ms']:.3g} ms" for row in rows], padding=3, color=INK)
    ax.set_yticks(range(len(rows)), [row["title"] for row in rows])
    for label, row in zip(ax.get_yticklabels(), rows, strict=True):
        label.set_color(INK)
        label.set_fontweight("bold" if row["ours"] else "normal")
    ax.set_ylim(slots - 0.5, -0.5)
    ax.set_xlim(0, 1.45 * max(rates))  # room for the label of the longest bar
    ax.set_xticks([])
    ax.tick_params(length=0)
    ax.spines[["top", "right", "bottom"]].set_visible(False)
    ax.spines["left"].set_color("#9ca3af")
    ax.set_title(case["title"], loc="left", fontsize=9, color=INK)


def draw_sweep(document: Document, cases: Sequence[Any]) -> str:
    """SVG text: a panel a mask, a dot a point; the better peer's time over ours against the work of the call.

    A filled dot is the Hopper kernel, a ring cuDNN or the Triton one. The lower line is what every point has to reach.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 6), layout="constrained", facecolor="white")
        axes = figure.subplots(2, 2, sharex=True, sharey=True)
        for ax, mask in zip(axes.flat, MASKS, strict=True):
            ax.axhline(1, color="#9ca3af", linewidth=0.8)
            ax.axhline(AT_LEAST, color="#dc2626", linewidth=0.8, linestyle="--")
            for dims, colour in DIMS.items():
                points = [case for case in cases if case["class"][:2] == [mask, dims]]
                hopper = [bool(case["choice"]) and case["choice"]["kernel"] == "gluon" for case in points]
                ax.scatter(
                    [case["flops"] / 1e9 for case in points],
                    [standing(case) for case in points],
                    s=18,
                    facecolors=[colour if ours else "none" for ours in hopper],
                    edgecolors=colour,
                    linewidths=0.9,
                )
            ax.set_xscale("log")
            ax.spines[["top", "right"]].set_visible(False)
            ax.set_title(mask, loc="left", fontsize=9, color=INK)
        dots = {f"D {dims}": (colour, colour) for dims, colour in DIMS.items()}
        dots |= {"Hopper kernel": (INK, INK), "cuDNN or Triton": (INK, "none")}
        handles = [
            Line2D([], [], ls="", marker="o", markersize=4, markeredgecolor=edge, markerfacecolor=face, label=label)
            for label, (edge, face) in dots.items()
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
        figure.supxlabel("GFLOP of the call", fontsize=8, color=INK)
        figure.supylabel("time of the better of FlashAttention-3 and cuDNN over ours", fontsize=8, color=INK)
        return _svg(figure, document)
