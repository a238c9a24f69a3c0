"""The whole models' part of the report: a Transformers model beside the same model under plain torch.compile."""

from __future__ import annotations

from tools.report import Document

MARKERS = ("<!-- models:begin -->", "<!-- models:end -->")
TITLES = {
    "prefill": "prefill, attention_mask given",
    "prefill-causal": "prefill, no padding",
    "decode": "decode, static cache, CUDA graph",
}
COLUMNS = {
    "ours": 'attn_implementation="lowered_attn"',
    "recognised": "untouched, recognised",
    "sdpa": "SDPA, plain",
    "flex": "Flex, plain",
    "flex-ahead": "Flex, a mask that costs nothing",
}
"""Variant and heading, left to right. One that no case has is left out."""


def block(document: Document, plot: str | None) -> str:
    """What stands between the markers, from `python -m tools.whole_models --output models.json`."""
    host = document["host"]
    measured = {row["variant"] for case in document["cases"] for row in case["rows"]}
    columns = {variant: heading for variant, heading in COLUMNS.items() if variant in measured}
    lines = [
        f"A Hugging Face model (Transformers {host['transformers']}) of {document['layers']} layers of Qwen3-8B's "
        f"shape, random weights, {document['dtype'].removeprefix('torch.')}: thousands of tokens/s, and how many times "
        "those of plain `torch.compile` with SDPA and with Flex.",
        "",
        "| case | " + " | ".join(columns.values()) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for case in document["cases"]:
        rows = {row["variant"]: row for row in case["rows"]}
        cells = [_cell(rows.get(variant)) for variant in columns]
        lines.append(f"| {TITLES[case['name']]}: {case['requests']} x {case['tokens']:,} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Medians of {document['rounds']} interleaved rounds. {host['gpu']}, torch {host['torch']}, {host['date']}, "
        f"commit {host['git_commit'][:12]}.",
    ]
    if not document.get("complete", True):  # files without the key were written at the end
        lines.append("The run was stopped before its last case.")
    return "\n".join([*lines, "", "```", host["command"], "```"])


def _cell(row: Document | None) -> str:
    if row is None:
        return ""
    if row["status"] != "ok":
        return str(row["status"]).upper()
    ratios = row["ratios"]
    beside = f" ({ratios['sdpa']:.2f}x, {ratios['flex']:.2f}x)" if {"sdpa", "flex"} <= ratios.keys() else ""
    return f"{row['tokens_per_s'] / 1e3:.1f}{beside}"
