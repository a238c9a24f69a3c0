"""Measure named cases on this machine's GPU: lowered-attn beside SDPA, FlexAttention and FlashAttention-3.

    python -m tools.bench --cases dense --output tools/results/dense.json

Every variant's result is compared with an independent one first; a wrong result is reported as wrong and
never timed. Then the variants are timed in rounds, A B C A B C. The file is written after every case, so a
run that is stopped keeps what it has. `tools/results/README.md` describes the file; `python -m tools.report`
makes tables and plots of it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tools.cases import CASES, Case
from tools.host import host_facts
from tools.measure import cuda_split, cuda_timer
from tools.run_case import DeviceLostError, Settings, run_case
from tools.variants import VARIANTS, Variant

SCHEMA = 1
"""Of the results file; `tools.report` refuses another."""

NO_CUDA, BAD_ARGUMENTS, DEVICE_LOST = 2, 2, 3


# ------------------------------------------------------------------ printing

COMPARED = {"flex": "Flex", "sdpa-cudnn": "cuDNN", "fa3": "FA3"}
"""The peers that the printed table gives ratios to: variant and heading."""


def table(result: Mapping[str, Any]) -> str:
    """A case as a table for the terminal. A ratio says how many times as fast as that peer the row is."""
    peer_ms = {
        row["variant"]: row["ms"] for row in result["rows"] if row["variant"] in COMPARED and row["status"] == "ok"
    }
    heads = " ".join(f"{'x ' + COMPARED[p]:>8s}" for p in peer_ms)
    timing = f"{'ms':>9s} {'min..max':>17s} {'GPU ms':>8s} {'host ms':>8s}"
    lines = [f"  {'variant':16s} {timing} {'TFLOP/s':>8s} {'TB/s':>7s} {'error':>8s} {heads}"]
    for row in result["rows"]:
        if row["status"] != "ok":
            lines.append(f"  {row['variant']:16s} {row['status'].upper()}: {row['reason'][:90]}")
            continue
        error = max(e["relative"] for e in row["errors"].values())
        ratios = " ".join(f"{ms / row['ms']:8.2f}" for ms in peer_ms.values())
        spread = f"{row['ms_min']:.4f}..{row['ms_max']:.4f}"
        apart = " ".join(f"{'' if row[w] is None else format(row[w], '.4f'):>8s}" for w in ("device_ms", "host_ms"))
        rates = f"{row['tflop_per_s']:8.1f} {row['tb_per_s']:7.3f}"
        lines.append(f"  {row['variant']:16s} {row['ms']:9.4f} {spread:>17s} {apart} {rates} {error:8.1e} {ratios}")
    return "\n".join(lines)


# ------------------------------------------------------------------ the command


def _choose(text: str, known: Mapping[str, Any], what: str) -> list[Any]:
    """The named entries of `known`, in the order given. Raises ValueError that lists the names there are."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(f"--{what}: expected some of {', '.join(known)}, got {', '.join(unknown) or 'nothing'}")
    return [known[name] for name in names]


def choose_cases(text: str) -> list[Case]:
    """`"all"`, `"dense"` (the rows of the published table) or names separated by commas."""
    if text == "all":
        return list(CASES.values())
    if text == "dense":
        return [case for case in CASES.values() if case.design_row]
    return _choose(text, CASES, "cases")


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Replace `path` with `document` as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    partial.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--cases", default="dense", help="names separated by commas, or dense, or all")
    parser.add_argument("--variants", default="default", help="names separated by commas, or default, or all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rep-ms", type=float, default=100, help="measured time of one variant in one round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("out/bench.json"))
    parser.add_argument("--commit", help="the git commit to record, for a copy of the tree without .git")
    parser.add_argument(
        "--keep-caches",
        action="store_true",
        help="use existing compile caches: compile times then mean little",
    )
    parser.add_argument("--list", action="store_true", help="print the names of the cases and variants, and stop")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    if options.list:
        print("cases:", *CASES, "variants:", *VARIANTS, sep="\n  ")
        return 0
    try:
        cases = choose_cases(options.cases)
        named = None if options.variants == "default" else list(VARIANTS.values())
        if options.variants not in ("default", "all"):
            named = _choose(options.variants, VARIANTS, "variants")
        if options.rounds < 1:
            raise ValueError(f"--rounds: expected at least 1, got {options.rounds}")
    except ValueError as error:
        print(error, file=sys.stderr)
        return BAD_ARGUMENTS
    if not torch.cuda.is_available():
        print(
            "tools.bench: expected a CUDA device and a CUDA build of torch, got torch "
            f"{torch.__version__} without a CUDA device; run it on a machine with a GPU",
            file=sys.stderr,
        )
        return NO_CUDA
    with contextlib.ExitStack() as stack:
        if not options.keep_caches:
            fresh = stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True))
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(fresh, "inductor")
            os.environ["TRITON_CACHE_DIR"] = os.path.join(fresh, "triton")
        return _measure(options, cases, named, _command(options))


def _command(options: argparse.Namespace) -> str:
    """The command to repeat, without what does not change the figures."""
    words = [
        "--cases",
        options.cases,
        "--variants",
        options.variants,
        "--rounds",
        options.rounds,
        "--rep-ms",
        options.rep_ms,
    ]
    return shlex.join(["python", "-m", "tools.bench", *map(str, words), "--seed", str(options.seed)])


def _measure(options: argparse.Namespace, cases: Sequence[Case], named: Sequence[Variant] | None, command: str) -> int:
    settings = Settings(rounds=options.rounds, rep_ms=options.rep_ms, seed=options.seed)
    device = torch.device("cuda", torch.cuda.current_device())
    say = functools.partial(print, flush=True)
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "host": host_facts(command, options.commit),
        "settings": {**dataclasses.asdict(settings), "fresh_caches": not options.keep_caches},
        "complete": False,
        "cases": [],
    }
    say("\n".join(f"{name}: {value}" for name, value in document["host"].items()))
    timer = cuda_timer(settings.warmup_ms, settings.rep_ms)
    begin = time.perf_counter()
    for case in cases:
        say(f"## {case.name} ({time.perf_counter() - begin:.0f} s so far)")
        try:
            result = run_case(case, named, settings, timer, device, say, cuda_split)
        except DeviceLostError as error:
            document["stopped"] = f"{case.name}: {error}"
            write(options.output, document)
            print(f"stopped: {error}. {options.output} keeps the cases before {case.name}.", file=sys.stderr)
            return DEVICE_LOST
        document["cases"].append(result)
        write(options.output, document)
        say(table(result))
        gc.collect()
        torch.cuda.empty_cache()
    document["complete"] = True
    write(options.output, document)
    say(f"{options.output}: {len(cases)} cases in {time.perf_counter() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
