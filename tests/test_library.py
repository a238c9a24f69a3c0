"""When a library's kernel stands in for our template, and when it must not: on pretended GPUs, nothing runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lowered_attn  # noqa: F401
from inductor_passes import LIBRARY_OPTION, decisions
from lowered_attn.compile import backend

pytest.importorskip("triton", reason="pretending to be a GPU compiles with Triton")

from inductor_passes.pretend_gpu import Generated, generate, pretend_gpu

OPS = torch.ops.lowered_attn
Attend = Callable[[Tensor, Tensor, Tensor], Any]


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return OPS.full_self(q, k, v, scale=0.25)[0]


def compiled(
    attend: Attend,
    length: int = 256,
    dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    arch: str = "sm_90",
    value_dim: int | None = None,
    heads: tuple[int, int, int] = (8, 2, 2),
    **keywords: Any,
) -> tuple[Generated, list[decisions.Decision]]:
    with pretend_gpu(arch) as gpu:
        with gpu.fake_tensors():
            q, k, v = (
                torch.empty(2, length, count, width, device="cuda", dtype=dtype).transpose(1, 2)
                for count, width in zip(heads, (dim, dim, value_dim or dim), strict=True)
            )
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


def test_deepseek_prefill_takes_cudnn() -> None:
    generated, records = compiled(causal, dim=192, value_dim=128, heads=(16, 16, 16))
    assert [d.facts.get("kernel") for d in records] == ["cudnn"], records
    assert not generated.kernels


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
