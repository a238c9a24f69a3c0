"""Measure the eager dispatch beside FlashAttention-3 and cuDNN at about 150 shapes of dense self-attention.

    python -m tools.sweep --output tools/results/sweep.json
    python -m tools.sweep --only 'causal_d64*,full*' --variants '{"two": {"consumers": 2, "overlap": true}}'
    python -m tools.sweep --show tools/results/sweep.json

Points are those of `tools.sweep_cases`, entries those of `tools.sweep_entries`. Every kernel is compiled first, side by
side. Then each point: every entry's result is compared with float32 attention (with FlashAttention-3's or cuDNN's where
float32 would take long), a wrong one is never timed, and right ones are replayed as CUDA graphs in rounds A B C A B C,
L2 flushed before each: the host's part of a call is not in any time. The file is written as it goes;
`tools/results/README.md` describes it. At the end, ratios by class and what a table of choices would need.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tools import trial
from tools.bench import BAD_ARGUMENTS, DEVICE_LOST, NO_CUDA, SCHEMA, limited, write
from tools.bench_paged import graphed
from tools.cases import Case
from tools.host import command_of, host_facts
from tools.measure import Exact, Timer, cuda_timer, exact_attention
from tools.report import load
from tools.report_sweep import choices, line, summary
from tools.run_case import DeviceLostError, Say, Settings, in_one_line, measured_rows
from tools.sweep_cases import chosen, class_of, items_of, problem_of, scores_of
from tools.sweep_entries import (
    CUDNN,
    ENTRIES,
    FA3,
    Tiling,
    choice,
    compile_key,
    entries_of,
    first_call,
    jobs_of,
    tilings,
)
from tools.variants import Problem, Unavailable, Variant, peers_with_fa3

EXACT_SCORES = 2**31
"""Above this many scores, a peer's result stands in for float32's, which takes about 0.2 s for as many."""
POINT_LIMIT_S = 60
"""A point that takes longer has hung the GPU: the slowest take about 2 s."""
WORKERS = 12
TRIAL_SHARE = 0.4
"""Of the time limit, for compiling: what is not compiled by then is compiled where it is measured."""


# ------------------------------------------------------------------ one point


def run_point(
    case: Case,
    entries: Sequence[Variant[Problem]],
    settings: Settings,
    timer: Timer,
    device: torch.device,
    multiprocessors: int,
    fatal: Mapping[str, str],
    exact_scores: int = EXACT_SCORES,
) -> dict[str, Any]:
    """Check and time the entries at `case`: its part of the results file.

    `fatal` has the reasons, by entry, of those that are not run: failed rows. Raises DeviceLostError.
    """
    problem = problem_of(case, device, settings.seed)
    exact, against = reference(case, problem, exact_scores, fatal)
    rows = measured_rows(
        [graphed(entry, 1, fatal.get(entry.name)) for entry in entries],
        problem,
        exact,
        (case.flops, case.bytes),
        settings,
        timer,
        lambda text: None,
    )
    return {
        "name": case.name,
        "title": case.title,
        "class": list(class_of(case, multiprocessors)),
        "dtype": str(case.dtype).removeprefix("torch."),
        "q": list(problem.query.shape),
        "k": list(problem.key.shape),
        "v": list(problem.value.shape),
        "window": case.window,
        "items": items_of(case),
        "flops": case.flops,
        "bytes": case.bytes,
        "compared_with": against,
        "choice": choice(problem) if device.type == "cuda" else None,
        "rows": [_kept(row) for row in rows],
    }


def _kept(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the file keeps of a row: there are six hundred."""
    kept = {name: row[name] for name in ("variant", "ours", "status", "reason", "ms")}
    errors = row["errors"].get("out", {})
    return kept | {"rounds_ms": [round(ms, 6) for ms in row["rounds_ms"]], "error": errors.get("relative"),
                   "worst_row": errors.get("worst_row")}  # fmt: skip


def reference(
    case: Case, problem: Problem, exact_scores: int = EXACT_SCORES, fatal: Mapping[str, str] | None = None
) -> tuple[Exact, str]:
    """What results are compared with, and its name: `"float32"`, or a peer where that would take long.

    Where no peer can run, float32 however long it takes.
    """
    if scores_of(case) > exact_scores:
        for name in (FA3, CUDNN):
            if name in (fatal or {}):
                continue
            try:
                prepared = ENTRIES[name].prepare(problem)
                (out,) = prepared.outputs(prepared.run())
                return Exact(out.float()), name
            except Exception as error:  # its row says the same; the next one is asked
                _settle(problem.query.device, name, error)
    return exact_attention(
        case.form, problem.query, problem.key, problem.value, problem.operands, case.scale
    ), "float32"


def _settle(device: torch.device, name: str, error: Exception) -> None:
    """Raises DeviceLostError where the GPU no longer answers."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as lost:
            raise DeviceLostError(f"{name} broke the CUDA context: {in_one_line(error)}") from lost


# ------------------------------------------------------------------ all points


def sweep(
    cases: Sequence[Case],
    measure: Callable[[Case], dict[str, Any]],
    document: dict[str, Any],
    keep: Callable[[Mapping[str, Any]], object],
    limit_s: float | None,
    clock: Callable[[], float],
    say: Say = print,
) -> None:
    """Measure the cases into `document`, which `keep` gets after each, until `clock` (in s) passes `limit_s`.

    Raises DeviceLostError, the document kept.
    """
    for index, case in enumerate(cases):
        if limit_s is not None and clock() > limit_s:
            document["not_reached"] = [later.name for later in cases[index:]]
            say(f"stopped after {limit_s:.0f} s: {index} of {len(cases)} points reached")
            break
        try:
            result = measure(case)
        except DeviceLostError as error:
            document["stopped"] = f"{case.name}: {error}"
            document["not_reached"] = [later.name for later in cases[index:]]
            keep(document)
            raise
        except Exception as error:  # not an entry's fault: the point cannot be made, memory for one
            document.setdefault("skipped", {})[case.name] = f"{type(error).__name__}: {in_one_line(error)}"
            say(f"{case.name}: not measured: {document['skipped'][case.name]}")
            continue
        document["cases"].append(result)
        keep(document)
        say(f"{index + 1:3d}/{len(cases)} {clock():4.0f} s  {line(result)}")
    document["complete"] = not ({"not_reached", "skipped"} & document.keys())
    keep(document)


def main(arguments: Sequence[str] | None = None) -> int:
    begin = time.perf_counter()
    parser = argparse.ArgumentParser(prog="python -m tools.sweep", description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--output", type=Path, default=Path("out/sweep.json"))
    parser.add_argument("--commit", help="the git commit to record, for a copy of the tree without .git")
    parser.add_argument("--limit-s", type=float, help="begin no point later than this many seconds after the start")
    parser.add_argument("--only", help="patterns of points, separated by commas: 'causal_d64*,*_s4001'")
    parser.add_argument("--entries", default=",".join(ENTRIES), help="some of these, separated by commas")
    parser.add_argument(
        "--variants",
        help="""other tilings of the Hopper kernel, as JSON or a file of it: '{"two": {"consumers": 2}}'""",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rep-ms", type=float, default=8, help="measured time of one entry in one round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=WORKERS, help="processes that compile beforehand, 0 for none")
    parser.add_argument("--list", action="store_true", help="print the points and stop")
    parser.add_argument("--show", type=Path, help="print what a results file says and stop; needs no GPU")
    options = parser.parse_args(list(sys.argv[1:] if arguments is None else arguments))
    try:
        cases = chosen(options.only)
        names = [name.strip() for name in options.entries.split(",")]
        if not set(names) <= set(ENTRIES) or options.rounds < 1:
            raise ValueError(
                f"--entries: expected some of {', '.join(ENTRIES)}, --rounds: at least 1; got {options.entries} and "
                f"{options.rounds}"
            )
        extra = tilings(options.variants)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return BAD_ARGUMENTS
    if options.list:
        for case in cases:
            print(f"{case.name:45s} {case.title}")
        return 0
    if options.show is not None:
        document = load(options.show)
        print("\n".join([*map(line, document["cases"]), "", summary(document), "", choices(document)]))
        return 0
    if not torch.cuda.is_available():
        print(
            f"tools.sweep: expected a CUDA device and a CUDA build of torch, got torch {torch.__version__} without a "
            "CUDA device; run it on a machine with a GPU",
            file=sys.stderr,
        )
        return NO_CUDA
    return _measure(options, command_of(parser, options), cases, names, extra, lambda: time.perf_counter() - begin)


def _measure(
    options: argparse.Namespace,
    command: str,
    cases: Sequence[Case],
    names: Sequence[str],
    extra: Sequence[Tiling],
    clock: Callable[[], float],
) -> int:
    say = functools.partial(print, flush=True)
    device = torch.device("cuda", torch.cuda.current_device())
    settings = Settings(rounds=options.rounds, warmup_ms=2, rep_ms=options.rep_ms, seed=options.seed)
    facts = torch.cuda.get_device_properties(device)
    try:
        peers_with_fa3()
    except Unavailable as error:
        say(f"no FlashAttention-3 at any point: {error}")
    jobs = jobs_of(cases, names, extra, facts.L2_cache_size)
    fatal: dict[tuple[object, ...], str] = {}
    if options.workers:
        until_s = None if options.limit_s is None else options.limit_s * TRIAL_SHARE - clock()
        first = functools.partial(first_call, extra)
        lost = trial.try_all(first, list(jobs.values()), settings.seed, options.workers, trial.PATIENCE_S, until_s, say)
        fatal = {key: lost[job] for key, job in jobs.items() if job in lost}
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "host": host_facts(command, options.commit),
        "settings": dataclasses.asdict(settings),
        "points": len(cases),
        "complete": False,
        "cases": [],
    }
    say(f"{facts.name}, {len(cases)} points, {clock():.0f} s so far")
    timer = cuda_timer(settings.warmup_ms, settings.rep_ms)
    gc.collect()
    gc.freeze()  # what is imported is not looked through at every capture

    def late(case: Case) -> None:
        document["stopped"] = f"{case.name}: not done after {POINT_LIMIT_S} s: a kernel hangs"
        write(options.output, document)
        print(document["stopped"], file=sys.stderr, flush=True)
        os._exit(DEVICE_LOST)  # the main thread waits for the GPU and cannot be stopped otherwise

    def measure(case: Case) -> dict[str, Any]:
        entries = entries_of(case, names, extra)
        keys = {entry.name: compile_key(case, entry.name, facts.L2_cache_size) for entry in entries}
        dead = {name: fatal[key] for name, key in keys.items() if key in fatal}
        with limited(POINT_LIMIT_S, functools.partial(late, case)):
            result = run_point(case, entries, settings, timer, device, facts.multi_processor_count, dead)
        gc.collect()
        torch.cuda.empty_cache()
        return result

    keep = functools.partial(write, options.output)
    try:
        sweep(cases, measure, document, keep, options.limit_s, clock, say)
    except DeviceLostError as error:
        print(f"stopped: {error}", file=sys.stderr, flush=True)
    say("\n".join(["", summary(document), "", choices(document)]))
    say(f"{options.output}: {len(document['cases'])} of {len(cases)} points in {clock():.0f} s")
    return DEVICE_LOST if "stopped" in document else 0


if __name__ == "__main__":
    sys.exit(main())
