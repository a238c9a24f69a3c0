"""What a measurement stands on: an independent result, an error against it, and times that can be compared.

The independent result is `custom_ops.reference` in float32, computed in pieces, so that a 16,384-long case
fits in memory. Times are medians of `triton.testing.do_bench`, which flushes L2 before every call, taken in
rounds A B C A B C: a drift of the clocks then touches every variant alike.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from custom_ops.masks import OperandValue
from custom_ops.masks import q as q_symbol
from custom_ops.reference import reference_attention

if TYPE_CHECKING:
    from custom_ops.form import Form

Timer = Callable[[Callable[[], object]], float]
"""Takes a call without arguments and returns its time in ms."""

# ------------------------------------------------------------------ the independent result


@dataclasses.dataclass(frozen=True)
class Exact:
    """Results in float32 that every variant is compared with."""

    out: Tensor
    """`[B, Hq, Lq, Dv]`."""
    gradients: tuple[Tensor, ...] = ()
    """dq, dk and dv, shaped as q, k and v; empty for a case without a backward pass."""

    @property
    def named(self) -> dict[str, Tensor]:
        """The tensors by the names that reports use."""
        return dict(zip(("out", "dq", "dk", "dv"), (self.out, *self.gradients), strict=False))


def exact_attention(
    form: Form,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: Mapping[str, OperandValue],
    scale: float | None = None,
    grad_out: Tensor | None = None,
    max_scores: int = 2**28,
) -> Exact:
    """Attention of `form` in float32, one KV head and `max_scores` scores (2**28 are 1 GiB) at a time.

    Shapes are those of the form's op: q `[B, Hq, Lq, D]`, k `[B, Hkv, Lk, D]`, v `[B, Hkv, Lk, Dv]`. With
    `grad_out` `[B, Hq, Lq, Dv]` the gradients come too. Raises RuntimeError where float32 matrix products
    would run in TF32, whose error of 3e-4 is too near to what is measured.
    """
    if query.is_cuda and torch.get_float32_matmul_precision() != "highest":
        raise RuntimeError(
            f"float32 matmul precision: expected 'highest', got {torch.get_float32_matmul_precision()!r}; "
            "call torch.set_float32_matmul_precision('highest')"
        )
    batch, query_heads, query_len, _ = query.shape
    kv_heads, key_len = key.shape[1:3]
    group = query_heads // kv_heads
    rows = max(1, min(query_len, max_scores // (group * key_len)))
    if q_symbol in form.mask.visible.free_symbols and not form.self_attention:
        rows = query_len  # positions count from the first row, and no operand can say that a piece starts later
    kinds = {operand.name: operand.kind for operand in form.operands}
    out = torch.empty(*query.shape[:-1], value.shape[-1], device=query.device)
    inputs = (query, key, value)
    sums = tuple(torch.zeros(t.shape, device=t.device) for t in inputs) if grad_out is not None else ()
    for b in range(batch):
        for h in range(kv_heads):
            heads, kv_head = slice(h * group, (h + 1) * group), slice(h, h + 1)
            for first in range(0, query_len, rows):
                part = slice(first, min(first + rows, query_len))
                where = ((b, heads, part), (b, kv_head), (b, kv_head))
                q, k, v = (
                    t[at][None].detach().float().requires_grad_(grad_out is not None)
                    for t, at in zip(inputs, where, strict=True)
                )
                mine = {name: _cut(kinds[name], operand, b, part) for name, operand in operands.items()}
                if form.self_attention:
                    start = mine.get("q_start")
                    base = torch.zeros(1, dtype=torch.int32, device=q.device) if start is None else start
                    mine["q_start"] = base + first  # type: ignore[operator]
                piece, _ = reference_attention(q, k, v, form, mine, scale)
                out[b, heads, part] = piece[0].detach()
                if grad_out is not None:
                    upstream = grad_out[b, heads, part][None].float()
                    for total, at, gradient in zip(
                        sums, where, torch.autograd.grad(piece, (q, k, v), upstream), strict=True
                    ):
                        total[at] += gradient[0]
    return Exact(out, sums)


def _cut(kind: str, operand: OperandValue, b: int, part: slice) -> OperandValue:
    """The operand for request `b` and the query rows `part`."""
    if not isinstance(operand, Tensor):
        return operand
    return operand[b : b + 1, part] if kind == "query" else operand[b : b + 1]


# ------------------------------------------------------------------ errors


@dataclasses.dataclass(frozen=True)
class Errors:
    """How far a tensor is from the exact one.

    NaN or infinity where the tensor holds NaN or has another shape.
    """

    relative: float
    """Norm of the difference over the norm of the exact tensor."""
    worst_row: float
    """The largest norm of one row's difference over the norm of that row; see `errors_of`."""

    def within(self, tolerance: Tolerance) -> bool:
        """Whether both are small enough. NaN never is."""
        return self.relative <= tolerance.relative and self.worst_row <= tolerance.worst_row

    def worse(self, other: Errors) -> Errors:
        """The larger of each, NaN counting as larger than anything."""
        return Errors(
            *(
                b if math.isnan(b) or b > a else a
                for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
            )
        )


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """The largest errors of a right result."""

    relative: float
    worst_row: float
    row_floor: float
    """Rows smaller than this share of the root mean square row norm are held against that share instead."""


# Measured on an H200 in bf16, for lowered-attn and five peers alike: outputs 1.9e-3 to 2.2e-3 (worst row 3.4e-3),
# gradients 2.0e-3 to 3.0e-3 (worst row 2.7e-2). The worst row is there for what a norm over a million rows cannot
# see: a wrong tile of 64 rows among 131,072 moves that norm by 2%, a wrong row by 0.3%.
_OUT = {torch.float32: 2e-3, torch.float16: 2e-3, torch.bfloat16: 5e-3}


def tolerance(name: str, dtype: torch.dtype) -> Tolerance:
    """The tolerance of `"out"`, or of a gradient `"dq"`, `"dk"`, `"dv"`, for inputs of `dtype`.

    A gradient's row may be almost nothing next to the terms that cancel in it (query 0 of a causal mask sees
    one key, and its exact gradient is 0), so rows of gradients are held against the root mean square row.
    """
    if dtype not in _OUT:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, _OUT))}, got {dtype}; measure in one of those")
    relative = _OUT[dtype]
    return Tolerance(relative, 4 * relative, 0.1) if name == "out" else Tolerance(2 * relative, 20 * relative, 1.0)


def errors_of(got: Tensor, exact: Tensor, row_floor: float = 0.1) -> Errors:
    """Errors of `got` against `exact`, both `[..., rows, features]`; a row is the last dimension.

    A row smaller than `row_floor` times the root mean square row norm is held against that floor.
    """
    if got.shape != exact.shape:
        return Errors(math.inf, math.inf)
    size = torch.linalg.vector_norm(exact, dim=-1)
    off = torch.linalg.vector_norm(got.float() - exact, dim=-1)
    total, floor = torch.linalg.vector_norm(size), row_floor * size.square().mean().sqrt()
    if total == 0:  # everything is hidden: only exact zeros are right
        return Errors(*(2 * (0.0 if off.max() == 0 else math.inf,)))
    return Errors((torch.linalg.vector_norm(off) / total).item(), (off / size.clamp(min=floor)).max().item())


def compare(got: Sequence[Tensor], exact: Exact, dtype: torch.dtype) -> tuple[dict[str, Errors], list[str]]:
    """Errors by name, and what is wrong in words (nothing when all is right).

    `dtype` is that of the inputs.
    """
    errors: dict[str, Errors] = {}
    wrong = []
    for (name, want), tensor in zip(exact.named.items(), got, strict=True):
        allowed = tolerance(name, dtype)
        errors[name] = found = errors_of(tensor, want, allowed.row_floor)
        if tensor.shape != want.shape:
            wrong.append(f"{name} has shape {list(tensor.shape)}, expected {list(want.shape)}")
        elif not found.within(allowed):
            wrong.append(
                f"{name}: relative error {found.relative:.1e} (at most {allowed.relative:.0e}), "
                f"worst row {found.worst_row:.1e} (at most {allowed.worst_row:.0e})"
            )
    return errors, wrong


# ------------------------------------------------------------------ times


def cuda_timer(warmup_ms: float, rep_ms: float) -> Timer:
    """Median time of a call by CUDA events, L2 flushed before each:

    about `warmup_ms` of warm-up, `rep_ms` measured.
    """
    from triton.testing import do_bench

    def median_ms(call: Callable[[], object]) -> float:
        return float(do_bench(call, warmup=warmup_ms, rep=rep_ms, return_mode="median"))  # type: ignore[arg-type]

    return median_ms


@dataclasses.dataclass(frozen=True)
class Split:
    """What a call costs the host and the GPU, apart from one another, in ms."""

    host_ms: float
    """Until the call returns, the GPU's work not awaited."""
    device_ms: float
    """On the GPU alone, with everything the call launches queued before the GPU starts on it."""


def cuda_split(call: Callable[[], object], repeats: int = 20) -> Split:
    """Medians over `repeats` calls, L2 flushed before each.

    A call whose launches take the host longer than the GPU needs for them has `device_ms` well under its time by
    `cuda_timer`: a busy GPU or a CUDA graph hides the difference. A call that waits for the GPU itself hides nothing.
    """
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")  # 256 MiB, several times the L2
    host, device = [], []
    idle_ms = 1.0
    for index in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        torch.cuda._sleep(
            int(2e6 * idle_ms)
        )  # in cycles, 2e6 of them a ms at 2 GHz: the GPU spins and L2 stays flushed
        start.record()
        begin = time.perf_counter()
        call()
        host.append(1e3 * (time.perf_counter() - begin))
        end.record()
        end.synchronize()
        device.append(start.elapsed_time(end))
        if index == 2:  # three calls of warm-up, which also tell how long the GPU has to be kept from starting
            idle_ms = min(max(0.5, 3 * min(host)), 20.0)
            host, device = [], []
    return Split(statistics.median(host), statistics.median(device))


class Graph:
    """A call as a CUDA graph: the first use warms it up and captures it, every use replays it.

    `copies` calls lie in the graph one behind the other, for calls so short that the replay itself would be measured.
    After the capture NaN fills what the call returned and the tensors of `written`: an element that a replay leaves
    unwritten shows. On a device without graphs the call is called.
    """

    def __init__(
        self, call: Callable[[], object], device: torch.device, copies: int = 1, written: Sequence[Tensor] = ()
    ) -> None:
        self._call, self._device, self._copies, self._written = call, device, copies, written
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: object = None

    def __call__(self) -> object:
        if self._device.type != "cuda":
            return self._call()
        if self._graph is None:
            self._capture()
        assert self._graph is not None  # captured in the line above
        self._graph.replay()
        return self._result

    def _capture(self) -> None:
        for _ in range(3):  # compile, tune, load libraries: none of these may happen in a capture
            self._call()
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(self._copies):
                self._result = self._call()
        returned = self._result if isinstance(self._result, (tuple, list)) else (self._result,)
        for tensor in (*returned, *self._written):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                tensor.fill_(math.nan)
        self._graph = graph


@dataclasses.dataclass(frozen=True)
class Times:
    """One variant's times, a figure a round, in ms."""

    rounds_ms: tuple[float, ...]

    @property
    def ms(self) -> float:
        """Median over the rounds."""
        return statistics.median(self.rounds_ms)

    @property
    def spread(self) -> float:
        """Slowest round minus fastest round, over the median: differences below this are noise."""
        return (max(self.rounds_ms) - min(self.rounds_ms)) / self.ms


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    timer: Timer,
    rounds: int,
    on_round: Callable[[int, Mapping[str, float]], None] = lambda index, times: None,
) -> tuple[dict[str, Times], dict[str, Exception]]:
    """Time every call once a round, in order, for `rounds` rounds: A B C A B C, never A A B B.

    Returns the times, and the exceptions of those calls that raised: such a call is left out of the rounds
    that follow and has no times. `on_round(index, times of that round)` is called after each round.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    broken: dict[str, Exception] = {}
    for index in range(rounds):
        for name, call in calls.items():
            if name in broken:
                continue
            try:
                taken[name].append(timer(call))
            except Exception as error:  # becomes the variant's row, with its reason
                broken[name] = error
        on_round(index, {name: taken[name][-1] for name in calls if name not in broken})
    return {name: Times(tuple(ms)) for name, ms in taken.items() if name not in broken}, broken
