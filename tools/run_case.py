"""One case, measured: every variant is checked against the exact result; right ones are timed in rounds."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from tools.cases import Case
from tools.measure import Errors, Exact, Split, Timer, Times, compare, exact_attention, interleaved
from tools.variants import VARIANTS, Prepared, Problem, Unavailable, Variant


class Inputs(Protocol):
    """What a case's tensors have in common, whatever is computed from them."""

    @property
    def query(self) -> Tensor:
        """Its device and dtype are those of the case."""


P = TypeVar("P", bound=Inputs)


class DeviceLostError(RuntimeError):
    """A kernel broke the CUDA context: nothing more can be measured in this process."""


@dataclasses.dataclass
class Row:
    """One variant on one case, as the results file has it."""

    variant: str
    title: str
    ours: bool
    status: str = "ok"
    """`"ok"`, `"wrong"` (never timed), `"unavailable"` (it cannot run this) or `"failed"` (it raised)."""
    reason: str = ""
    ms: float | None = None
    """Median over the rounds; so are the rates."""
    ms_min: float | None = None
    ms_max: float | None = None
    rounds_ms: list[float] = dataclasses.field(default_factory=list)
    host_ms: float | None = None
    """What the host takes to issue one call; above `device_ms`, the host is what `ms` measures."""
    device_ms: float | None = None
    """What the GPU takes when everything is queued before it starts; see `tools.measure.cuda_split`."""
    tflop_per_s: float | None = None
    tb_per_s: float | None = None
    errors: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    """By tensor (out, dq, dk, dv): relative and worst row's error, the worse of before and after timing."""
    compile_s: float | None = None
    """The first call of a compiled variant, in s."""
    extra_mib: float | None = None
    """Peak memory of one call beyond what was allocated before it."""
    decisions: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """For ours, what the passes and lowerings decided while the first call compiled."""

    @property
    def error(self) -> float | None:
        """The largest relative error of its tensors."""
        return max((e["relative"] for e in self.errors.values()), default=None)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a run measures."""

    rounds: int = 5
    warmup_ms: float = 20
    rep_ms: float = 100
    seed: int = 0


Say = Callable[[str], None]


def problem_of(case: Case, device: torch.device, seed: int) -> Problem:
    """The case's tensors on `device`, drawn with `seed`."""
    inputs = case.inputs(device, seed=seed, requires_grad=case.backward)
    grad_out = None
    if case.backward:
        batch, heads, length, _ = inputs.query.shape
        shape = (batch, length, heads, inputs.value.shape[-1])  # token-major, as it comes out of a model's backward
        generator = torch.Generator().manual_seed(seed + 1)
        grad_out = torch.randn(shape, generator=generator, dtype=inputs.query.dtype).to(device).transpose(1, 2)
    return Problem(case.form, inputs.query, inputs.key, inputs.value, inputs.operands, case.scale, grad_out)


def run_case(
    case: Case,
    named: Sequence[Variant[Problem]] | None,
    settings: Settings,
    timer: Timer,
    device: torch.device,
    say: Say = print,
    split: Callable[[Callable[[], object]], Split] | None = None,
) -> dict[str, Any]:
    """Check and time the variants `named` (None: those that the case has by default) on `case`.

    `split` tells host and GPU time apart, outside the rounds. Returns the case's part of the results file. Raises
    DeviceLostError.
    """
    torch._dynamo.reset()  # or the recompile limit would turn later cases of FlexAttention eager
    problem = problem_of(case, device, settings.seed)
    variants = [v for v in VARIANTS.values() if v.by_default(problem)] if named is None else named
    exact = exact_attention(
        case.form, problem.query, problem.key, problem.value, problem.operands, case.scale, problem.grad_out
    )
    rows = measured_rows(variants, problem, exact, (case.flops, case.bytes), settings, timer, say, split)
    return result_of(case, problem, rows)


def result_of(case: Case, problem: Problem, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The case's part of the results file."""
    return {
        "name": case.name,
        "form": case.form.name,
        "title": case.title,
        "backward": case.backward,
        "dtype": str(problem.query.dtype).removeprefix("torch."),
        "q": list(problem.query.shape),
        "k": list(problem.key.shape),
        "v": list(problem.value.shape),
        "operands": {name: _describe(value) for name, value in problem.operands.items()},
        "flops": case.flops,
        "bytes": case.bytes,
        "rows": rows,
    }


def measured_rows(
    variants: Sequence[Variant[P]],
    problem: P,
    exact: Exact,
    work: tuple[int, int],
    settings: Settings,
    timer: Timer,
    say: Say = print,
    split: Callable[[Callable[[], object]], Split] | None = None,
) -> list[dict[str, Any]]:
    """Check each variant against `exact`, then time those that are right, in rounds: a row each, in JSON's types.

    `work` is the FLOPs and bytes of one call. Raises DeviceLostError.
    """
    device = problem.query.device
    rows = {v.name: Row(v.name, v.title, v.ours) for v in variants}
    ready: dict[str, Prepared] = {}
    for variant in variants:
        prepared = _first_call(variant, rows[variant.name], problem, exact)
        if prepared is not None:
            ready[variant.name] = prepared
        say(f"  {variant.name:16s} {_first_line(rows[variant.name])}")
    times, broken = interleaved(
        {name: prepared.run for name, prepared in ready.items()},
        timer,
        settings.rounds,
        lambda index, ms: say(f"  round {index + 1}: " + ", ".join(f"{name} {t:.4f}" for name, t in ms.items())),
    )
    for name, error in broken.items():
        _fail(rows[name], error, device)
    for name, taken in times.items():
        try:
            apart = split(ready[name].run) if split is not None else None
            _check(rows[name], ready[name], problem, exact)  # once more: a race shows only now and then
        except Exception as error:  # again a row, not a crash
            _fail(rows[name], error, device)
            continue
        if rows[name].status == "ok":
            _record(rows[name], taken, apart, *work)
    return [_plain(dataclasses.asdict(row)) for row in rows.values()]


def _first_call(variant: Variant[P], row: Row, problem: P, exact: Exact) -> Prepared | None:
    """Prepare the variant, run it once and check its result.

    None, with the reason in `row`, where it is not to be timed.
    """
    device = problem.query.device
    try:
        prepared = variant.prepare(problem)
        with _decisions(variant.ours) as decisions:
            seconds, result = _clocked(prepared.run, device)
            row.decisions = decisions
        row.compile_s = seconds if variant.compiled else None
        del result
        _check(row, prepared, problem, exact)
        row.extra_mib = _extra_mib(prepared.run, device)
    except Unavailable as error:
        row.status, row.reason = "unavailable", in_one_line(error)
        return None
    except Exception as error:  # a variant that cannot run is a row, not a crash
        _fail(row, error, device)
        return None
    return prepared if row.status == "ok" else None


def _check(row: Row, prepared: Prepared, problem: Inputs, exact: Exact) -> None:
    """Run once more and keep the worse errors in `row`; mark it wrong where they are too large."""
    _poison(exact, problem)
    found, wrong = compare(prepared.outputs(prepared.run()), exact, problem.query.dtype)
    for name, errors in found.items():
        before = row.errors.get(name)
        row.errors[name] = dataclasses.asdict(errors if before is None else Errors(**before).worse(errors))
    if wrong:
        row.status, row.reason = "wrong", "; ".join(wrong)


def _poison(exact: Exact, problem: Inputs) -> None:
    """Leave NaN in the memory that the next outputs are likely to get: an unwritten element then shows."""
    for tensor in exact.named.values():
        torch.full(tensor.shape, float("nan"), dtype=problem.query.dtype, device=tensor.device)


def _record(row: Row, times: Times, apart: Split | None, flops: int, moved: int) -> None:
    row.ms, row.ms_min, row.ms_max = times.ms, min(times.rounds_ms), max(times.rounds_ms)
    row.rounds_ms = list(times.rounds_ms)
    if apart is not None:
        row.host_ms, row.device_ms = apart.host_ms, apart.device_ms
    row.tflop_per_s, row.tb_per_s = flops / times.ms / 1e9, moved / times.ms / 1e9


def _fail(row: Row, error: Exception, device: torch.device) -> None:
    """Record what a variant raised. Raises DeviceLostError where the GPU no longer answers."""
    row.status, row.reason = "failed", f"{type(error).__name__}: {in_one_line(error)}"
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as lost:
        raise DeviceLostError(f"{row.variant} broke the CUDA context: {row.reason}") from lost
    gc.collect()
    torch.cuda.empty_cache()


@contextlib.contextmanager
def _decisions(wanted: bool) -> Iterator[list[dict[str, Any]]]:
    """Collect what the passes and lowerings record; the list is filled when the block ends."""
    found: list[dict[str, Any]] = []
    if not wanted:
        yield found
        return
    from inductor_passes import decisions

    with decisions.recording() as log:
        yield found
    fields = ("stage", "op", "node", "detail", "facts")
    found += [{name: _plain(getattr(record, name)) for name in fields} for record in log.records]


def _plain(value: Any) -> Any:
    """`value` in JSON's types; what has none, NaN and infinities too, as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return _without_folders(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float)) else _without_folders(str(value))


def _clocked(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds until the result is there, and the result."""
    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def _extra_mib(run: Callable[[], Any], device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return round((torch.cuda.max_memory_allocated(device) - before) / 2**20, 1)


def _describe(value: Tensor | int | None) -> Any:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}" if isinstance(value, Tensor) else value


def in_one_line(error: Exception, limit: int = 300) -> str:
    """What the error says, cut to `limit` characters, without line breaks and folders."""
    return _without_folders(" ".join(str(error).split()))[:limit]


def _without_folders(text: str) -> str:
    """`text` with absolute paths cut to their last part: results are published, folders are not."""
    return re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+", "", text)


def _first_line(row: Row) -> str:
    """What is known of a row before it is timed."""
    if row.status != "ok":
        return f"{row.status.upper()}: {row.reason}"
    compiled = "" if row.compile_s is None else f", compiled in {row.compile_s:.1f} s"
    return f"right, error {row.error:.1e}{compiled}"
