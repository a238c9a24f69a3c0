"""Attention whose output a sigmoid gate multiplies, heads merged: ours in one kernel, and peers with one for the gate.

    python -m tools.bench --cases gate --output out/gate.json
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from inductor_passes import EPILOGUES_OPTION, LIBRARY_OPTION
from tools.cases import CASES as DENSE
from tools.cases import Case
from tools.measure import Exact, exact_attention
from tools.run_case import Settings, measured_rows, problem_of, result_of
from tools.variants import VARIANTS as DENSE_VARIANTS
from tools.variants import Prepared, Problem, Variant

CASES: dict[str, Case] = {
    f"gate_{name}": dataclasses.replace(DENSE[name], name=f"gate_{name}", design_row=None)
    for name in ("causal_b4_s4096_d128", "causal_b1_s16384_d128", "causal_b4_s4096_d64", "sliding_b1_s16384_d128")
}
"""By name: dense cases, each with a gate."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedProblem(Problem):
    """A dense case's tensors, and the gate."""

    gate: Tensor
    """`[B, Lq, Hq * Dv]`, as its projection gives it."""

    def heads(self, result: Tensor) -> tuple[Tensor]:
        """`[B, Lq, Hq * Dv]` as `(out [B, Hq, Lq, Dv],)`."""
        return (result.unflatten(2, (self.query.shape[1], self.value.shape[3])).transpose(1, 2),)


def gated(out: Tensor, gate: Tensor) -> Tensor:
    """`out [B, Lq, Hq, Dv]`, its heads merged, times the sigmoid of `gate [B, Lq, Hq * Dv]`."""
    return out.flatten(2) * torch.sigmoid(gate)


def _ours(problem: GatedProblem, options: dict[str, Any]) -> Prepared:
    from lowered_attn.compile import backend

    form, scale, operands = problem.form, problem.scale, dict(problem.operands)

    def layer(query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
        arguments = (operands.get(name) for name in form.operand_names)
        return gated(form.op(query, key, value, *arguments, scale=scale)[0].transpose(1, 2), gate)

    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=False, options=options)
    return Prepared(
        lambda: compiled(problem.query, problem.key, problem.value, problem.gate),
        lambda result: problem.heads(result),
    )


def _with_compiled_gate(problem: GatedProblem, name: str) -> Prepared:
    """A dense variant, and after it the gate as torch.compile makes it."""
    prepared = DENSE_VARIANTS[name].prepare(problem)
    finish = torch.compile(gated, fullgraph=True, dynamic=False)

    def run() -> Tensor:
        (out,) = prepared.outputs(prepared.run())
        return finish(out.transpose(1, 2), problem.gate)

    return Prepared(run, lambda result: problem.heads(result))


def _ours_with(options: dict[str, Any]) -> Callable[[GatedProblem], Prepared]:
    return lambda problem: _ours(problem, options)


def _peer(name: str) -> Callable[[GatedProblem], Prepared]:
    return lambda problem: _with_compiled_gate(problem, name)


VARIANTS: dict[str, Variant[GatedProblem]] = {
    variant.name: variant
    for variant in (
        Variant("ours", "lowered-attn", _ours_with({}), ours=True, compiled=True),
        Variant("ours-apart", "lowered-attn, a kernel for the gate", _ours_with({EPILOGUES_OPTION: False}), True, True),
        Variant("ours-template", "lowered-attn, Triton", _ours_with({LIBRARY_OPTION: False}), True, True),
        Variant("fa3", "FlashAttention-3, a kernel for the gate", _peer("fa3"), compiled=True),
        Variant("sdpa-cudnn", "SDPA, cuDNN, a kernel for the gate", _peer("sdpa-cudnn"), compiled=True),
        Variant("flex", "FlexAttention, a kernel for the gate", _peer("flex"), compiled=True),
    )
}


def run_case(
    case: Case, names: Sequence[str] | None, settings: Settings, timer: Any, device: Any, say: Any, split: Any, _: Any
) -> dict[str, Any]:
    """Check and time variants on a gated case, as `tools.run_case.run_case` does on a dense one."""
    torch._dynamo.reset()
    plain = problem_of(case, device, settings.seed)
    generator = torch.Generator().manual_seed(settings.seed + 2)
    batch, heads, length, _ = plain.query.shape
    drawn = torch.randn(batch, length, heads * case.value_dim, generator=generator, dtype=plain.query.dtype)
    fields = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
    problem = GatedProblem(**fields, gate=drawn.to(device))
    out = exact_attention(case.form, problem.query, problem.key, problem.value, problem.operands, case.scale).out
    exact = Exact(*problem.heads(gated(out.transpose(1, 2), problem.gate.float())))
    variants = [VARIANTS[name] for name in names or VARIANTS]
    # The gate is read once more, as many bytes as the output has.
    moved = case.bytes + problem.gate.nbytes
    rows = measured_rows(variants, problem, exact, (case.flops, moved), settings, timer, say, split)
    return result_of(case, problem, rows) | {"title": f"{case.title}, gated", "bytes": moved}
