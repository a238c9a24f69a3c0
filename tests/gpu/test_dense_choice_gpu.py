"""Calls that another kernel than the Hopper one takes, or that take it in another walk, on a GPU against fp64."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from custom_ops.form import empty_outputs
from custom_ops.kernels.gluon.dense_choice import Plan
from custom_ops.kernels.gluon.dense_cost import Walk
from tests.helpers import (
    Call,
    Case,
    assert_as_exact_as_the_reference,
    assert_outputs_are_well_formed,
    cotangents,
    make,
    run,
)
from tests.hopper import chosen

pytestmark = pytest.mark.gpu

BASE = Case("full_self", torch.bfloat16, heads=(8, 2), lengths=(512, 512), dims=(128, 128), layout="token_major")
CASES = [
    dataclasses.replace(BASE, form=form, heads=heads, dims=dims, dtype=dtype, lengths=(length, length))
    for form in ("full_self", "bidirectional")
    for heads, dims, dtype, length in (
        ((8, 2), (128, 128), torch.bfloat16, 128),
        ((4, 4), (64, 64), torch.float16, 512),
        ((8, 1), (96, 96), torch.bfloat16, 256),
        ((1, 1), (128, 128), torch.bfloat16, 256),
        ((4, 4), (192, 128), torch.bfloat16, 384),
        ((4, 2), (256, 256), torch.bfloat16, 512),
    )
]


@pytest.fixture(autouse=True)
def hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")


@pytest.fixture
def cudnn() -> Iterator[None]:
    from custom_ops.kernels import launch

    if (torch.backends.cudnn.version() or 0) < launch.LEAST_CUDNN:
        pytest.skip(f"needs cuDNN {launch.LEAST_CUDNN}, got {torch.backends.cudnn.version()}")
    with chosen("cudnn"):
        yield


def on_gpu(case: Case) -> Call:
    torch.manual_seed(11)
    return make(case, "cuda")


def kernels_of(call: Call) -> list[str]:
    """The names of the kernels that a call runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found, torch.no_grad():
        run(call.form.op, call)
        torch.cuda.synchronize()
    return [event.name for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cudnn_gives_what_the_op_promises(case: Case, cudnn: None) -> None:
    call = on_gpu(case)
    results = run(call.form.op, call)
    names = kernels_of(call)
    assert names and not any("dense_attention" in name or "forward_kernel" in name for name in names), names
    assert not any("copy" in name.lower() for name in names), names
    assert_outputs_are_well_formed(results.out, results.lse, call)
    promised = empty_outputs(call.qkv[0], call.qkv[2])
    assert [t.stride() for t in (results.out, results.lse)] == [t.stride() for t in promised]
    assert_as_exact_as_the_reference(results, call)
    again = run(call.form.op, call)
    assert torch.equal(results.out, again.out) and torch.equal(results.lse, again.lse)


def test_gradients_follow_from_cudnns_outputs(cudnn: None) -> None:
    call = on_gpu(BASE)
    grads = cotangents(call)
    assert_as_exact_as_the_reference(run(call.form.op, call, grads), call, grads)


def test_a_graph_of_cudnns_call_replays(cudnn: None) -> None:
    call = on_gpu(BASE)
    with torch.no_grad():
        expected = call.form.op(*call.qkv)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, lse = call.form.op(*call.qkv)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


def test_small_calls_take_what_was_measured_faster() -> None:
    from custom_ops.kernels import launch

    call = on_gpu(dataclasses.replace(BASE, lengths=(128, 128), heads=(32, 8), batch=32))
    slots = call.form.slots(call.operands)
    kernel, why = launch.kernel_for(call.form, *call.qkv, slots)
    if (torch.backends.cudnn.version() or 0) >= launch.LEAST_CUDNN:
        assert kernel == "cudnn", why
    head_major = [t.contiguous() for t in call.qkv]
    assert launch.kernel_for(call.form, *head_major, slots)[0] == "gluon"


@pytest.mark.parametrize("consumers", (2, 3))
@pytest.mark.parametrize("group_heads", (1, 2, 3, 7, 16))
@pytest.mark.parametrize("snake", (0, 1))
def test_every_walk_gives_the_same(consumers: int, group_heads: int, snake: int) -> None:
    from custom_ops.kernels.gluon import dense_launch

    call = on_gpu(dataclasses.replace(BASE, heads=(8, 8), lengths=(2500, 2500)))
    with chosen("gluon", consumers):
        expected = run(call.form.op, call)
    plan = Plan(0.0, consumers, Walk(group_heads, snake))
    with chosen("gluon"), mock.patch.object(dense_launch, "best_plan", return_value=plan):
        found = run(call.form.op, call)
    assert torch.equal(found.out, expected.out) and torch.equal(found.lse, expected.lse)
