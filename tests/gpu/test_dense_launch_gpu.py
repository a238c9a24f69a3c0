"""Kept launches of the Hopper dense kernel on a GPU: first and later ones give the same, wherever they run."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import Call, Case, make
from tests.hopper import chosen

pytestmark = pytest.mark.gpu

BASE = Case("full_self", torch.bfloat16, heads=(8, 2), lengths=(500, 500), dims=(128, 128), band=300)
CASES = [
    BASE,
    dataclasses.replace(BASE, form="sliding_self", dims=(64, 64)),
    dataclasses.replace(BASE, form="segment_cross", padding="some"),
    dataclasses.replace(BASE, q_start=True, lengths=(300, 700), softcap=30.0),
]


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    from custom_ops.kernels.gluon import kept_launch

    kept_launch.kept_tensor_map.cache_clear()
    with chosen("gluon"):
        yield


def on_gpu(case: Case) -> Call:
    torch.manual_seed(3)
    return make(case, "cuda")


def run(call: Call, *qkv: Tensor, **keywords: Any) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return call.form.op(*(qkv or call.qkv), **{**call.operands, **call.keywords, **keywords})


def through_triton(call: Call, monkeypatch: pytest.MonkeyPatch, *qkv: Tensor, **keywords: Any) -> tuple[Tensor, Tensor]:
    """The results of a launch that Triton binds, specialises and encodes."""
    from custom_ops.kernels.gluon.kept_launch import KeptLaunch

    with monkeypatch.context() as patch:
        patch.setattr(KeptLaunch, "is_ready", False)
        return run(call, *qkv, **keywords)


def same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def kept() -> tuple[int, int]:
    """Launches and tensor maps that were made."""
    from custom_ops.kernels.gluon import dense_launch, kept_launch

    return dense_launch._launch_of.cache_info().misses, kept_launch.kept_tensor_map.cache_info().misses


@pytest.mark.parametrize("case", CASES, ids=str)
def test_later_launches_give_what_triton_s_give(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    call = on_gpu(case)
    expected = through_triton(call, monkeypatch)
    assert kept() == (1, 0)
    run(call)  # Triton's: the launch is kept now
    for _ in range(3):
        assert same(run(call), expected)
    assert kept()[0] == 1 and kept()[1] >= 4
    other = tuple(torch.randn_like(t) for t in call.qkv)  # elsewhere in memory
    assert same(run(call, *other), through_triton(call, monkeypatch, *other))
    assert same(run(call, scale=0.03), through_triton(call, monkeypatch, scale=0.03))
    assert kept()[0] == 1
    strided = tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in other)
    assert same(run(call, *strided), run(call, *other))
    assert kept()[0] == 2


def test_maps_outlive_the_memory_that_they_were_made_for() -> None:
    call = on_gpu(BASE)
    expected = run(call)
    first = [t.clone() for t in call.qkv]
    assert same(run(call, *first), expected)
    addresses = {t.data_ptr() for t in first}
    del first
    torch.cuda.synchronize()
    again = [t.clone() for t in call.qkv]
    assert addresses & {t.data_ptr() for t in again}  # the allocator gives memory out again
    assert same(run(call, *again), expected)


def test_a_captured_graph_replays_with_new_contents() -> None:
    call = on_gpu(BASE)
    expected = run(call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = run(call)
        second = run(call)
    graph.replay()
    assert same(first, expected) and same(second, expected)
    call.qkv[0].mul_(-0.5)
    graph.replay()
    assert same(first, run(call)) and not torch.equal(first[0], expected[0])


def test_launches_go_to_the_current_stream() -> None:
    call = on_gpu(BASE)
    expected = run(call)
    torch.cuda.synchronize()
    slow, query = torch.cuda.Stream(), torch.zeros_like(call.qkv[0])
    with torch.cuda.stream(slow):
        torch.cuda._sleep(100_000_000)  # what is launched on another stream would read zeros
        query.copy_(call.qkv[0])
        found = run(call, query, *call.qkv[1:])
    slow.synchronize()
    assert same(found, expected)


def test_threads_share_what_is_kept() -> None:
    call = on_gpu(BASE)
    expected = run(call)
    inputs = [tuple(t.clone() for t in call.qkv) for _ in range(4)]
    found: list[Any] = []

    def work(qkv: tuple[Tensor, ...]) -> None:
        results = [run(call, *qkv) for _ in range(50)]
        torch.cuda.current_stream().synchronize()
        found.append(all(same(result, expected) for result in results))

    threads = [threading.Thread(target=work, args=(qkv,)) for qkv in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_gpu_are_launched_there() -> None:
    call = on_gpu(BASE)
    expected = run(call)
    there = tuple(t.to("cuda:1") for t in call.qkv)
    for _ in range(3):
        out, lse = run(call, *there)
        assert out.device == torch.device("cuda:1")
        assert same((out.to("cuda:0"), lse.to("cuda:0")), expected)
