"""Compiling for a GPU that is not there: what it generates, what it refuses, and that it leaves nothing behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="Triton compiles the generated code")

import triton
import triton.backends
import triton.language as tl
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.fx_passes import joint_graph
from torch._inductor.graph import GraphLowering
from torch._inductor.output_code import CompiledFxGraph
from torch._inductor.select_algorithm import AlgorithmSelectorCache
from torch._subclasses.fake_tensor import FakeTensorMode

from inductor_passes import pretend_gpu as pretending
from inductor_passes.pretend_gpu import (
    GPUS,
    CompiledKernel,
    Generated,
    GpuFacts,
    PretendGpuError,
    compile_launches,
    compile_with_triton,
    generate,
    pretend_gpu,
)
from inductor_passes.resources import Resources, compile_kernel, read_resources

REPLACED = (
    torch.cuda,
    CudaInterface,
    CudaInterface.Worker,
    torch._C,
    torch._inductor.config,
    torch._functorch.config,
    triton.runtime.driver,
    AsyncCompile,
    joint_graph,
    GraphLowering,
    CompiledFxGraph,
    AlgorithmSelectorCache,
)


def empty(*shape: int, **more: Any) -> Tensor:
    return torch.empty(*shape, device="cuda", **more)


def scaled(x: Tensor) -> Tensor:
    return x * 2 + 1


def generate_here(fn: Any, arch: str, *shapes: tuple[int, ...], **more: Any) -> Generated:
    """Generate with plain Inductor for float32 inputs of these shapes."""
    with pretend_gpu(arch) as gpu:
        with gpu.fake_tensors():
            tensors = [empty(*shape) for shape in shapes]
        return generate(fn, *tensors, backend="inductor", **more)


@pytest.fixture(scope="module")
def pointwise() -> Generated:
    return generate_here(scaled, "sm_90", (1024,))


@pytest.fixture
def nothing_stays() -> Iterator[None]:
    """Fail where a test leaves a part of torch or Triton replaced."""

    def state() -> list[dict[str, Any]]:
        named = [{k: v for k, v in vars(owner).items() if not k.startswith("__")} for owner in REPLACED]
        return [*named, dict(triton.backends.backends), {"modes": pretending._open[:]}]

    # Importing Inductor's modules, and reading a lazy attribute, adds names: that happens once, here.
    with pretend_gpu("sm_90"):
        pass
    before = state()
    answers = torch.cuda.is_available(), device_guard_answers()
    yield
    changed = [
        f"{owner}.{name}"
        for owner, old, new in zip([*REPLACED, "backends", "open"], before, state(), strict=True)
        for name in old.keys() | new.keys()
        if old.get(name) is not new.get(name) and old.get(name) != new.get(name)
    ]
    assert changed == []
    assert (torch.cuda.is_available(), device_guard_answers()) == answers


def device_guard_answers() -> str:
    """What C++ does with a fake CUDA tensor's device: on a CPU build of torch, it has none to switch to."""
    with FakeTensorMode():
        try:
            return str(empty(4, 4)[0].device)
        except RuntimeError as error:
            return str(error).splitlines()[0]


def test_the_machine_is_as_it_was_afterwards(nothing_stays: None) -> None:
    generate_here(scaled, "sm_90", (1024,))
    x = torch.randn(16)
    torch.testing.assert_close(torch.compile(scaled)(x), scaled(x))


def test_an_error_inside_leaves_nothing_behind(nothing_stays: None) -> None:
    with pytest.raises(ZeroDivisionError), pretend_gpu("sm_80"):
        assert torch.cuda.is_available() and torch.cuda.get_device_name() == GPUS["sm_80"].name
        raise ZeroDivisionError


def test_a_failing_compile_leaves_nothing_behind(nothing_stays: None) -> None:
    def wrong(x: Tensor) -> Tensor:
        return x @ x

    with pytest.raises(Exception, match="(?i)size|shape"):
        generate_here(wrong, "sm_90", (3, 4))


@pytest.mark.parametrize("arch", GPUS)
def test_each_architecture_answers_for_itself(arch: str, nothing_stays: None) -> None:
    facts = GPUS[arch]
    with pretend_gpu(arch):
        assert torch.cuda.get_device_capability() == (facts.major, facts.minor)
        assert torch.cuda.get_device_properties(0) is facts
        assert CudaInterface.get_compute_capability() == facts.capability
        assert CudaInterface.Worker.get_device_properties().multi_processor_count == facts.multi_processor_count
        assert triton.runtime.driver.active.get_current_target().arch == facts.capability
    (source,) = generate_here(scaled, arch, (1024,)).kernels.values()
    assert f"cc={facts.capability}" in source


def test_contexts_nest(nothing_stays: None) -> None:
    with pretend_gpu("sm_90"), pretend_gpu("sm_100"):
        assert torch.cuda.get_device_capability() == (10, 0)
        assert len(pretending._open) == 2


def test_generated_code_is_triton_and_a_wrapper(pointwise: Generated) -> None:
    ((name, source),) = pointwise.kernels.items()
    assert f"def {name}(" in source and "tl.store" in source
    assert f"{name}.run(" in pointwise.wrapper and "def call(" in pointwise.wrapper


def test_a_model_generates_forward_and_backward(nothing_stays: None) -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.RMSNorm(256)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x)[0].sigmoid()

    with pretend_gpu("sm_90") as gpu:
        with gpu.fake_tensors(), torch.device("cuda"):
            model, x = Norm(), torch.empty(4, 64, 256)
        trained = generate(model, x, backend="inductor")
        with torch.no_grad():
            used = generate(model, x, backend="inductor")
    assert trained.wrapper.count("def call(") == 2 and used.wrapper.count("def call(") == 1
    assert len(trained.kernels) > len(used.kernels)


def test_symbolic_sizes_reach_the_kernel() -> None:
    ((name, source),) = generate_here(scaled, "sm_90", (1000,), dynamic=True).kernels.items()
    assert f"def {name}(in_ptr0, out_ptr0, xnumel," in source
    assert "xnumel = 1000" not in source


def test_cuda_graph_mode_compiles(nothing_stays: None) -> None:
    assert len(generate_here(scaled, "sm_90", (1024,), mode="reduce-overhead").kernels) == 1


def test_indexing_copies_and_constants_need_no_device() -> None:
    def odd(x: Tensor, y: Tensor) -> Tensor:
        z = x.t().contiguous().index_put((torch.zeros(2, dtype=torch.int64, device="cuda"),), y[:2])
        return z[0] + torch.full((64,), 3.0, device="cuda") + x[0] * 0

    assert generate_here(odd, "sm_90", (64, 64), (64, 64)).kernels


@pytest.mark.parametrize("values", [[], [1.0, 2.0]])
def test_tensors_of_numbers_are_made_on_the_gpu(values: list[float]) -> None:
    """As a cache that grows makes its first, empty, keys while the model runs."""

    def append(x: Tensor) -> Tensor:
        return torch.cat([torch.tensor(values, dtype=x.dtype, device=x.device), x.flatten()]) * 2

    with pretend_gpu("sm_90") as gpu:
        with gpu.fake_tensors():
            x = torch.empty(4, 4, device="cuda")
            assert torch.tensor(values, device="cuda").device.type == "cuda"
        assert len(generate(append, x, backend="inductor").kernels) == 1


def test_kernels_of_one_name_are_kept_apart() -> None:
    gpu = pretending.PretendedGpu(GPUS["sm_90"], kernels=[("a", "1"), ("b", "2"), ("a", "1"), ("a", "3"), ("a", "4")])
    assert gpu.collect_from(0, 0).kernels == {"a": "1", "b": "2", "a__2": "3", "a__3": "4"}


def test_choices_are_refused_because_nothing_can_be_timed() -> None:
    with pytest.raises(Exception, match=r"expected one choice, got \d+ .*cannot be timed.*offer one"):
        generate_here(torch.mm, "sm_90", (256, 256), (256, 256), options={"max_autotune": True})


def test_mistakes_are_named() -> None:
    with (
        pytest.raises(ValueError, match="arch: expected one of sm_80, sm_90, sm_100, got 'sm_70'"),
        pretend_gpu("sm_70"),
    ):
        pass
    with pytest.raises(PretendGpuError, match="generate: expected an open pretend_gpu context"):
        generate(scaled, torch.ones(2), backend="inductor")
    with pytest.raises(PretendGpuError, match="compile_launches: expected an open pretend_gpu context"):
        compile_launches(scaled, torch.ones(2))
    with pytest.raises(PretendGpuError, match="compile_with_triton: expected an open pretend_gpu context"):
        compile_with_triton("")
    with pretend_gpu("sm_90") as gpu:
        with pytest.raises(PretendGpuError, match="args: expected at least one fake tensor"):
            generate(scaled, torch.ones(2), backend="inductor")
        with gpu.fake_tensors():
            x = empty(16)
        with pytest.raises(PretendGpuError, match="expected 'scaled' to reach Inductor.*got 'eager'"):
            generate(scaled, x, backend="eager")
        with pytest.raises(PretendGpuError, match="source: expected one kernel that Inductor generated, got 0"):
            compile_with_triton("x = 1")


def test_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(PretendGpuError, match="TRITON_INTERPRET: expected it unset"), pretend_gpu("sm_90"):
        pass


def test_a_pointwise_kernel_compiles(pointwise: Generated) -> None:
    (source,) = pointwise.kernels.values()
    kernel = compile_kernel(source, "sm_90")
    assert kernel.kernel in pointwise.kernels and kernel.arch == "sm_90" and "num_warps" in kernel.config
    assert 0 < kernel.registers <= 64 and kernel.problems == []
    assert kernel.wgmma == kernel.mma == kernel.tcgen05 == kernel.spills == kernel.shared_memory == 0
    with pytest.raises(PretendGpuError, match="expected a kernel generated for sm_80, got one for sm_90"):
        compile_kernel(source, "sm_80")


@triton.jit
def doubling_kernel(X, Y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + at, tl.load(X + at, mask=at < n) * 2, mask=at < n)


def double(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    doubling_kernel[(triton.cdiv(x.numel(), 256),)](x, y, x.numel(), BLOCK=256, num_warps=4)
    return y


def test_eager_launches_compile_for_each_architecture(nothing_stays: None) -> None:
    before = dict(vars(doubling_kernel))
    for arch, target in (("sm_90", "sm_90a"), ("sm_80", "sm_80")):
        with pretend_gpu(arch) as gpu:
            with gpu.fake_tensors():
                x = empty(1000, dtype=torch.bfloat16)
            (kernel,) = compile_launches(double, x)
            with pytest.raises(PretendGpuError, match="expected 'scaled' to launch Triton kernels, got no launch"):
                compile_launches(scaled, x)
        assert kernel.name == "doubling_kernel" and kernel.config == "num_warps: 4"
        assert f".target {target}\n" in kernel.ptx and read_resources(kernel, arch).problems == []
    # What a kernel remembers of a pretended device must not serve a real one.
    assert vars(doubling_kernel).get("compile") is before.get("compile") and not doubling_kernel.device_caches


LOG = """
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized
ptxas info    : Compiling entry function 'kernel' for 'sm_90a'
ptxas info    : Function properties for kernel
    48 bytes stack frame, 44 bytes spill stores, 40 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers
"""
PTX = "wgmma.mma_async.sync.aligned a; wgmma.mma_async.sync.aligned b; mma.sync.aligned c; tcgen05.mma.cta_group::1 d;"


def test_ptxas_reports_are_read() -> None:
    kernel = read_resources(CompiledKernel("kernel", "num_warps: 4", PTX, 240000, LOG), "sm_90")
    counts = ["registers: 168", "spills: 84", "shared memory: 240000", "wgmma: 2", "mma: 1"]
    assert kernel.lines()[:5] == counts and kernel.lines()[5].startswith("warning: (C7510)")
    assert [problem.partition(":")[0] for problem in kernel.problems] == [
        "(C7510) Potential Performance Loss", "spills", "shared memory",
    ]  # fmt: skip
    blackwell = dataclasses.replace(kernel, arch="sm_100", warnings=())
    assert blackwell.lines() == [*counts, "tcgen05: 1"]
    with pytest.raises(ValueError, match="ptxas: expected a report of registers and spills, got ''"):
        read_resources(CompiledKernel("kernel", "", "", 0, ""), "sm_90")


def test_shared_memory_limits_are_those_of_the_architecture() -> None:
    kernel = Resources("kernel", "sm_90", "", 128, 0, 200000, wgmma=8, mma=0, tcgen05=0)
    assert kernel.problems == []
    (problem,) = dataclasses.replace(kernel, arch="sm_80").problems
    assert "at most 166912 bytes on sm_80, got 200000" in problem


@pytest.mark.gpu
def test_the_facts_are_those_of_the_card() -> None:
    real = torch.cuda.get_device_properties(0)
    facts = next((facts for facts in GPUS.values() if facts.name == real.name), None)
    if facts is None:
        pytest.skip(f"the table has no {real.name}")
    names = {field.name for field in dataclasses.fields(GpuFacts)} - {"uuid", "gcnArchName", "total_memory"}
    compared = [name for name in sorted(names) if hasattr(real, name)]
    assert {"L2_cache_size", "multi_processor_count", "shared_memory_per_block_optin"} <= set(compared)
    assert {n: getattr(facts, n) for n in compared} == {n: getattr(real, n) for n in compared}
    assert facts.total_memory == pytest.approx(real.total_memory, rel=0.02)
