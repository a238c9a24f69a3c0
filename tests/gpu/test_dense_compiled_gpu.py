"""Compiled calls that the Hopper kernel takes, against fp64 and against eager calls: forms, gradients, CUDA graphs."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from custom_ops.forms import FORMS
from inductor_passes import compat, decisions, lowering
from tests.helpers import (
    Call,
    Case,
    Results,
    assert_as_exact_as_the_reference,
    assert_outputs_are_well_formed,
    cotangents,
    make,
    run,
)
from tests.hopper import chosen

pytestmark = pytest.mark.gpu

BASE = Case("full_self", torch.bfloat16, heads=(8, 2), lengths=(1000, 1000), dims=(128, 128), band=300)
CASES = [
    *(dataclasses.replace(BASE, form=form) for form in FORMS),
    *(
        dataclasses.replace(BASE, form=form, dtype=torch.float16, dims=(64, 64), padding="some", q_start=True)
        for form in FORMS
    ),
    dataclasses.replace(BASE, heads=(8, 8), dims=(192, 128), layout="token_major"),
    dataclasses.replace(BASE, dims=(256, 256), softcap=30.0, lengths=(577, 577)),
    dataclasses.replace(BASE, layout="head_dim_first"),
    dataclasses.replace(BASE, layout="strided_last"),
]


@pytest.fixture(autouse=True)
def on_hopper() -> Iterator[None]:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    with chosen("gluon"):
        yield


def call_of(case: Case) -> Call:
    torch.manual_seed(7)
    return make(case, "cuda")


def compiled(case: Case, **keywords: Any) -> Callable[..., Any]:
    """The case's op compiled, its scale and soft-cap no inputs: a float that enters a graph compiles it twice."""
    torch._dynamo.reset()
    counters.clear()
    given = {name: value for name, value in (("scale", case.scale), ("softcap", case.softcap)) if value}

    def attend(q: Tensor, k: Tensor, v: Tensor, **operands: Any) -> Any:
        return FORMS[case.form].op(q, k, v, **operands, **given)

    graph = torch.compile(attend, fullgraph=True, **{"backend": "lowered_attn", **keywords})

    def step(*qkv: Tensor, scale: float | None, softcap: float, **operands: Any) -> Any:
        assert (scale, softcap) == (case.scale, case.softcap)
        return graph(*qkv, **operands)

    return step


@contextlib.contextmanager
def decided(**patches: Any) -> Iterator[decisions.Log]:
    """What is decided inside: what comes from a cache decides nothing, so there is none."""
    with compat.config.patch({"force_disable_caches": True, **patches}), decisions.recording() as log:
        yield log


def kernels_of(log: decisions.Log) -> set[object]:
    return {d.facts["kernel"] for d in log.records if d.stage == "lowered"}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_compiled_call_is_the_eager_call(case: Case, dynamic: bool) -> None:
    call = call_of(case)
    with decided() as log:
        results = run(compiled(case, dynamic=dynamic), call)
    assert kernels_of(log) == {"gluon_dense"}, log.records
    assert_outputs_are_well_formed(results.out, results.lse, call)
    assert_as_exact_as_the_reference(results, call)
    eager = run(call.form.op, call)
    assert torch.equal(results.out, eager.out) and torch.equal(results.lse, eager.lse)


@pytest.mark.parametrize("form", ["full_self", "sliding_self", "document_causal"])
def test_gradients(form: str) -> None:
    case = dataclasses.replace(BASE, form=form, lengths=(300, 300))
    call = call_of(case)
    grads = cotangents(call)
    with decided() as log:
        results = run(compiled(case, dynamic=False), call, grads)
    assert kernels_of(log) == {"gluon_dense"}, log.records
    assert_as_exact_as_the_reference(results, call, grads)


@pytest.mark.parametrize("form", ["full_self", "segment_cross"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_cuda_graphs_replay_with_new_inputs(form: str, training: bool) -> None:
    case = dataclasses.replace(BASE, form=form, lengths=(300, 300), padding="some", q_start=True)
    with decided(**{"triton.cudagraph_or_error": True}) as log:
        step = compiled(case, mode="reduce-overhead", dynamic=False)
        for replay in range(5):
            torch.manual_seed(replay)
            call = make(case, "cuda")
            grads = cotangents(call) if training else None
            torch.compiler.cudagraph_mark_step_begin()
            results = run(step, call, grads)
            # Outputs live in the graph's memory until the next step.
            results = Results(*(None if t is None else t.clone() for t in results))
            wanted = run(call.form.op, call, grads)
            assert torch.equal(results.out, wanted.out) and torch.equal(results.lse, wanted.lse), replay
            if training:
                assert_as_exact_as_the_reference(results, call, grads)
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert kernels_of(log) == {"gluon_dense"}, log.records


def test_any_lengths_are_right_in_one_graph() -> None:
    """Few queries take the portable kernel, which the op decides at run time."""
    backend = CompileCounterWithBackend("lowered_attn")
    case = dataclasses.replace(BASE, q_start=True, padding="some")
    step = compiled(case, backend=backend, dynamic=True)
    random.seed(0)
    after_two = 0
    for i, query_len in enumerate([500, 300, 2, 127, 128, 1337, *(random.randint(2, 600) for _ in range(14))]):
        call = call_of(dataclasses.replace(case, lengths=(query_len, query_len + random.randint(1, 200))))
        assert_as_exact_as_the_reference(run(step, call), call)
        after_two = backend.frame_count if i == 1 else after_two
    assert backend.frame_count == after_two <= 2


@pytest.mark.parametrize("fastest", ["hopper", "timed"])
@pytest.mark.parametrize("form", ["full_self", "sliding_self"])
def test_autotuning_beside_templates(form: str, fastest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = call_of(dataclasses.replace(BASE, form=form, q_start=True, padding="some"))
    monkeypatch.setattr(lowering, "CANDIDATES", lowering.CANDIDATES[8:10])  # two beside the shipped tiling
    if fastest == "hopper":
        monkeypatch.setattr(compat, "select", lambda name, choices, inputs, layout: choices[-1].output_node())
    torch._dynamo.reset()

    def attend(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Tensor:
        return call.form.op(q, k, v, **arguments)[0]  # with what follows it would take the kernel untimed

    arguments = call.operands
    with decided() as log:
        step = torch.compile(attend, backend="lowered_attn", fullgraph=True, options={"max_autotune": True})
        found = step(*call.qkv, **arguments)
    (kernel,) = kernels_of(log)
    assert kernel == "gluon_dense" or (fastest == "timed" and kernel == "triton_grouped"), log.records
    eager = call.form.op(*call.qkv, **arguments)
    assert_as_exact_as_the_reference(Results(found, eager[1]), call)
    if fastest == "hopper":
        assert torch.equal(found, eager[0])


def test_a_layer_reads_its_projections_where_they_lie() -> None:
    x, weight = torch.randn(2, 1000, 512, device="cuda"), torch.randn(512, 12 * 64, device="cuda") / 512**0.5

    def layer(x: Tensor, weight: Tensor, op: Any) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (x @ weight).unflatten(-1, (12, 64)).split([8, 2, 2], 2))
        return (op(q, k, v)[0] * torch.sigmoid(q)).transpose(1, 2).flatten(2)

    bf16 = [t.bfloat16() for t in (x, weight)]
    torch._dynamo.reset()
    op = FORMS["full_self"].op
    with decided() as log:
        step = torch.compile(lambda x, weight: layer(x, weight, op), backend="lowered_attn", fullgraph=True)
        found = step(*bf16)
    assert kernels_of(log) == {"gluon_dense"}, log.records
    # The gate is rounded twice in eager code and once here.
    torch.testing.assert_close(found, layer(*bf16, op), rtol=2**-7, atol=2**-7)
