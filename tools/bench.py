"""Measure named cases on this machine's GPU: lowered-attn beside SDPA, FlexAttention, FlashAttention-3 and vLLM.

    python -m tools.bench --cases dense --output tools/results/dense.json
    python -m tools.bench --cases paged --output tools/results/paged.json
    python -m tools.bench --cases mla --output tools/results/mla.json

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
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tools import bench_paged, gated, trial
from tools.cases import CASES, Case
from tools.host import host_facts
from tools.measure import cuda_split, cuda_timer
from tools.run_case import DeviceLostError, Settings, in_one_line, run_case
from tools.variants import VARIANTS

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


@dataclasses.dataclass(frozen=True)
class Suite:
    """Cases that are measured alike."""

    cases: Mapping[str, Any]
    """By name."""
    variants: Mapping[str, Any]
    """By name."""
    groups: Mapping[str, Callable[[Any], object]]
    """By a name for `--cases`, which cases it stands for."""
    run: Callable[..., dict[str, Any]]
    """`run(case, names of variants or None, settings, timer, device, say, split, fatal)`."""
    table: Callable[[Mapping[str, Any]], str]
    """A result for the terminal."""
    trial_workers: int = 0
    """Processes that try every first call before anything is measured; see `tools.trial`."""
    case_limit_s: float | None = None
    """A case that takes longer has hung the GPU."""


def _run_dense(
    case: Case, names: Sequence[str] | None, settings: Settings, timer: Any, device: Any, say: Any, split: Any, _: Any
) -> dict[str, Any]:
    named = None if names is None else [VARIANTS[name] for name in names]
    return run_case(case, named, settings, timer, device, say, split)


SUITES = (
    Suite(CASES, VARIANTS, {"dense": lambda case: case.design_row, "all": lambda case: True}, _run_dense, table),
    Suite(
        bench_paged.CASES,
        bench_paged.VARIANTS,
        bench_paged.GROUPS,
        bench_paged.run_case,
        bench_paged.table,
        trial_workers=8,
        case_limit_s=90,
    ),
    Suite(gated.CASES, gated.VARIANTS, {"gate": lambda case: True}, gated.run_case, table),
)


def choose_cases(text: str) -> tuple[Suite, list[Any]]:
    """`"all"` or `"dense"` (the published table's rows), `"paged"`, `"store"`, `"mla"`, `"gate"`, or names with commas.

    Names come from one suite. Raises ValueError that lists the names there are.
    """
    names = {name.strip() for name in text.split(",")}
    for suite in SUITES:
        if text in suite.groups:
            return suite, [case for case in suite.cases.values() if suite.groups[text](case)]
        if names & set(suite.cases):
            return suite, _choose(text, suite.cases, "cases")
    return SUITES[0], _choose(text, {name: None for suite in SUITES for name in suite.cases}, "cases")


@contextlib.contextmanager
def limited(seconds: float | None, late: Callable[[], object]) -> Iterator[None]:
    """Call `late` on another thread when the block takes longer than `seconds`: a hung GPU holds this one for good."""
    clock = threading.Timer(seconds or 0, late)
    clock.daemon = True
    if seconds is not None:
        clock.start()
    try:
        yield
    finally:
        clock.cancel()


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Replace `path` with `document` as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    partial.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--cases", default="dense", help="names with commas, or dense, all, paged, store, mla, gate")
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
    parser.add_argument("--limit-s", type=float, help="begin no case later than this many seconds after the start")
    parser.add_argument(
        "--trial-workers", type=int, help="processes that try every first call beforehand, 0 for none (paged: 8)"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the cases and variants, and stop")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    if options.list:
        for suite in SUITES:
            print("cases:", *suite.cases, "variants:", *suite.variants, sep="\n  ")
        return 0
    try:
        suite, cases = choose_cases(options.cases)
        names = None if options.variants == "default" else list(suite.variants)
        if options.variants not in ("default", "all"):
            names = [variant.name for variant in _choose(options.variants, suite.variants, "variants")]
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
        return _measure(options, suite, cases, names, _command(options))


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
    words += ["--seed", options.seed]
    if options.limit_s is not None:
        words += ["--limit-s", options.limit_s]
    return shlex.join(["python", "-m", "tools.bench", *map(str, words)])


def _measure(
    options: argparse.Namespace, suite: Suite, cases: Sequence[Any], names: Sequence[str] | None, command: str
) -> int:
    settings = Settings(rounds=options.rounds, rep_ms=options.rep_ms, seed=options.seed)
    device = torch.device("cuda", torch.cuda.current_device())
    say = functools.partial(print, flush=True)
    begin = time.perf_counter()
    workers = suite.trial_workers if options.trial_workers is None else options.trial_workers
    fatal = {}
    if workers:
        # Half of the time at most: what is not tried is measured all the same.
        until_s = options.limit_s and options.limit_s / 2
        bench_paged.unpack_peers()
        jobs = bench_paged.jobs_of(cases, names)
        fatal = trial.try_all(bench_paged.first_call, jobs, settings.seed, workers, trial.PATIENCE_S, until_s, say)
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "host": host_facts(command, options.commit),
        "settings": {**dataclasses.asdict(settings), "fresh_caches": not options.keep_caches},
        "complete": False,
        "cases": [],
    }
    say("\n".join(f"{name}: {value}" for name, value in document["host"].items()))
    timer = cuda_timer(settings.warmup_ms, settings.rep_ms)

    def stop(name: str, reason: object) -> int:
        document["stopped"] = f"{name}: {reason}"
        write(options.output, document)
        print(f"stopped: {reason}. {options.output} keeps the cases before {name}.", file=sys.stderr, flush=True)
        return DEVICE_LOST

    def late(name: str) -> None:
        stop(name, f"not done after {suite.case_limit_s} s: a kernel hangs")
        os._exit(DEVICE_LOST)  # the main thread waits for the GPU and cannot be stopped otherwise

    for case in cases:
        if options.limit_s is not None and time.perf_counter() - begin > options.limit_s:
            document.setdefault("skipped", {})[case.name] = f"the time was up, {options.limit_s:.0f} s"
            continue
        say(f"## {case.name} ({time.perf_counter() - begin:.0f} s so far)")
        try:
            with limited(suite.case_limit_s, functools.partial(late, case.name)):
                result = suite.run(case, names, settings, timer, device, say, cuda_split, fatal)
        except DeviceLostError as error:
            return stop(case.name, error)
        except Exception as error:  # not a variant's fault: the case cannot be made, memory for one
            reason = f"{type(error).__name__}: {in_one_line(error)}"
            say(f"  not measured: {reason}")
            document.setdefault("skipped", {})[case.name] = reason
            continue
        document["cases"].append(result)
        write(options.output, document)
        say(suite.table(result))
        gc.collect()
        torch.cuda.empty_cache()
    document["complete"] = "skipped" not in document
    write(options.output, document)
    say(f"{options.output}: {len(document['cases'])} of {len(cases)} cases in {time.perf_counter() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
