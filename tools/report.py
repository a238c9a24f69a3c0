"""Write the measured figures into README.md, as a table, and plot them.

    python -m tools.report            # writes README.md and the plots beside the data in tools/results
    python -m tools.report --check    # exit 1 where they are not what the data gives

`dense.json` has to be there; `sweep.json`, `paged.json`, `whole_step.json` and `models.json` are reported where they
are (see `tools.report_sweep`, `tools.report_paged`, `tools.report_step` and `tools.report_models`). No figure appears
that is not in the data. A result that was wrong is shown as wrong, never with a time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = 1
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
RESULTS = Path("tools/results")

HEADLINE = "ours-compiled"
"""The variant that ratios are about."""
COLUMNS = {
    "ours-compiled": "**compiled**",
    "ours-eager": "eager",
    "fa3": "FlashAttention-3",
    "sdpa-cudnn": "cuDNN (SDPA)",
    "flex": "FlexAttention",
    "flex+mask": "Flex + block mask",
    "flex-autotuned": "Flex, autotuned",
    "sdpa-flash": "flash (SDPA)",
    "sdpa-efficient": "efficient (SDPA)",
}
"""Columns of the table, left to right: variant and heading. One without a measured row is left out."""

Row = Mapping[str, Any]
Document = Mapping[str, Any]


class ReportError(Exception):
    """The report cannot be made; the message says what is missing and what to do."""


def load(path: Path) -> dict[str, Any]:
    """A results file. Raises ReportError where there is none or its schema is another."""
    if not path.exists():
        raise ReportError(f"{path}: expected results, got no file; run python -m tools.bench --output {path}")
    document = json.loads(path.read_text())
    if document.get("schema") != SCHEMA:
        raise ReportError(f"{path}: expected schema {SCHEMA}, got {document.get('schema')}; run tools.bench again")
    return document


def rows_of(case: Mapping[str, Any]) -> dict[str, Row]:
    """The case's rows by variant."""
    return {row["variant"]: row for row in case["rows"]}


def is_timed(row: Row | None) -> bool:
    """Whether the row is a right result with a time: the only kind that is shown as a speed."""
    return row is not None and row["status"] == "ok" and row["ms"] is not None


def is_host_bound(row: Row) -> bool:
    """Whether a timed row's call takes over a tenth longer than its work on the GPU."""
    return row["device_ms"] is not None and row["ms"] > 1.1 * row["device_ms"]


def is_memory_bound(case: Mapping[str, Any], host: Mapping[str, Any]) -> bool:
    """Whether moving the case's bytes at the measured copy rate takes longer than its FLOPs at the matmul rate."""
    return case["bytes"] / host["copy_tb_per_s"] > case["flops"] / host["matmul_bf16_tflop_per_s"]


def rate(row: Row, memory_bound: bool) -> str:
    """A timed row's rate against what limits its case: TB/s where that is memory, else TFLOP/s."""
    return f"{row['tb_per_s']:.2f} TB/s" if memory_bound else f"{row['tflop_per_s']:.0f} TFLOP/s"


# ------------------------------------------------------------------ the table


def table(document: Document) -> str:
    """The results as Markdown: a row a case, a column a variant, then what they were measured with."""
    cases = document["cases"]
    shown = [name for name in COLUMNS if any(_has_news(rows_of(case).get(name)) for case in cases)]
    lines = [
        "| case | " + " | ".join(COLUMNS[name] for name in shown) + " |",
        "|---|" + "---|" * len(shown),
    ]
    for case in cases:
        rows = rows_of(case)
        memory_bound = is_memory_bound(case, document["host"])
        cells = [cell(rows.get(name), rows.get(HEADLINE), memory_bound) for name in shown]
        lines.append(f"| {case['title']} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *caption(document)])


def _has_news(row: Row | None) -> bool:
    return row is not None and row["status"] != "unavailable"


def cell(row: Row | None, ours: Row | None, memory_bound: bool) -> str:
    """Time and rate; for a peer also how many times as long as ours it takes."""
    if row is None or row["status"] == "unavailable":
        return "–"
    if row["status"] == "wrong":
        return "wrong result"
    if not is_timed(row):
        return "failed"
    gpu = f" (GPU {_ms(row['device_ms'])})" if is_host_bound(row) else ""
    text = f"{_ms(row['ms'])} ms{gpu}, {rate(row, memory_bound)}"
    if row["variant"] == HEADLINE:
        return f"**{text}**"
    if ours is not None and is_timed(ours) and not row["ours"]:
        return f"{text}, {row['ms'] / ours['ms']:.2f}x"
    return text


def _ms(ms: float) -> str:
    """Three or four significant digits, whatever the size."""
    return f"{ms:.2f}" if ms >= 1 else f"{ms:.3f}" if ms >= 0.1 else f"{ms:.4f}"


def caption(document: Document) -> list[str]:
    """What the figures are, on what they were measured, and how to repeat them."""
    host, settings = document["host"], document["settings"]
    rows = [row for case in document["cases"] for row in case["rows"] if is_timed(row)]
    lines = [
        "Time and rate of one call; at peers, how many times as long as compiled lowered-attn they take "
        "(above 1, lowered-attn is faster). Rows with backward time forward and backward together. "
        "A dash: it cannot run the case, or was not run on it.",
        "",
        f"{host['gpu']}, torch {host['torch']}, triton {host['triton']}, CUDA {host['cuda']}, "
        f"cuDNN {host['cudnn']}, "
        f"{host['date']}" + (f", commit {host['git_commit'][:12]}" if host["git_commit"] else "") + ". "
        f"On the same machine a copy ran at {host['copy_tb_per_s']:.2f} TB/s and an 8192^3 bf16 matrix "
        f"product at {host['matmul_bf16_tflop_per_s']:.0f} TFLOP/s.",
    ]
    if rows:
        spread = max((row["ms_max"] - row["ms_min"]) / row["ms"] for row in rows)
        error = max(e["relative"] for row in rows for e in row["errors"].values())
        lines.append(
            f"Median of {settings['rounds']} interleaved rounds, L2 flushed before every call; the widest "
            f"spread between rounds is {spread:.1%}, the largest relative error against float32 {error:.1e}."
        )
    if any(is_host_bound(row) for row in rows):
        lines.append(
            "In brackets, the time on the GPU alone where launching takes the host longer than that: a busy GPU or a "
            "CUDA graph hides the rest. Ratios and rates are of the whole time."
        )
    if not document["complete"]:
        lines.append("The run was stopped before its last case.")
    return [*lines, "", "```", host["command"], "```"]


# ------------------------------------------------------------------ README and plot


def digest(document: Document) -> str:
    """Short hash of the data, which the plot carries so that an old one can be told."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]


def block(document: Document, plot: str | None) -> str:
    """What stands between the markers; `plot` is the plot's path as README links it."""
    picture = [f"![Rate of each variant, a panel a case]({plot})", ""] if plot else []
    return "\n".join([*picture, table(document)])


@dataclass(frozen=True)
class Section:
    """A results file and its place in README."""

    name: str
    """`<name>.json` and `<name>.svg` in the folder of results."""
    markers: tuple[str, str]
    """The lines in README around what is written."""
    block: Callable[[Document, str | None], str]
    """What stands between them, from the data and the plot's path."""
    plotted: Callable[[Document], list[Any]] | None
    """The cases that the plot shows; None where there is no plot."""
    required: bool
    """Whether a missing results file is an error."""
    drawing: str = "draw"
    """The function of `tools.plot` that makes the plot of the data and of these cases."""


def sections() -> tuple[Section, ...]:
    """All of them, in README's order."""
    from tools import report_models, report_paged, report_step, report_sweep

    return (
        Section("dense", (BEGIN, END), block, lambda document: document["cases"], required=True),
        Section("sweep", report_sweep.MARKERS, report_sweep.block, report_sweep.plotted, False, "draw_sweep"),
        Section("paged", report_paged.MARKERS, report_paged.block, report_paged.plotted, required=False),
        Section("mla", report_paged.MLA_MARKERS, report_paged.block, report_paged.plotted, required=False),
        Section("whole_step", report_step.MARKERS, report_step.block, None, required=False),
        Section("models", report_models.MARKERS, report_models.block, None, required=False),
    )


def replaced(readme: str, text: str, name: str = "README.md", markers: tuple[str, str] = (BEGIN, END)) -> str:
    """`readme` with `text` between the markers.

    Raises ReportError where they are missing, repeated or the wrong way round.
    """
    first, last = markers
    begin, end = readme.find(first), readme.find(last)
    if begin < 0 or end < begin or readme.count(first) != 1 or readme.count(last) != 1:
        raise ReportError(
            f"{name}: expected one line {first} and, below it, one line {last}; add them where the table goes"
        )
    return f"{readme[: begin + len(first)]}\n{text}\n{readme[end:]}"


def stale(readme: Path, results: Path) -> list[str]:
    """What is out of date, in words; nothing where all is as the data in `results` gives it."""
    found = []
    text = readme.read_text()
    for section, document, plot in _given(results):
        written = section.block(document, _link(readme, plot))
        if replaced(text, written, str(readme), section.markers) != text:
            found.append(f"{readme}: the table is not what {plot.with_suffix('.json')} gives")
        if section.plotted is not None and (not plot.exists() or digest(document) not in plot.read_text()):
            found.append(f"{plot}: missing, or drawn from other data")
    return found


def _given(results: Path) -> list[tuple[Section, dict[str, Any], Path]]:
    """Each section that has data, its data and its plot's path."""
    return [
        (section, load(results / f"{section.name}.json"), results / f"{section.name}.svg")
        for section in sections()
        if section.required or (results / f"{section.name}.json").exists()
    ]


def _link(readme: Path, plot: Path) -> str:
    return Path(os.path.relpath(plot.resolve(), readme.resolve().parent)).as_posix()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.report", description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where something is out of date")
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of dense.json and paged.json")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    try:
        if options.check:
            found = stale(options.readme, options.results)
            for line in found:
                print(f"{line}; run python -m tools.report", file=sys.stderr)
            return 1 if found else 0
        plots = _write(options.readme, options.results)
    except ReportError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{options.readme} and {' and '.join(map(str, plots))} written")
    return 0


def _write(readme: Path, results: Path) -> list[Path]:
    """Write README and the plots; the paths of these. Raises ReportError before anything is written."""
    text, pictures = readme.read_text(), {}
    given = _given(results)
    for section, document, plot in given:
        text = replaced(text, section.block(document, _link(readme, plot)), str(readme), section.markers)
    try:
        from tools import plot as drawings
    except ImportError as error:
        raise ReportError(f"the plot needs matplotlib: {error}; pip install lowered-attn[bench]") from error
    for section, document, plot in given:
        if section.plotted is not None:
            pictures[plot] = getattr(drawings, section.drawing)(document, section.plotted(document))
    for plot, picture in pictures.items():
        plot.write_text(picture)
    readme.write_text(text)
    return list(pictures)


if __name__ == "__main__":
    sys.exit(main())
