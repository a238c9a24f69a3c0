"""What follows attention goes into the Hopper kernel: calls in generated code, and what is left alone, and why."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="Triton compiles the generated code")

from inductor_passes import EPILOGUES_OPTION, LIBRARY_OPTION, decisions
from inductor_passes.fuse_epilogue import NONE, TIMED
from inductor_passes.pretend_gpu import Generated, generate, pretend_gpu
from lowered_attn.compile import backend
from lowered_attn.explain import Explanation
from tests import fusions
from tests.fusions import OPS, Inputs
from tests.hopper import chosen
from tests.test_fusions import said

SIZES = (2, 1024, 16, 4, 128)
CALL = re.compile(r"= torch\.ops\.lowered_attn\.attention_with_epilogue\.default\(.*, '(v0 = [^']*)', ")
GATE = "v0 = sigmoid(y); v1 = mul(x, v0); v2 = bfloat16(v1)"


@pytest.fixture(autouse=True)
def whichever_is_faster() -> Iterator[None]:
    with chosen("gluon"):
        yield


def compiled(
    model: Callable[[Inputs], Any], *, arch: str = "sm_90", sizes: tuple[int, int, int, int, int] = SIZES,
    dtype: torch.dtype = torch.bfloat16, dynamic: bool = False, **options: Any,
) -> tuple[Generated, list[decisions.Decision]]:  # fmt: skip
    """What is generated for a model of ``Inputs`` in inference, and what was decided."""
    with pretend_gpu(arch) as gpu, torch.no_grad():
        with gpu.fake_tensors():
            given = fusions.inputs(*sizes, dtype, "cuda")
        with decisions.recording() as log:
            made = generate(
                lambda *tensors: model(Inputs(*tensors)), *given, backend=backend, dynamic=dynamic, options=options
            )
    return made, log.records


def epilogues(made: Generated) -> list[str]:
    """Epilogues that generated code calls the kernel with."""
    return CALL.findall(made.wrapper)


def refusals(records: list[decisions.Decision]) -> list[str]:
    """Why something that follows is no epilogue."""
    return [detail.removeprefix(f"{NONE}: ") for detail in said(records, "apart") if detail.startswith(NONE)]


def after(name: str) -> Callable[[Inputs], Tensor]:
    return lambda given: fusions.after(name, fusions.attend(given, given.q), given)


def attended(given: Inputs) -> Tensor:
    """``[B, S, H, D]``"""
    return fusions.attend(given, given.q).transpose(1, 2)


def gate_through_views(given: Inputs) -> Tensor:
    """A gate that is computed from merged heads, and then seen by heads."""
    gate = torch.sigmoid(given.x).view(given.gate.shape).transpose(1, 2)
    return (fusions.attend(given, given.q) * gate).transpose(1, 2).flatten(2)


def gate_in_fp32(given: Inputs) -> Tensor:
    return (attended(given).flatten(2).float() * torch.sigmoid(given.x.float())).to(given.x.dtype)


def projected(given: Inputs) -> Tensor:
    """A gate out of a product, and a product of the result."""
    weight = given.x[0, :, :].mT @ given.x[0]  # [H * D, H * D]
    return (attended(given).flatten(2) * torch.sigmoid(given.x @ weight)) @ weight


FUSED: dict[str, tuple[Callable[[Inputs], Any], str]] = {
    "gate an element": (after("gate an element"), GATE),
    "gate merged heads": (after("gate merged heads"), GATE),
    "gate, then merge": (after("gate, then merge"), GATE),
    "gate an element of heads": (after("gate an element of heads"), GATE),
    "residual": (after("residual"), "v0 = add(y, x); v1 = bfloat16(v0)"),
    "silu": (
        lambda given: attended(given).flatten(2) * nn.functional.silu(given.x),
        "v0 = neg(y); v1 = exp(v0); v2 = add(v1, 1.0); v3 = div(y, v2);",
    ),
    "silu of the output": (
        lambda given: nn.functional.silu(attended(given)).flatten(2),
        "v0 = neg(x); v1 = exp(v0); v2 = add(v1, 1.0); v3 = div(x, v2); v4 = bfloat16(v3)",
    ),
    "numbers": (
        lambda given: 1 - 2 * torch.relu(attended(given) * 0.5),
        "v0 = mul(x, 0.5); v1 = relu(v0); v2 = mul(v1, 2.0); v3 = sub(1.0, v2); v4 = bfloat16(v3)",
    ),
    "a gate through views": (gate_through_views, GATE),
    "a gate in fp32": (gate_in_fp32, GATE),
    "between products": (projected, GATE),
    "merged tokens": (
        lambda given: attended(given).reshape(-1, given.x.shape[2]) * given.x.flatten(0, 1),
        "v0 = mul(x, y); v1 = bfloat16(v0)",
    ),
    "read twice in it": (
        lambda given: attended(given) * torch.sigmoid(given.gate) - given.gate,
        "v0 = sigmoid(y); v1 = mul(x, v0); v2 = sub(v1, y);",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FUSED)
def test_what_follows_attention_is_in_its_kernel(name: str) -> None:
    model, text = FUSED[name]
    made, records = compiled(model)
    (found,) = epilogues(made)
    assert found.startswith(text), found
    assert not made.kernels and not said(records, "apart") and not said(records, "grouped")
    (fused,) = said(records, "fused")
    assert fused.startswith("into the store of the output: ")
    (lowered,) = [d for d in records if d.stage == "lowered"]
    assert lowered.facts["kernel"] == "gluon_dense" and lowered.facts["epilogue"] == found
    printed = str(Explanation(tuple(records), {}, (), "cuda"))
    assert "\n    lowered: the Hopper kernel, called as an op, with what follows in it; " in printed
    assert "\n    fused: into the store" in printed


@pytest.mark.parametrize("options", ({LIBRARY_OPTION: False}, {"arch": "sm_80"}, {"arch": "sm_100"}), ids=str)
def test_elsewhere_it_is_in_the_template(options: dict[str, Any]) -> None:
    made, records = compiled(after("gate merged heads"), **options)
    assert not epilogues(made) and len(made.kernels) == 1
    assert len(said(records, "fused")) == 1 and not refusals(records)


def test_switched_off_it_is_a_kernel_of_its_own() -> None:
    made, records = compiled(after("gate merged heads"), **{EPILOGUES_OPTION: False})
    assert not epilogues(made) and len(made.kernels) == 1 and "grouped_attention" in made.wrapper
    assert not refusals(records) and len(said(records, "apart")) == 1


def read_twice(given: Inputs) -> tuple[Tensor, Tensor]:
    out = attended(given)
    return out * torch.sigmoid(given.gate), out


def with_lse(given: Inputs) -> tuple[Tensor, Tensor]:
    out, lse = OPS.full_self(*(t.transpose(1, 2) for t in (given.q, given.k, given.v)))
    return out.transpose(1, 2) * torch.sigmoid(given.gate), lse


def then_normed(given: Inputs) -> Tensor:
    gated = attended(given).flatten(2) * torch.sigmoid(given.x)
    return nn.functional.rms_norm(gated, given.x.shape[2:])


def transposed_gate(given: Inputs) -> Tensor:
    """Of which no row is in one piece."""
    return attended(given) * given.gate.transpose(1, 3).contiguous().transpose(1, 3)


ALONE: dict[str, tuple[Callable[[Inputs], Any], str | None]] = {
    "the output is read too": (read_twice, "what is computed is also read by the graph's output"),
    "lse is read": (with_lse, "lse is read too"),
    "a norm": (
        lambda given: nn.functional.rms_norm(attended(given).flatten(2), given.x.shape[2:]),
        "pow to torch.float32 is no operation of the kernel's epilogues",
    ),
    "a gate and a norm": (then_normed, "pow to torch.float32 is no operation of the kernel's epilogues"),
    "tanh": (lambda given: attended(given).tanh(), "tanh to torch.bfloat16 is no operation of the kernel's epilogues"),
    "a gate a head": (after("gate a head"), "mul reads sigmoid, of another shape than the output"),
    "fp8": (after("fp8"), "div reads arg3_1, of another shape than the output"),
    "a gate and fp8": (after("gate, merge, fp8"), "div reads arg4_1, of another shape than the output"),
    "fp32 from there on": (
        lambda given: (attended(given) * torch.sigmoid(given.gate)).float() * 2.0,
        "convert_element_type follows, in a kernel that computes all of it",
    ),
    "a result in fp32": (
        lambda given: attended(given).float() * given.gate,
        "mul gives torch.float32, where the output is of torch.bfloat16",
    ),
    "a residual in fp32": (
        lambda given: (given.x.float().sin() + attended(given).flatten(2)).to(torch.bfloat16),
        "it reads sin, which is of torch.float32",
    ),
    "part of a dimension": (
        lambda given: attended(given).reshape(2, 1024, 16, 2, 64) * given.turns[:, :, None, :, :64], None,
    ),
    "integers": (
        lambda given: attended(given) * given.gate.int(), "reads convert_element_type, which is of torch.int32",
    ),
    "two tensors": (
        lambda given: given.x + attended(given).flatten(2) * torch.sigmoid(given.gate.flatten(2)),
        "it reads 2 tensors, and there is room for one",
    ),
    "columns in memory": (transposed_gate, "whose rows are in pieces, repeated or unaligned"),
    "nothing": (lambda given: attended(given).flatten(2), None),
}  # fmt: skip


@pytest.mark.parametrize("name", ALONE)
def test_what_is_no_epilogue_is_left_alone(name: str) -> None:
    model, reason = ALONE[name]
    made, records = compiled(model)
    assert not epilogues(made) and "grouped_attention" in made.wrapper
    found = refusals(records)
    assert len(found) == (reason is not None) and (reason or "") in "".join(found), found


@pytest.mark.parametrize("dim", (96, 104, 256))
def test_head_dims_that_take_no_epilogue_are_left_alone(dim: int) -> None:
    made, records = compiled(after("gate merged heads"), sizes=(2, 1024, 16, 4, dim))
    assert not epilogues(made) and refusals(records) == [f"head_dim: expected 64 or 128, got {dim}"]


@pytest.mark.parametrize(
    "changes",
    ({"sizes": (2, 64, 16, 4, 128)}, {"sizes": (2, 1024, 16, 4, 40)}, {"dtype": torch.float32}),
    ids=("few queries", "head dim", "fp32"),
)
def test_calls_that_the_hopper_kernel_does_not_take_are_left_alone(changes: dict[str, Any]) -> None:
    made, records = compiled(after("gate merged heads"), **changes)
    assert not epilogues(made) and not refusals(records)


def test_calls_that_another_kernel_is_faster_for_are_left_alone() -> None:
    with chosen("triton"):
        made, records = compiled(after("gate merged heads"))
    assert not epilogues(made) and not refusals(records)


def test_calls_on_a_cpu_are_left_alone() -> None:
    given = fusions.inputs(1, 256, 4, 2, 64, torch.bfloat16, "cpu")
    model = after("gate merged heads")
    torch.compiler.reset()
    with torch.no_grad(), decisions.recording() as log:
        result = torch.compile(lambda *tensors: model(Inputs(*tensors)), backend=backend)(*given)
    assert torch.allclose(result.float(), model(given).float(), atol=2.0**-6) and not refusals(log.records)


def test_lengths_that_vary_are_left_alone() -> None:
    made, records = compiled(after("gate merged heads"), dynamic=True)
    assert not epilogues(made) and refusals(records) == ["expected constant sizes, got some that vary"]


def test_kernels_that_are_timed_are_left_alone() -> None:
    made, records = compiled(with_lse, max_autotune=True)
    assert not epilogues(made) and refusals(records) == [f"{TIMED}; lse is read too"]


def test_every_form_is_taken() -> None:
    def windows(given: Inputs) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (given.q, given.k, given.v))
        lengths = given.x[:, 0, 0].to(torch.int32)
        out = OPS.sliding_self(q, k, v, 256, None, lengths, softcap=20.0)[0].transpose(1, 2)
        return (out * torch.sigmoid(given.gate)).flatten(2)

    made, _ = compiled(windows)
    assert epilogues(made) == [GATE]
    assert "'sliding_self', [256], " in made.wrapper and ", 20.0, 'v0" in made.wrapper


def test_in_training_nothing_is_fused() -> None:
    with pretend_gpu("sm_90") as gpu:
        with gpu.fake_tensors():
            given = [t.requires_grad_() for t in fusions.inputs(*SIZES, torch.bfloat16, "cuda")]
        with decisions.recording() as log:
            made = generate(lambda *tensors: after("gate merged heads")(Inputs(*tensors)), *given, backend=backend)
    assert not epilogues(made) and refusals(log.records)


def test_layers_are_fused_each_and_share_their_operands_memory() -> None:
    """Padding and starts that the graph computes are contiguous once, not once more in every layer's call."""

    def layers(given: Inputs) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (given.q, given.k, given.v))
        padding = given.x[:, :, 0] > 0
        start = given.x[0, 0, :1].to(torch.int32).expand(2)
        for _ in range(3):
            q = OPS.full_self(q, k, v, padding, start)[0] + q
        return q

    made, records = compiled(layers)
    assert len(epilogues(made)) == len(said(records, "fused")) == 3
    assert len(re.findall(r"triton_\w+\.run\(", made.wrapper)) == 2
    starts = re.findall(r"_epilogue\.default\([^;]*?, (buf\d+), (buf\d+), None, None, None, 'full_self'", made.wrapper)
    assert len(starts) == 3 and len(set(starts)) == 1
