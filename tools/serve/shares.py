"""Where the time of a step goes, by what kernels are called."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# Kineto otherwise says on stderr each time that it starts and stops.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

FUSED = re.compile(r"^triton_(poi|red|per|for)_")
"""What Inductor made of elementwise work and sums: "rest", whatever ops its name lists."""
KINDS = {
    "schedule": re.compile(r"schedule", re.I),
    "attention": re.compile(r"attention|paged_forward", re.I),
    "matmul": re.compile(r"gemm|gemv|matmul|nvjet|cutlass|cublas|splitk|^aten::(mm|addmm|bmm)$|tem_fused_mm", re.I),
}
"""The kind of any other kernel: the first whose expression its name matches; otherwise "rest"."""


@dataclass(frozen=True)
class Shares:
    """Microseconds of one step."""

    total: float  # of the step, gaps between kernels included
    by_kind: dict[str, float]  # "attention", "schedule", "matmul", "rest"
    by_kernel: dict[str, tuple[float, int]]  # by name: microseconds of all its launches, and how many there were

    def share(self, *kinds: str) -> float:
        """The part of the time in kernels that goes to `kinds`, 0 to 1."""
        return sum(self.by_kind.get(kind, 0.0) for kind in kinds) / max(self.total, 1e-9)


def kind_of(kernel: str) -> str:
    """The kind of a kernel or op by its name."""
    if FUSED.match(kernel):
        return "rest"
    return next((kind for kind, expression in KINDS.items() if expression.search(kernel)), "rest")


def profile(call: Callable[[], object], device: torch.device) -> Shares:
    """Run `call` once under torch's profiler.

    On CUDA the kernels of the GPU count, the total being their sum. On a CPU, fused code is no op of its own and
    appears as what is left of the time that the call takes.
    """
    activity = torch.profiler.ProfilerActivity
    cuda = device.type == "cuda"
    with torch.profiler.profile(activities=[activity.CUDA if cuda else activity.CPU]) as profiler:
        start = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize(device)
        wall = 1e6 * (time.perf_counter() - start)
    by_kernel: dict[str, tuple[float, int]] = {}
    by_kind = dict.fromkeys((*KINDS, "rest"), 0.0)
    for event in profiler.key_averages():
        if cuda:
            if event.device_type != torch.autograd.DeviceType.CUDA:
                continue
            microseconds = event.self_device_time_total
        else:
            microseconds = _cpu_time(event)
        if microseconds > 0 and event.key is not None:
            by_kernel[event.key] = (microseconds, event.count)
            by_kind[kind_of(event.key)] += microseconds
    if cuda:
        return Shares(sum(by_kind.values()), by_kind, by_kernel)
    by_kind["rest"] = max(0.0, wall - sum(by_kind[kind] for kind in KINDS))
    return Shares(wall, by_kind, by_kernel)


def _cpu_time(event: torch.autograd.profiler_util.FunctionEventAvg) -> float:
    """Time of an op with all that it calls where the op is of a kind of its own, else 0: nothing counts twice."""
    name = event.key or ""
    outermost = name.startswith("lowered_attn::") or name in ("aten::mm", "aten::addmm", "aten::bmm")
    return event.cpu_time_total if outermost else 0.0
