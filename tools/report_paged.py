"""The report's parts about paged caches: from `paged.json` attention and the KV store, from `mla.json` latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tools.report import Document, Row, is_memory_bound, is_timed, rate, rows_of

MARKERS = ("<!-- paged:begin -->", "<!-- paged:end -->")
MLA_MARKERS = ("<!-- mla:begin -->", "<!-- mla:end -->")

HEADLINE, FA3 = "ours", "fa3"
COLUMNS = {
    "ours": "**new keys in the cache**",
    "ours-layer": "schedule shared",
    "ours-direct": "new keys read directly",
    "ours-triton": "portable Triton",
    "flashmla": "FlashMLA",
    "fa3": "FlashAttention-3",
    "vllm": "vLLM Triton",
    "vllm-split": "vLLM Triton, split",
}
"""Columns of the table of attention, left to right; one without a measured row is left out."""
STORE_COLUMNS = {"ours": "**one compiled function**", "separate": "separate kernels", "eager": "eager"}
"""Columns of the table of the store."""


def plotted(document: Document) -> list[Any]:
    """The cases of the plot: attention, the sweep over shapes left out, which has two variants a case."""
    return [case for case in document["cases"] if case["kind"] == "attention" and len(case["rows"]) > 2]


def block(document: Document, plot: str | None) -> str:
    """What stands between the markers; `plot` is the plot's path as README links it."""
    picture = [f"![Rate of each variant, a panel a paged case]({plot})", ""] if plot else []
    attention = [case for case in document["cases"] if case["kind"] == "attention"]
    store = [case for case in document["cases"] if case["kind"] == "store"]
    lines = [*picture, *_attention(attention, document), "", *_meaning(), ""]
    if store:
        lines += [*_store(store), "", *_store_meaning(), ""]
    return "\n".join([*lines, *caption(document)])


# ------------------------------------------------------------------ the tables


def _attention(cases: list[Any], document: Document) -> list[str]:
    shown = _shown(cases, COLUMNS)
    lines = _head([COLUMNS[name] for name in shown] + ["schedule", "aim"])
    for case in cases:
        rows = rows_of(case)
        memory_bound = is_memory_bound(case, document["host"])
        cells = [cell(rows.get(name), rows, memory_bound) for name in shown]
        lines.append(f"| {case['title']} | {' | '.join([*cells, _schedule(case), _aim(case, rows)])} |")
    return lines


def _store(cases: list[Any]) -> list[str]:
    shown = _shown(cases, STORE_COLUMNS)
    lines = _head([STORE_COLUMNS[name] for name in shown])
    for case in cases:
        rows = rows_of(case)
        lines.append(f"| {case['title']} | {' | '.join(cell(rows.get(name), rows, True) for name in shown)} |")
    return lines


def _shown(cases: list[Any], columns: Mapping[str, str]) -> list[str]:
    rows = [rows_of(case) for case in cases]
    return [
        name for name in columns if any(r.get(name, {"status": "unavailable"})["status"] != "unavailable" for r in rows)
    ]


def _head(columns: list[str]) -> list[str]:
    return ["| case | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]


def cell(row: Row | None, rows: Mapping[str, Row], memory_bound: bool) -> str:
    """Time and rate. A peer also says how many times as long as ours it takes; our others, how fast beside FA3."""
    if row is None or row["status"] == "unavailable":
        return "–"
    if row["status"] == "wrong":
        return "wrong result"
    if not is_timed(row):
        return "failed"
    text = f"{microseconds(row['ms'])}, {rate(row, memory_bound)}"
    if row["variant"] == HEADLINE:
        return f"**{text}**"
    ours = rows.get(HEADLINE)
    if row["ours"]:
        return f"{text}, {row['ratios'][FA3]:.2f}x FA3" if FA3 in row["ratios"] else text
    return f"{text}, {row['ms'] / ours['ms']:.2f}x" if ours is not None and is_timed(ours) else text


def microseconds(ms: float) -> str:
    """In us, with a digit after the point below 1 ms."""
    return f"{1e3 * ms:.1f} us" if ms < 1 else f"{1e3 * ms:.0f} us"


def _schedule(case: Mapping[str, Any]) -> str:
    us = case["schedule_us"].get(HEADLINE)
    return f"{us:.1f} us" if isinstance(us, float) else "–"


def _aim(case: Mapping[str, Any], rows: Mapping[str, Row]) -> str:
    if case["aim_ms"] is None:
        return "–"
    ours = rows.get(HEADLINE)
    reached = f" ({case['aim_ms'] / ours['ms']:.2f}x)" if ours is not None and is_timed(ours) else ""
    return f"{microseconds(case['aim_ms'])}{reached}"


# ------------------------------------------------------------------ the captions


def _meaning() -> list[str]:
    return [
        "Time and rate of one layer's attention as a CUDA-graph replay. The schedule is made once a step: the first "
        "layer's figure contains it, as do all but those under schedule shared, which is what every other layer "
        "takes. At peers, how many times as long as lowered-attn with the new keys "
        "in the cache they take; at our other columns, how many times as fast as FlashAttention-3; at the aim, how "
        "many times as fast as the aim (above 1, lowered-attn is faster). A dash: it cannot run the case, or was not "
        "run on it."
    ]


def _store_meaning() -> list[str]:
    return [
        "qk-norm, RoPE and the stores of K and V, for T tokens, q included. Separate kernels: the norm of q, the norm "
        "of k, RoPE of q and RoPE of k each compiled alone, and a kernel that stores K and V; their column says how "
        "many times as long as one compiled function they take."
    ]


def caption(document: Document) -> list[str]:
    """On what the figures were measured, what is missing, and how to repeat them."""
    host, settings = document["host"], document["settings"]
    rows = [row for case in document["cases"] for row in case["rows"] if is_timed(row)]
    commit = f", commit {host['git_commit'][:12]}" if host["git_commit"] else ""
    lines = [
        f"{host['gpu']}, torch {host['torch']}, triton {host['triton']}, CUDA {host['cuda']}, {host['date']}{commit}. "
        f"On the same machine a copy ran at {host['copy_tb_per_s']:.2f} TB/s and an 8192^3 bf16 matrix product at "
        f"{host['matmul_bf16_tflop_per_s']:.0f} TFLOP/s."
    ]
    if rows:
        spread = max((row["ms_max"] - row["ms_min"]) / row["ms"] for row in rows)
        error = max(e["relative"] for row in rows for e in row["errors"].values())
        lines.append(
            f"Median of {settings['rounds']} interleaved rounds, L2 flushed before every replay; the widest spread "
            f"between rounds is {spread:.1%}, the largest relative error against float32 {error:.1e}."
        )
    metadata = next((case["metadata"] for case in document["cases"] if case.get("metadata")), None)
    if metadata:
        lines.append(
            f"Handing a step's metadata ({metadata['bytes'] / 1024:.0f} KiB, first case) to the GPU takes the host "
            f"{metadata['host_us']:.0f} us and the GPU {metadata['device_us']:.0f} us."
        )
    missed = [
        f"{case['title']}, {row['title']}: {row['ratios'][target['peer']]:.2f}x {target['peer']}, wanted "
        f"{target['at_least']}x"
        for case in document["cases"]
        for row in case["rows"]
        for target in row["targets"]
        if target["met"] is False
    ]
    if missed:
        lines.append(f"Not reached: {'; '.join(missed)}.")
    if document.get("skipped"):
        lines.append(f"Not measured: {', '.join(document['skipped'])}.")
    if not document["complete"] and not document.get("skipped"):
        lines.append("The run was stopped before its last case.")
    return [*lines, "", "```", host["command"], "```"]
