"""One paged case, measured: checked against float32, then replayed as CUDA graphs in interleaved rounds.

`python -m tools.bench --cases paged` (or `mla`) runs these cases; rows are those of `tools.run_case`, with ratios.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tools.latent_cases import LATENT_CASES
from tools.measure import Exact, Graph, Split, Timer
from tools.paged_cases import AIM, PAGED_CASES, PagedCase, PagedProblem, Target, exact_paged
from tools.paged_variants import PAGED_VARIANTS, schedule_of, tilings
from tools.run_case import DeviceLostError, P, Say, Settings, in_one_line, measured_rows
from tools.store_cases import STORE_CASES, STORE_VARIANTS, StoreCase, exact_store
from tools.variants import Prepared, Unavailable, Variant, peers_with_fa3

CASES: dict[str, PagedCase | StoreCase] = {**PAGED_CASES, **STORE_CASES, **LATENT_CASES}
"""Every case over a paged cache by name, in order."""
GROUPS: dict[str, Callable[[PagedCase | StoreCase], object]] = {
    "paged": lambda case: case.name not in LATENT_CASES,
    "store": lambda case: case.name in STORE_CASES,
    "mla": lambda case: case.name in LATENT_CASES,
}
"""What `--cases` may name instead of cases; each of paged and mla has a results file of its own."""
VARIANTS: dict[str, Variant[Any]] = {**STORE_VARIANTS, **PAGED_VARIANTS}
"""By name, for the command line; `ours` means one thing in a paged case and another in a store case."""

SCHEDULES_A_GRAPH = 20
"""A schedule takes a few us, about what a replay costs: this many are timed together."""


def variants_of(case: PagedCase | StoreCase, names: Sequence[str] | None = None) -> list[Variant[Any]]:
    """The named variants that the kind of case has; None: its own list."""
    known: Mapping[str, Variant[Any]] = PAGED_VARIANTS if isinstance(case, PagedCase) else STORE_VARIANTS
    return [known[name] for name in (case.variants if names is None else names) if name in known]


def run_case(
    case: PagedCase | StoreCase,
    names: Sequence[str] | None,
    settings: Settings,
    timer: Timer,
    device: torch.device,
    say: Say = print,
    split: Callable[[Callable[[], object]], Split] | None = None,
    fatal: Mapping[tuple[str, str], str] | None = None,
) -> dict[str, Any]:
    """Check and time the variants `names` (None: the case's own) on `case`: its part of the results file.

    `split` times the metadata's way to the device. `fatal` has reasons by (case, variant): those are failed rows that
    are not run. Raises DeviceLostError.
    """
    torch._dynamo.reset()
    problem = case.problem(device, settings.seed)
    copies = case.copies if isinstance(case, StoreCase) else 1
    exact = Exact(exact_paged(problem) if isinstance(problem, PagedProblem) else exact_store(problem))
    reasons = {name: reason for (of, name), reason in (fatal or {}).items() if of == case.name}
    variants = [graphed(variant, copies, reasons.get(variant.name)) for variant in variants_of(case, names)]
    rows = measured_rows(
        variants, problem, exact, (case.flops, case.bytes), settings, lambda call: timer(call) / copies, say
    )
    add_ratios(rows, case.aim, case.targets)
    result = {
        "name": case.name,
        "kind": "attention" if isinstance(case, PagedCase) else "store",
        "title": case.title,
        "dtype": str(case.dtype).removeprefix("torch."),
        **case.shapes,
        "flops": case.flops,
        "bytes": case.bytes,
        "aim_ms": case.aim,
        "rows": rows,
    }
    if isinstance(problem, PagedProblem):
        # A schedule that kills its process killed its variant's trial: then it is not tried here either.
        fit = {variant.name for variant in variants if variant.name not in reasons}
        result["schedule_us"] = schedule_us(problem, timer, fit, say)
        result["tilings"] = tilings(problem) if device.type == "cuda" else {}
        result["metadata"] = metadata_cost(problem, split) if split is not None else None
    return result


def graphed(variant: Variant[P], copies: int, reason: str | None) -> Variant[P]:
    """`variant`, timed as a CUDA graph of `copies` calls; with a `reason`, one that is not run and fails with it."""

    def prepare(problem: P) -> Prepared:
        if reason is not None:
            raise DeadError(reason)
        prepared = variant.prepare(problem)
        graph = Graph(prepared.run, problem.query.device, copies, prepared.written)
        return Prepared(graph, prepared.outputs)

    return Variant(variant.name, variant.title, prepare, variant.ours, variant.compiled)


class DeadError(RuntimeError):
    """The variant killed or hung the process that tried it first."""


def add_ratios(rows: Sequence[dict[str, Any]], aim_ms: float | None, targets: Sequence[Target]) -> None:
    """Give each row `ratios` (how many times as fast as each peer and the aim) and `targets` (what it has to reach).

    A ratio above 1 says that the row is the faster one. Rows without a time have neither ratio nor verdict.
    """
    ms = {row["variant"]: row["ms"] for row in rows if row["status"] == "ok"}
    others = {row["variant"]: ms[row["variant"]] for row in rows if not row["ours"] and row["variant"] in ms}
    if aim_ms is not None:
        others[AIM] = aim_ms
    for row in rows:
        own = ms.get(row["variant"])
        row["ratios"] = {} if own is None else {name: other / own for name, other in others.items()}
        row["targets"] = [
            {
                "peer": target.peer,
                "at_least": target.at_least,
                "met": row["ratios"][target.peer] >= target.at_least if target.peer in row["ratios"] else None,
            }
            for target in targets
            if target.variant == row["variant"]
        ]


# ------------------------------------------------------------------ what a step costs beside attention


def schedule_us(
    problem: PagedProblem, timer: Timer, variants: Collection[str], say: Say = print
) -> dict[str, float | str]:
    """The schedule's own time in us, alone in a CUDA graph, by those of our `variants` that are timed.

    A text instead of a time says why there is none.
    """
    found: dict[str, float | str] = {}
    for name, direct in (("ours", False), ("ours-direct", True)):
        if name not in variants:
            continue
        graph = Graph(lambda direct=direct: schedule_of(problem, direct), problem.query.device, SCHEDULES_A_GRAPH)  # type: ignore[misc]
        try:
            found[name] = round(1e3 * timer(graph) / SCHEDULES_A_GRAPH, 3)
        except Exception as error:  # again data, not a crash
            found[name] = f"{type(error).__name__}: {in_one_line(error)}"
            _alive(problem.query.device, error)
    say(f"  schedule, us: {found}")
    return found


def metadata_cost(problem: PagedProblem, split: Callable[[Callable[[], object]], Split]) -> dict[str, float]:
    """What it takes to hand a step's metadata to the device, in us on the host and on the GPU.

    Four tensors in pinned host memory are copied onto the graph's static inputs: `cu_seqlens_q`, `context_lens`,
    `page_tables` and `slot_mapping`.
    """
    inputs = problem.inputs
    static = (inputs.cu_seqlens_q, inputs.context_lens, inputs.page_tables, inputs.slot_mapping)
    fresh = [_pinned(tensor) for tensor in static]

    def assign() -> None:
        for target, source in zip(static, fresh, strict=True):
            target.copy_(source, non_blocking=True)

    apart = split(assign)
    return {
        "host_us": round(1e3 * apart.host_ms, 3),
        "device_us": round(1e3 * apart.device_ms, 3),
        "bytes": sum(tensor.nbytes for tensor in static),
    }


def _pinned(tensor: Tensor) -> Tensor:
    return tensor.cpu().pin_memory() if tensor.is_cuda else tensor.clone()


def _alive(device: torch.device, error: Exception) -> None:
    """Raises DeviceLostError where the GPU no longer answers."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as lost:
        raise DeviceLostError(f"the schedule broke the CUDA context: {in_one_line(error)}") from lost


# ------------------------------------------------------------------ printing


def table(result: Mapping[str, Any]) -> str:
    """A case as a table for the terminal: times, rates and how many times as fast as each peer."""
    others = list(dict.fromkeys(name for row in result["rows"] for name in row["ratios"]))
    rates = f"{'TFLOP/s':>8s} {'TB/s':>7s} {'error':>8s}"
    heads = " ".join(f"{'x ' + name:>12s}" for name in others)
    lines = [f"  {'variant':16s} {'us':>9s} {'min..max':>17s} {rates} {heads}"]
    for row in result["rows"]:
        if row["status"] != "ok":
            lines.append(f"  {row['variant']:16s} {row['status'].upper()}: {row['reason'][:160]}")
            continue
        error = max(e["relative"] for e in row["errors"].values())
        spread = f"{1e3 * row['ms_min']:.1f}..{1e3 * row['ms_max']:.1f}"
        rates = f"{row['tflop_per_s']:8.1f} {row['tb_per_s']:7.3f} {error:8.1e}"
        ratios = " ".join(f"{row['ratios'][name]:12.3f}" for name in others)
        missed = "".join(
            f"  MISSED {target['at_least']}x {target['peer']}" for target in row["targets"] if target["met"] is False
        )
        lines.append(f"  {row['variant']:16s} {1e3 * row['ms']:9.2f} {spread:>17s} {rates} {ratios}{missed}")
    lines += [f"  {name}: {tiling}" for name, tiling in result.get("tilings", {}).items()]
    if result.get("metadata"):
        lines.append(f"  metadata to the device: {result['metadata']}")
    return "\n".join(lines)


# ------------------------------------------------------------------ trials


def jobs_of(cases: Sequence[PagedCase | StoreCase], names: Sequence[str] | None) -> list[tuple[str, str]]:
    """Every (case, variant) that a run of `cases` makes."""
    return [(case.name, variant.name) for case in cases for variant in variants_of(case, names)]


def unpack_peers() -> None:
    """Load what peers keep packed, once: processes that unpack it side by side read each other's halves."""
    with contextlib.suppress(Unavailable):  # a row will say so
        peers_with_fa3()


def first_call(job: tuple[str, str], seed: int, device: str = "cuda") -> None:
    """Prepare a variant of a case and call it once, not as a graph: what `tools.trial` does in a process of its own."""
    case, name = CASES[job[0]], job[1]
    torch._dynamo.reset()
    (variant,) = variants_of(case, [name])
    variant.prepare(case.problem(device, seed)).run()
