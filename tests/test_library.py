"""When a library's kernel stands in for our template, and when it must not: on pretended GPUs, nothing runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

import lowered_attn  # noqa: F401
from custom_ops.forms import FORMS
from custom_ops.kernels.gluon import dense_choice
from custom_ops.kernels.gluon.dense_cost import Rates
from inductor_passes import LIBRARY_OPTION, decisions
from lowered_attn.compile import backend
from tests.hopper import chosen

pytest.importorskip("triton", reason="pretending to be a GPU compiles with Triton")

from inductor_passes.pretend_gpu import Generated, generate, pretend_gpu

OPS = torch.ops.lowered_attn
Attend = Callable[[Tensor, Tensor, Tensor], Any]
NARROW = 48
"""A head dim that the Hopper kernel does not take: it stands aside in every test but those about it."""


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return OPS.full_self(q, k, v, scale=0.25)[0]


def empty_heads(batch: int, length: int, heads: tuple[int, ...], dims: tuple[int, ...], dtype: torch.dtype) -> Any:
    """q, k and v ``[B, H, L, D]``, token-major."""
    return [
        torch.empty(batch, length, count, dim, device="cuda", dtype=dtype).transpose(1, 2)
        for count, dim in zip(heads, dims, strict=True)
    ]


def compiled(
    attend: Attend,
    length: int = 256,
    dim: int = NARROW,
    dtype: torch.dtype = torch.bfloat16,
    arch: str = "sm_90",
    value_dim: int | None = None,
    heads: tuple[int, int, int] = (8, 2, 2),
    batch: int = 2,
    **keywords: Any,
) -> tuple[Generated, list[decisions.Decision]]:
    with pretend_gpu(arch) as gpu:
        with gpu.fake_tensors():
            q, k, v = empty_heads(batch, length, heads, (dim, dim, value_dim or dim), dtype)
        with decisions.recording() as log:
            return generate(attend, q, k, v, backend=backend, **keywords), log.records


@pytest.fixture(autouse=True)
def with_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)


def test_plain_causal_attention_takes_cudnn() -> None:
    generated, records = compiled(causal)
    assert [d.facts.get("kernel") for d in records] == ["cudnn"], records
    assert "_scaled_dot_product_cudnn_attention" in generated.wrapper
    assert "None, False, 0.0, True, False, scale=0.25" in generated.wrapper  # no lse wanted; causal; the scale
    assert not generated.kernels


def test_the_decision_says_why_the_hopper_kernel_is_not_taken() -> None:
    (decision,) = compiled(causal)[1]
    reason = "head_dim: expected a multiple of 8 from 64 to 256, got 48"
    assert decision.facts["against_hopper"] == [reason] and decision.detail.endswith(f"not the Hopper kernel: {reason}")


@pytest.mark.parametrize(
    "keywords",
    [{"dim": 64}, {"dim": 128, "dtype": torch.half}, {"dim": 192, "value_dim": 128, "heads": (16, 16, 16)}],
    ids=["64", "128", "DeepSeek's prefill"],
)
def test_cudnn_steps_aside_for_the_hopper_kernel(keywords: dict[str, Any]) -> None:
    with chosen("gluon"):
        generated, records = compiled(causal, **keywords)
    (decision,) = [d for d in records if d.stage == "lowered"]
    assert decision.facts["kernel"] == "gluon_dense" and decision.facts["against_hopper"] == []
    assert {"gluon", "cudnn"} <= decision.facts["predicted_us"].keys(), "cuDNN was asked about, and explain says so"
    assert "cudnn" in decision.detail and "cudnn" not in generated.wrapper and not generated.kernels


def test_cudnn_takes_the_shapes_that_it_is_predicted_to_be_faster_for() -> None:
    with chosen("cudnn"):
        (decision,) = compiled(causal, dim=64)[1]
        assert decision.facts["kernel"] == "cudnn" and "predicted: " in decision.facts["against_hopper"][0]
        assert {"gluon", "cudnn"} <= decision.facts["predicted_us"].keys()
        records = compiled(causal, dim=64, dynamic=True)[1]
        assert [d.facts["kernel"] for d in records if d.stage == "lowered"] == ["gluon_dense"], records


def test_cudnn_steps_aside_for_the_template_where_that_is_predicted_to_be_fastest() -> None:
    with chosen("triton"):
        generated, records = compiled(causal, dim=64)
    (decision,) = [d for d in records if d.stage == "lowered"]
    assert decision.facts["kernel"] == "triton_grouped" and "predicted: " in decision.facts["against_hopper"][0]
    assert {"gluon", "triton", "cudnn"} == decision.facts["predicted_us"].keys()
    assert "cudnn" not in generated.wrapper


OURS = Rates(10.0, 2.0, 1.0)
MADE_UP = {"gluon2": OURS, "gluon3": OURS, "cudnn": Rates(5.0, 0.5, 1.0), "triton": Rates(1.0, 2.0, 1.0)}
"""By which the template takes calls with few items, cuDNN short ones with many, and the Hopper kernel long ones."""
CALLS = {
    "few": ("full_self", 128, 1),
    "few, no mask": ("bidirectional", 128, 1),
    "few, window": ("sliding_self", 128, 1),
    "many": ("full_self", 128, 128),
    "many, no mask": ("bidirectional", 128, 128),
    "many, window": ("sliding_self", 256, 128),
    "long": ("full_self", 8192, 2),
}
TAKERS = {"few": "triton", "many": "cudnn", "many, window": "gluon", "long": "gluon"}


@pytest.mark.parametrize("name", CALLS)
def test_the_compiler_chooses_as_eager_calls_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from custom_ops.kernels import launch

    form, length, batch = CALLS[name]
    ints = (200,) if form == "sliding_self" else ()
    rates = {(kernel, dim, "causal"): rate for kernel, rate in MADE_UP.items() for dim in dense_choice.HEAD_DIMS}
    monkeypatch.setattr(dense_choice, "RATES", rates)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: launch.LEAST_CUDNN)
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda self: 0)
    heads, dims = (8, 2, 2), (64, 64, 64)
    monkeypatch.setattr(dense_choice, "best_plan", dense_choice.best_plan.__wrapped__)
    with pretend_gpu("sm_90") as gpu:
        launch._decision.cache_clear()
        with gpu.fake_tensors():
            query, key, value = empty_heads(batch, length, heads, dims, torch.bfloat16)
            slots = FORMS[form].slots({o.name: ints[0] if o.kind == "int" else None for o in FORMS[form].operands})
            eager, why = launch.kernel_for(FORMS[form], query, key, value, slots)
        launch._decision.cache_clear()
    (decision,) = [
        d
        for d in compiled(lambda q, k, v: FORMS[form].op(q, k, v, *ints)[0], length, 64, batch=batch, heads=heads)[1]
        if d.stage == "lowered"
    ]
    assert eager == TAKERS.get(name, eager), why
    assert decision.facts["kernel"] == {"gluon": "gluon_dense", "triton": "triton_grouped", "cudnn": "cudnn"}[eager]
    assert decision.facts["against_hopper"] == ([] if eager == "gluon" else [why]) and why in decision.detail


def test_an_eager_call_is_predicted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For who takes it and for its launch."""
    pytest.importorskip("triton.experimental.gluon", reason="the kernel is written in Gluon")
    from custom_ops.kernels import launch
    from custom_ops.kernels.gluon import dense_launch

    form = FORMS["full_self"]
    slots = form.slots(dict.fromkeys(form.operand_names))
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda self: 0)
    launched = mock.create_autospec(dense_launch._Launch.__call__)
    monkeypatch.setattr(dense_launch._Launch, "__call__", launched)
    planned = mock.create_autospec(dense_choice.plan, side_effect=dense_choice.plan)
    monkeypatch.setattr(dense_choice, "plan", planned)
    dense_choice.best_plan.cache_clear()
    with pretend_gpu("sm_90") as gpu, gpu.fake_tensors():
        query, key, value = empty_heads(4, 4096, (32, 8, 8), (128, 128, 128), torch.bfloat16)
        launch.forward(form, query, key, value, slots, scale=0.1)
    assert launched.call_count == 1
    assert sorted(call.args[4].consumers for call in planned.call_args_list) == [2, 3], "each tiling that there is"


def test_lse_is_asked_for_where_it_is_read() -> None:
    generated, _ = compiled(lambda q, k, v: OPS.full_self(q, k, v))
    assert "None, True, 0.0, True, False, scale=None" in generated.wrapper


def with_padding(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    padding = torch.zeros(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
    return OPS.full_self(q, k, v, padding)[0]


def with_start(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return OPS.full_self(q, k, v, None, torch.zeros(q.shape[0], dtype=torch.int32, device=q.device))[0]


@pytest.mark.parametrize(
    ("attend", "keywords"),
    [
        (causal, {"options": {LIBRARY_OPTION: False}}),
        (causal, {"arch": "sm_80"}),
        (causal, {"dtype": torch.float32}),
        (causal, {"length": 127}),
        (causal, {"dim": 20}),
        (causal, {"dynamic": True}),
        (causal, {"heads": (4, 4, 1)}),
        (causal, {"heads": (4, 4, 2), "value_dim": 128}),
        (causal, {"value_dim": 512}),
        (with_padding, {}),
        (with_start, {}),
        (lambda q, k, v: OPS.full_self(q, k, v, softcap=50.0)[0], {}),
        (lambda q, k, v: OPS.sliding_self(q, k, v, 32)[0], {}),
        (lambda q, k, v: OPS.full_self(q[:, :, :, ::1], k[:, :, :, :64], v[:, :, :, 1:33])[0], {}),
    ],
    ids=[
        "switched off",
        "ampere",
        "fp32",
        "short",
        "odd head dim",
        "dynamic",
        "values that all heads share",
        "values that pairs of heads share",
        "wide values",
        "padding",
        "q_start",
        "soft-cap",
        "window",
        "sliced",
    ],
)
def test_near_misses_keep_the_template(attend: Attend, keywords: dict[str, Any]) -> None:
    generated, records = compiled(attend, **keywords)
    assert [d.facts["kernel"] for d in records if d.stage == "lowered"] == ["triton_grouped"], records
    assert "cudnn" not in generated.wrapper
    assert any("tl.dot" in source for source in generated.kernels.values())
