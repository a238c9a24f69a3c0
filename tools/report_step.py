"""The whole step's part of the report: where the time of one step of an 8B-shaped model goes."""

from __future__ import annotations

from tools.report import Document

MARKERS = ("<!-- step:begin -->", "<!-- step:end -->")


def block(document: Document, plot: str | None) -> str:
    """What stands between the markers, from `python -m tools.serve.whole_step --output whole_step.json`."""
    host = document["host"]
    lines = [
        f"A whole step as one CUDA graph: {document['layers']} layers of an 8B-like shape with random weights, "
        f"{document['dtype'].removeprefix('torch.')}, {document['batch']} requests with {document['context']:,} tokens "
        f"each, pages of {document['page_size']}.",
        "",
        "| step | time | tokens/s | attention | matmul | the rest | schedule | metadata |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for step in document["steps"]:
        kinds, whole = step["us_by_kind"], sum(step["us_by_kind"].values())
        shares = " | ".join(f"{kinds[kind] / whole:.1%}" for kind in ("attention", "matmul", "rest"))
        lines.append(
            f"| {step['name']}: {step['rows']:,} new tokens | {step['step_ms']:.1f} ms | {step['tokens_per_s']:,} "
            f"| {shares} | {step['schedule_us']:.1f} us | {step['metadata_us']:.0f} us |"
        )
    lines += [
        "",
        f"Shares are of the kernels' time. {host['gpu']}, torch {host['torch']}, {host['date']}, commit "
        f"{host['git_commit'][:12]}.",
        "",
        "```",
        host["command"],
        "```",
    ]
    return "\n".join(lines)
