"""Launches of the Hopper dense kernel as Triton makes them and as they are kept: the same bytes, made once.

Run by tests/test_kept_launch.py in a process of its own: tensors lie on the CPU, and Triton launches into
tests/fake_cuda.c.
"""

from __future__ import annotations

import gc
import struct
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from torch import Tensor

from custom_ops.epilogue import parse
from custom_ops.form import empty_outputs
from custom_ops.forms import FORMS
from custom_ops.kernels.gluon import compat, dense_launch, kept_launch
from custom_ops.kernels.gluon.dense_cost import H200
from tests.fake_cuda import FakeCuda, Launched

CASES: dict[str, tuple[str, dict[str, Any], float]] = {
    "causal": ("full_self", {}, 0.0),
    "window": ("sliding_self", {"window": 1024}, 0.0),
    "of one key, capped": ("sliding_self", {"window": 1}, 30.0),
    "from a start": ("full_self", {"q_start": torch.zeros(1, dtype=torch.int32)}, 0.0),
    "gated": ("full_self", {}, 0.0),
}
GATE = parse("v0 = sigmoid(y); v1 = mul(x, v0); v2 = bfloat16(v1)")


@pytest.fixture(scope="session")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> FakeCuda:
    return FakeCuda(tmp_path_factory.mktemp("cuda"))


@pytest.fixture(autouse=True)
def nothing_kept(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dense_launch, "gpu_of", lambda device: H200)
    dense_launch._launch_of.cache_clear()
    kept_launch.kept_tensor_map.cache_clear()
    cuda.expect_any()
    yield


def heads(count: int, length: int = 1024) -> Tensor:
    return torch.empty(1, length, count, 128, dtype=torch.bfloat16).transpose(1, 2)


class Call:
    """A call of a case: its tensors, and its launches."""

    def __init__(self, case: str = "causal", length: int = 1024) -> None:
        name, operands, self.softcap = CASES[case]
        form = FORMS[name]
        self.slots = form.slots({o: operands.get(o) for o in form.operand_names})
        self.mask = form.mask_of(self.slots)
        self.query, self.key, self.value = heads(32, length), heads(8, length), heads(8, length)
        self.out, self.lse = empty_outputs(self.query, self.value)
        self.epilogue, self.extra = (GATE, heads(32, length)) if case == "gated" else (None, None)

    def launch(self, scale: float = 0.1) -> None:
        dense_launch.forward(
            self.mask, self.query, self.key, self.value, self.slots, scale, self.softcap, self.out, self.lse,
            epilogue=self.epilogue, extra=self.extra,
        )  # fmt: skip

    def bytes(self, cuda: FakeCuda, scale: float = 0.1) -> Launched:
        cuda.expect_any()
        self.launch(scale)
        (kernel,) = (kernel for kernel in compiled() if kernel.function == cuda.launched.function)
        cuda.expect(kernel)
        self.launch(scale)
        return cuda.launched


def compiled() -> list[Any]:
    """The kernels that Triton compiled, the last one last."""
    (caches,) = dense_launch.dense_attention_kernel.device_caches.values()
    return list(caches[0].values())


def through_triton() -> Any:
    return mock.patch.object(kept_launch.KeptLaunch, "is_ready", False)


def counted() -> Any:
    """Counts launches that Triton binds and specialises."""
    run = triton.runtime.jit.JITFunction.run
    return mock.patch.object(triton.runtime.jit.JITFunction, "run", autospec=True, side_effect=run)


@pytest.mark.parametrize("case", CASES)
def test_a_kept_launch_is_triton_s_byte_by_byte(case: str, cuda: FakeCuda) -> None:
    call = Call(case)
    kept = call.bytes(cuda)
    with through_triton():
        assert call.bytes(cuda) == kept
    call.query, (call.out, call.lse), cuda.stream = heads(32), empty_outputs(call.query, call.value), 9
    call.extra = None if call.extra is None else heads(32)
    elsewhere = call.bytes(cuda, scale=0.3)
    with through_triton():
        assert call.bytes(cuda, scale=0.3) == elsewhere
    assert len(kept.values) > 4 * 128 and kept.values != elsewhere.values
    assert (kept.stream, elsewhere.stream) == (7, 9)
    cuda.stream = 7


def test_later_launches_encode_only_what_is_new(cuda: FakeCuda) -> None:
    call = Call()
    call.launch()
    call.launch()
    before = cuda.encoded, cuda.launches
    with counted() as run:
        for _ in range(10):
            call.launch()
        assert (cuda.encoded - before[0], cuda.launches - before[1]) == (0, 10)
        call.query = heads(32)
        call.launch()
        assert cuda.encoded - before[0] == 1
        assert run.call_count == 0
        call.query = torch.empty(1, 32, 1024, 128, dtype=torch.bfloat16)  # other strides
        call.launch()
        assert run.call_count == 1


def test_scales_are_arguments(cuda: FakeCuda) -> None:
    call = Call()
    values = call.bytes(cuda, 0.25).values
    kernels = len(compiled())
    with counted() as run:
        other = call.bytes(cuda, 0.5).values
    assert (run.call_count, len(compiled())) == (0, kernels)
    logarithm = struct.pack("f", 0.25 * dense_launch.LOG2_E), struct.pack("f", 0.5 * dense_launch.LOG2_E)
    assert other == values.replace(*logarithm) != values


def test_an_address_that_is_aligned_otherwise_has_a_kernel_of_its_own(cuda: FakeCuda) -> None:
    call = Call("from a start")
    call.launch()
    kernels = compiled()
    call.slots = call.slots._replace(q_start=torch.zeros(5, dtype=torch.int32)[1:2])
    call.launch()
    call.launch()
    assert len(compiled()) == len(kernels) + 1
    assert cuda.launched.function == compiled()[-1].function != kernels[-1].function


def test_what_is_kept_is_bounded(cuda: FakeCuda) -> None:
    call = Call()
    call.launch()
    memory = torch.empty(1024 * 32 * 128 + 8 * (kept_launch.TENSOR_MAPS + 100), dtype=torch.bfloat16)
    for start in range(0, 8 * (kept_launch.TENSOR_MAPS + 100), 8):
        call.query = torch.as_strided(memory, call.out.shape, call.out.stride(), start)
        call.launch()
    assert kept_launch.kept_tensor_map.cache_info().currsize == kept_launch.TENSOR_MAPS
    encoded = cuda.encoded
    call.launch()
    assert cuda.encoded == encoded
    for length in range(200, 201 + dense_launch.LAUNCHES):
        Call(length=length).launch()
    assert dense_launch._launch_of.cache_info().currsize == dense_launch.LAUNCHES


def test_no_memory_is_held(cuda: FakeCuda) -> None:
    call = Call()
    call.launch()
    call.launch()
    alive = [weakref.ref(t) for t in (call.query, call.key, call.value, call.out, call.lse)]
    del call
    gc.collect()
    assert [t() for t in alive] == [None] * 5


def test_hooks_see_every_launch(cuda: FakeCuda) -> None:
    call = Call()
    call.launch()
    seen: list[str] = []

    def hook(metadata: Any) -> None:
        seen.append(metadata.get()["name"])

    runtime = triton.knobs.runtime
    runtime.launch_enter_hook.add(hook)
    call.launch()
    call.launch()
    runtime.launch_enter_hook.remove(hook)
    call.launch()
    assert seen == ["dense_attention_kernel"] * 2
    with mock.patch.object(runtime, "launch_exit_hook", hook):
        call.launch()
    assert seen == ["dense_attention_kernel"] * 3


@pytest.mark.parametrize(
    "owner, name, value",
    (("runtime", "debug", True), ("runtime", "add_stages_inspection_hook", lambda *stages: ("", ""))),
)
def test_whoever_asks_for_other_code_gets_it(owner: str, name: str, value: Any, cuda: FakeCuda) -> None:
    call = Call()
    call.launch()
    with (
        mock.patch.object(getattr(triton.knobs, owner), name, value),
        mock.patch.object(triton.runtime.jit.JITFunction, "run", return_value=None) as run,
    ):
        call.launch()
    assert run.call_count == 1


def test_launches_of_an_unknown_triton_are_left_to_it(cuda: FakeCuda) -> None:
    call = Call()
    with mock.patch.object(kept_launch, "start_of", return_value=None), counted() as run:
        for _ in range(3):
            call.launch()
        assert run.call_count == 3
    kernel = compiled()[-1]
    assert compat.start_of(kernel) is not None
    with mock.patch.object(kernel.run, "launch", print):
        assert compat.start_of(kernel) is None
    with mock.patch.object(kernel.run, "global_scratch_size", 128):
        assert compat.start_of(kernel) is None


def test_a_descriptor_that_the_copy_engine_cannot_read_is_refused(cuda: FakeCuda) -> None:
    call = Call()
    call.launch()
    call.query = torch.empty(1024 * 32 * 128 + 1, dtype=torch.bfloat16).as_strided(
        call.out.shape, call.out.stride(), 1
    )
    for _ in range(2):
        with pytest.raises(AssertionError, match="16-byte aligned"):
            call.launch()
