"""Compile for a GPU on a machine without one: Dynamo, AOTAutograd, Inductor, Triton and ptxas, but no launch.

    with pretend_gpu("sm_90") as gpu:
        with gpu.fake_tensors():
            q = torch.empty(2, 16, 1024, 128, device="cuda", dtype=torch.bfloat16)
        generated = generate(model, q, backend="lowered_attn")
    print(generated.kernels)

While the context is open, everything in this process that asks about the GPU is answered from `GPUS`: torch.cuda, the
device interface that Dynamo and Inductor use, the C++ code under them, and Triton's driver. Inductor's kernels are
collected as text instead of being compiled and loaded. Nothing can be launched and nothing can be timed, so a lowering
must offer exactly one choice. On exit every replaced part is put back (see `pretend_parts`).

The replacements are process-wide: do not run CUDA work, or another compile, in a second thread meanwhile.
"""

from __future__ import annotations

import collections
import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from inductor_passes import pretend_parts
from inductor_passes.gpu_facts import GPUS, GpuFacts, gpu_facts
from inductor_passes.pretend_device import PretendGpuError, pretend_cuda_device

__all__ = [
    "GPUS",
    "CompiledKernel",
    "Generated",
    "GpuFacts",
    "PretendGpuError",
    "PretendedGpu",
    "compile_launches",
    "compile_with_triton",
    "generate",
    "gpu_facts",
    "pretend_gpu",
]


@dataclass(frozen=True)
class Generated:
    """What Inductor wrote for one torch.compile call."""

    kernels: dict[str, str]
    """Triton source by kernel name, in the order the wrappers define them: a module each, imports included. Where
    forward and backward use one name for two kernels, the later one gets a suffix: "name__2"."""
    wrapper: str
    """Python source of the functions that allocate and launch, one after another: the forward, then the
    backward of a graph that needs one."""


@dataclass
class PretendedGpu:
    """The open context: its facts and what the compiler has written so far."""

    facts: GpuFacts
    wrappers: list[str] = field(default_factory=list)
    kernels: list[tuple[str, str]] = field(default_factory=list)

    def fake_tensors(self) -> FakeTensorMode:
        """A context in which tensors and modules are made without data, on device "cuda" too."""
        return FakeTensorMode(allow_non_fake_inputs=True)

    def collect_from(self, wrapper_mark: int, kernel_mark: int) -> Generated:
        """What was written since there were that many wrappers and kernels."""
        kernels: dict[str, str] = {}
        for name, source in self.kernels[kernel_mark:]:
            unique, copies = name, 1
            while kernels.get(unique, source) != source:
                copies += 1
                unique = f"{name}__{copies}"
            kernels[unique] = source
        return Generated(kernels=kernels, wrapper="\n\n".join(self.wrappers[wrapper_mark:]))


_open: list[PretendedGpu] = []


@contextlib.contextmanager
def pretend_gpu(arch: str) -> Iterator[PretendedGpu]:
    """Make this process compile for `arch` ("sm_80", "sm_90" or "sm_100") until the context closes.

    Contexts may nest, for different architectures too. Raises ValueError for an unknown architecture, and
    PretendGpuError where it cannot work: without Triton or under its interpreter, on a ROCm build of PyTorch, and
    where the C++ part is not built yet and there is no C++ compiler.
    """
    gpu = PretendedGpu(gpu_facts(arch))
    if torch.version.hip is not None:
        raise PretendGpuError(
            f"PyTorch: expected a CPU or CUDA build, got one for ROCm {torch.version.hip}; install another"
        )
    try:
        import triton
    except ImportError as error:
        raise PretendGpuError(
            "triton: expected it installed, got no such package; a CPU build of PyTorch does not bring it: install it"
        ) from error
    if triton.knobs.runtime.interpret:
        raise PretendGpuError(
            "TRITON_INTERPRET: expected it unset, got 1; kernels defined under Triton's interpreter have no code "
            "to compile: generate code in a process without that variable"
        )
    with contextlib.ExitStack() as stack:
        stack.callback(pretend_parts.forget_device_answers)
        stack.enter_context(pretend_cuda_device())
        pretend_parts.settle_inductor(stack)
        pretend_parts.keep_constants_on_the_cpu(stack)
        pretend_parts.let_modules_convert(stack)
        pretend_parts.replace_torch_queries(stack, gpu.facts)
        pretend_parts.replace_triton_driver(stack, gpu.facts)
        pretend_parts.collect_generated_code(
            stack, lambda name, source: gpu.kernels.append((name, source)), gpu.wrappers.append
        )
        pretend_parts.forget_device_answers()
        _open.append(gpu)
        stack.callback(_open.pop)
        yield gpu


def generate(
    fn: Callable[..., object],
    *args: object,
    backend: str | Callable[..., Any] = "lowered_attn",
    **compile_kwargs: Any,
) -> Generated:
    """Compile `fn(*args)` with torch.compile and return what Inductor wrote, without running it.

    Must be called inside `pretend_gpu`. Tensors among `args`, and the parameters of a module `fn`, are fake ones
    on device "cuda" (`PretendedGpu.fake_tensors` makes them). The backward is compiled too where an input requires
    grad. `compile_kwargs` go to torch.compile; fullgraph is True unless given. Dynamo is reset before and after,
    because compiled functions of this process must not be reused on either side.

    Raises PretendGpuError outside a context, without a fake tensor, for a function that leaves Inductor nothing to
    compile, and for a lowering that offers several choices.
    """
    if not _open:
        raise PretendGpuError("generate: expected an open pretend_gpu context, got none; call it inside one")
    gpu = _open[-1]
    marks = len(gpu.wrappers), len(gpu.kernels)
    compile_kwargs.setdefault("fullgraph", True)
    torch._dynamo.reset()
    try:
        with _fake_mode_of(args), _stop_before_running():
            torch.compile(fn, backend=backend, **compile_kwargs)(*args)
    except _CompiledWithoutRunning:
        return gpu.collect_from(*marks)
    finally:
        torch._dynamo.reset()
    raise PretendGpuError(
        f"generate: expected {getattr(fn, '__name__', fn)!r} to reach Inductor, got a call that ran to its end; "
        f"make it compute something on CUDA tensors, and use a backend that calls Inductor (got {backend!r})"
    )


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel as the assembler left it, for one of the configs Inductor wrote beside it."""

    name: str
    """The kernel's name in its source."""
    config: str
    """Triton's config: block sizes, warps, stages."""
    ptx: str
    """PTX text."""
    shared_memory: int
    """Bytes of shared memory a block needs."""
    log: str
    """What `ptxas -v` said while it made the cubin that would be loaded."""


def compile_with_triton(source: str) -> list[CompiledKernel]:
    """Compile the source of one of Inductor's kernels, once for each of its configs, for the pretended GPU.

    `source` is a value of `Generated.kernels`, generated for the same architecture. Triton's own cache is not
    read, so that ptxas runs and reports. Raises PretendGpuError outside a context and for another architecture's
    source, and what Triton raises for a kernel that does not compile.
    """
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    if not _open:
        raise PretendGpuError("compile_with_triton: expected an open pretend_gpu context, got none; call it inside one")
    facts = _open[-1].facts
    tuners = [value for value in vars(PyCodeCache.load(source)).values() if isinstance(value, CachingAutotuner)]
    if len(tuners) != 1:
        raise PretendGpuError(
            f"source: expected one kernel that Inductor generated, got {len(tuners)}; pass a value of Generated.kernels"
        )
    tuner = tuners[0]
    if tuner.device_props.cc != facts.capability:
        raise PretendGpuError(
            f"source: expected a kernel generated for {facts.arch}, got one for sm_{tuner.device_props.cc}; "
            "generate and compile it under the same pretend_gpu"
        )
    compiled: list[CompiledKernel] = []
    for config in tuner.configs:
        # Inductor drops the PTX of kernels that its static launcher takes, so binaries are kept on their way there.
        with _binaries_kept(str(config)) as kept:
            tuner._precompile_config(config)
        compiled += kept
    return compiled


def compile_launches(fn: Callable[..., object], *args: object) -> list[CompiledKernel]:
    """Call `fn(*args)`, which launches Triton kernels eagerly, and compile each launch instead of running it.

    For kernels that Inductor does not see, such as those inside an opaque op. Must be called inside `pretend_gpu`, with
    fake tensors on device "cuda". Pointers count as aligned to 16 bytes, as torch allocates them. Raises
    PretendGpuError outside a context and where nothing was launched.
    """
    from triton.runtime.jit import JITFunction, MockTensor

    if not _open:
        raise PretendGpuError("compile_launches: expected an open pretend_gpu context, got none; call it inside one")
    compiled: list[CompiledKernel] = []
    launch = JITFunction.run

    def compile_only(self: Any, *values: Any, grid: object, warmup: bool, **more: Any) -> None:
        values = tuple(MockTensor(value.dtype) if isinstance(value, torch.Tensor) else value for value in values)
        options = ", ".join(f"{name}: {more[name]}" for name in ("num_warps", "num_stages") if name in more)
        # A function remembers a device's target, and Triton's compile: this launch gets a memory of its own.
        with (
            mock.patch.object(self, "device_caches", collections.defaultdict(self.create_binder)),
            mock.patch.object(self, "compile", None, create=True),
            _binaries_kept(options) as kept,
        ):
            launch(self, *values, grid=grid, warmup=True, **more)
        compiled.extend(kept)

    # Launchers ask where tensors lie, to see whether the bulk copy engine can read them.
    aligned = mock.patch.object(FakeTensor, "data_ptr", lambda self: 0)
    with _fake_mode_of(args), aligned, mock.patch.object(JITFunction, "run", compile_only):
        fn(*args)
    if not compiled:
        raise PretendGpuError(
            f"compile_launches: expected {getattr(fn, '__name__', fn)!r} to launch Triton kernels, got no launch"
        )
    return compiled


@contextlib.contextmanager
def _binaries_kept(config: str) -> Iterator[list[CompiledKernel]]:
    """Keep what Triton compiles meanwhile, with ptxas's report: its cache is not read, or there would be none."""
    import triton
    import triton.compiler

    kept: list[CompiledKernel] = []
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        real = triton.compile

        def compile_and_keep(*args: Any, **kwargs: Any) -> Any:
            start = log.tell()
            binary = real(*args, **kwargs)
            shared, ptx = binary.metadata.shared, binary.asm["ptx"]
            kept.append(CompiledKernel(binary.metadata.name, config, ptx, shared, log.getvalue()[start:]))
            return binary

        for module in (triton, triton.compiler):  # Inductor takes it from the one, launches from the other
            stack.enter_context(mock.patch.object(module, "compile", compile_and_keep))
        stack.enter_context(triton.knobs.compilation.scope())
        stack.enter_context(triton.knobs.nvidia.scope())
        triton.knobs.compilation.always_compile = True
        triton.knobs.nvidia.dump_ptxas_log = True
        yield kept


class _CompiledWithoutRunning(BaseException):
    """Leaves torch.compile when the compiled graph is about to run. No `except Exception` may stop it."""


@contextlib.contextmanager
def _stop_before_running() -> Iterator[None]:
    from torch._inductor.output_code import CompiledFxGraph

    def stop(self: object, *args: object) -> None:
        raise _CompiledWithoutRunning

    with mock.patch.object(CompiledFxGraph, "__call__", stop):
        yield


def _fake_mode_of(args: tuple[object, ...]) -> contextlib.AbstractContextManager[object]:
    """The mode the fake tensors among `args` belong to: Dynamo must trace under the same one."""
    for value in args:
        if isinstance(value, FakeTensor):
            return value.fake_mode
    raise PretendGpuError(
        "args: expected at least one fake tensor, got none; make the inputs under PretendedGpu.fake_tensors()"
    )
