"""Compile for a GPU on a machine without one: Dynamo, AOTAutograd, Inductor, Triton and ptxas, but no launch.

    with pretend_gpu("sm_90") as gpu:
        with gpu.fake_tensors():
            q = torch.empty(2, 16, 1024, 128, device="cuda", dtype=torch.bfloat16)
        generated = generate(model, q, backend="lowered_attn")
    print(generated.kernels)

While the context is open, everything in this process that asks about the GPU is answered from `GPUS`:
torch.cuda, the device interface that Dynamo and Inductor use, the torch._C functions under it, and Triton's
driver. Inductor's kernels are collected as text instead of being compiled and loaded. Nothing can be launched
and nothing can be timed, so a lowering must offer exactly one choice. On exit every replaced part is put back.

The replacements are process-wide: do not run CUDA work, or another compile, in a second thread meanwhile.
This is the one file besides compat.py that touches private parts of PyTorch, because replacing them is its job.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from inductor_passes.pretend_device import pretend_cuda_device

# torch.utils._triton, the device interface and Inductor's utilities remember what the device said. These caches
# are emptied on entry and on exit. Modules whose cached functions are all cheap questions are listed with "*";
# elsewhere only the named ones may go: emptying joint_graph.lazy_init, say, would register every pattern twice.
_DEVICE_CACHES: dict[str, tuple[str, ...]] = {
    "torch.utils._triton": ("*",),
    "torch._inductor.utils": ("*",),
    "torch._inductor.codegen.cuda.cuda_env": ("*",),
    "torch._inductor.comm_analysis": ("get_gpu_type", "_has_nvlink"),
    "torch._inductor.kernel.mm": ("_is_sm7x_or_older_gpu",),
    "torch._inductor.runtime.hints": ("DeviceProperties.create",),
    "torch._subclasses.fake_tensor": ("init_gpu_context",),
    "torch._utils_internal": ("max_clock_rate",),
    "torch.accelerator": ("get_device_capability",),
    "torch.cuda": ("_check_bf16_tensor_supported",),
    "triton.compiler.compiler": ("max_shared_mem",),
}


class PretendGpuError(RuntimeError):
    """Something was asked of the pretended GPU that only a real one can answer."""


@dataclass(frozen=True)
class GpuFacts:
    """What a compiler asks a GPU about itself, under the names of torch.cuda.get_device_properties.

    Sources: NVIDIA's CUDA programming guide, table "Technical Specifications per Compute Capability", and the
    data sheets of the three cards for the counts of processors, the L2 cache and the memory.
    """

    name: str
    """Product name."""
    major: int
    """Compute capability, before the dot."""
    minor: int
    """Compute capability, after the dot."""
    multi_processor_count: int
    """Streaming multiprocessors."""
    shared_memory_per_block_optin: int
    """Bytes of shared memory one block can ask for: a kernel above it cannot be launched."""
    shared_memory_per_multiprocessor: int
    """Bytes of shared memory of one multiprocessor."""
    L2_cache_size: int
    """Bytes."""
    total_memory: int
    """Bytes."""
    shared_memory_per_block: int = 49152
    """Bytes of shared memory a block gets without asking."""
    regs_per_multiprocessor: int = 65536
    """32-bit registers of one multiprocessor; also the most one block can have."""
    max_threads_per_multi_processor: int = 2048
    """Threads resident on one multiprocessor."""
    max_threads_per_block: int = 1024
    """Threads of one block."""
    warp_size: int = 32
    """Threads of one warp."""
    gcnArchName: str = ""
    """Empty: only AMD GPUs have it."""
    uuid: str = "pretend"
    """Identifies the card where several are present."""

    @property
    def capability(self) -> int:
        """Compute capability as Triton counts it: 90 for sm_90."""
        return self.major * 10 + self.minor

    @property
    def arch(self) -> str:
        """The name this card has in `GPUS`, such as "sm_90"."""
        return f"sm_{self.capability}"


def _gpu_table(*gpus: GpuFacts) -> dict[str, GpuFacts]:
    return {gpu.arch: gpu for gpu in gpus}


GPUS: dict[str, GpuFacts] = _gpu_table(
    GpuFacts(
        name="NVIDIA A100-SXM4-80GB",
        major=8,
        minor=0,
        multi_processor_count=108,
        shared_memory_per_block_optin=166912,
        shared_memory_per_multiprocessor=167936,
        L2_cache_size=40 << 20,
        total_memory=80 << 30,
    ),
    GpuFacts(
        name="NVIDIA H200",
        major=9,
        minor=0,
        multi_processor_count=132,
        shared_memory_per_block_optin=232448,
        shared_memory_per_multiprocessor=233472,
        L2_cache_size=60 << 20,
        total_memory=140 << 30,
    ),
    GpuFacts(
        name="NVIDIA B200",
        major=10,
        minor=0,
        multi_processor_count=148,
        shared_memory_per_block_optin=232448,
        shared_memory_per_multiprocessor=233472,
        L2_cache_size=126 << 20,
        total_memory=180 << 30,
    ),
)
"""The GPUs one can pretend to have, by architecture: Triton compiles sm_90 as sm_90a and sm_100 as sm_100a."""


def gpu_facts(arch: str) -> GpuFacts:
    """The facts of an architecture such as "sm_90"; raises ValueError, naming the choices, for any other."""
    if arch not in GPUS:
        raise ValueError(f"arch: expected one of {', '.join(GPUS)}, got {arch!r}")
    return GPUS[arch]


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

    Contexts may nest, for different architectures too. Raises ValueError for an unknown architecture and
    PretendGpuError where Triton cannot compile: on a ROCm build of PyTorch, and under TRITON_INTERPRET=1.
    """
    facts = gpu_facts(arch)
    if torch.version.hip is not None:
        raise PretendGpuError(f"PyTorch: expected a CPU or CUDA build, got ROCm {torch.version.hip}; install another")
    import triton

    if triton.knobs.runtime.interpret:
        raise PretendGpuError(
            "TRITON_INTERPRET: expected it unset, got 1; kernels defined under Triton's interpreter have no code "
            "to compile: generate code in a process without that variable"
        )
    gpu = PretendedGpu(facts)
    with contextlib.ExitStack() as stack:
        _prepare_pattern_tables(stack)
        stack.callback(_forget_device_answers)
        stack.enter_context(pretend_cuda_device())
        _replace_torch_queries(stack, facts)
        _replace_triton_driver(stack, facts)
        _collect_generated_code(stack, gpu)
        _forget_device_answers()
        _open.append(gpu)
        stack.callback(_open.remove, gpu)
        yield gpu


def generate(
    fn: Callable[..., object], *args: object, backend: str | Callable[..., Any] = "lowered_attn", **compile_kwargs: Any
) -> Generated:
    """Compile `fn(*args)` with torch.compile and return what Inductor wrote, without running it.

    Must be called inside `pretend_gpu`. Tensors among `args`, and the parameters of a module `fn`, are fake ones
    on device "cuda" (`PretendedGpu.fake_tensors` makes them). The backward is compiled too where an input requires
    grad. `compile_kwargs` go to torch.compile; fullgraph is True unless given. Dynamo is reset before and after,
    because compiled functions of this process must not be reused on either side.

    Raises PretendGpuError outside a context, for a function that leaves nothing to compile, and for a lowering
    that offers several choices.
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
    read, so that ptxas runs and reports. Raises PretendGpuError outside a context or for another architecture's
    source, and what Triton raises for a kernel that does not compile.
    """
    import triton
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    if not _open:
        raise PretendGpuError("compile_with_triton: expected an open pretend_gpu context, got none")
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
        binaries: list[Any] = []

        def keep(*args: Any, _compile: Any = triton.compile, _into: list[Any] = binaries, **kwargs: Any) -> Any:
            _into.append(_compile(*args, **kwargs))
            return _into[-1]

        # Inductor drops the PTX of kernels that its static launcher takes, so it is kept here on its way.
        with (
            mock.patch.object(triton, "compile", keep),
            triton.knobs.compilation.scope(),
            triton.knobs.nvidia.scope(),
            contextlib.redirect_stdout(io.StringIO()) as log,
        ):
            triton.knobs.compilation.always_compile = True
            triton.knobs.nvidia.dump_ptxas_log = True
            tuner._precompile_config(config)
        (binary,) = binaries
        compiled.append(
            CompiledKernel(
                name=binary.metadata.name,
                config=str(config),
                ptx=binary.asm["ptx"],
                shared_memory=binary.metadata.shared,
                log=log.getvalue(),
            )
        )
    return compiled


# ---------------------------------------------------------------- the replacements, one function a layer


def _replace(stack: contextlib.ExitStack, owner: Any, **values: Any) -> None:
    """Replace attributes of a module or class until `stack` closes. Some exist only in CUDA builds: they are added."""
    for name, value in values.items():
        stack.enter_context(mock.patch.object(owner, name, value, create=True))


def _replace_static(stack: contextlib.ExitStack, owner: type, **values: Any) -> None:
    """The same for functions of a class that take no self."""
    _replace(stack, owner, **{n: v if isinstance(v, type) else staticmethod(v) for n, v in values.items()})


def _always(value: object) -> Callable[..., Any]:
    """A function that returns `value` whatever it is asked."""

    def answer(*args: object, **kwargs: object) -> Any:
        return value

    return answer


class _NoDeviceSwitch:
    """Stands for torch.cuda.device: there is one device, so nothing to switch."""

    def __init__(self, device: object = None) -> None:
        self.device = device

    def __enter__(self) -> _NoDeviceSwitch:
        return self

    def __exit__(self, *exc: object) -> None:
        return None


def _replace_torch_queries(stack: contextlib.ExitStack, facts: GpuFacts) -> None:
    """torch.cuda, the device interface (which copied torch.cuda's functions when it was defined) and torch._C."""
    import torch._dynamo.device_interface as device_interface
    import torch._subclasses.fake_tensor as fake_tensor

    cuda_interface = device_interface.CudaInterface
    properties, capability = _always(facts), _always((facts.major, facts.minor))
    shared = {
        "current_device": _always(0),
        "device": _NoDeviceSwitch,
        "device_count": _always(1),
        "get_device_properties": properties,
        "is_available": _always(True),
        "is_bf16_supported": _always(True),
        "synchronize": _always(None),
    }
    _replace(
        stack,
        torch.cuda,
        **shared,
        _lazy_init=_always(None),
        get_device_capability=capability,
        get_device_name=_always(facts.name),
        # Dynamo saves and restores the random state around tracing; this one is never drawn from.
        get_rng_state=lambda *args: torch.zeros(16, dtype=torch.uint8),
        set_rng_state=_always(None),
        is_current_stream_capturing=_always(False),
        is_initialized=_always(False),
    )
    _replace_static(
        stack,
        cuda_interface,
        **shared,
        exchange_device=_always(0),
        get_compute_capability=_always(facts.capability),
        maybe_exchange_device=_always(0),
    )
    _replace_static(stack, cuda_interface.Worker, current_device=_always(0), get_device_properties=properties)
    _replace(stack, device_interface, get_cuda_stream=_always(0))
    _replace(stack, torch.cuda.graphs, is_current_stream_capturing=_always(False))
    _replace(stack, fake_tensor, init_gpu_context=_always(None))
    _replace(
        stack,
        torch._C,
        _CudaDeviceProperties=GpuFacts,
        _cuda_cudaCachingAllocator_is_enabled=_always(True),
        _cuda_exchangeDevice=_always(0),
        _cuda_getCurrentRawStream=_always(0),
        _cuda_getDevice=_always(0),
        _cuda_getDeviceCount=_always(1),
        _cuda_isCurrentStreamCapturing=_always(False),
        _cuda_maybeExchangeDevice=_always(0),
        _cuda_setDevice=_always(None),
    )
    # CPU builds register the interface of "cuda" only when asked for devices while one is available.
    device_interface.init_device_reg()


class _PretendDriver:
    """Stands for Triton's NVIDIA driver: it names the target, and cannot load or launch."""

    facts: GpuFacts
    binary_ext = "cubin"

    def __init__(self) -> None:
        self.utils = types.SimpleNamespace(get_device_properties=self._properties, load_binary=self._no_gpu)
        self.launcher_cls = self._no_gpu
        self.get_device_capability = _always((self.facts.major, self.facts.minor))
        self.get_current_stream = _always(0)
        self.get_current_device = _always(0)

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.facts.capability, self.facts.warp_size)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda

    def map_python_to_cpp_type(self, ty: str) -> str:
        from triton.backends.nvidia.driver import ty_to_cpp

        return ty_to_cpp(ty)

    def get_benchmarker(self) -> Callable[..., object]:
        return self._no_gpu

    def _properties(self, device: int) -> dict[str, int]:
        return {
            "max_num_regs": self.facts.regs_per_multiprocessor,
            "max_shared_mem": self.facts.shared_memory_per_block_optin,
            "multiprocessor_count": self.facts.multi_processor_count,
            "warpSize": self.facts.warp_size,
        }

    def _no_gpu(self, *args: object, **kwargs: object) -> Any:
        raise PretendGpuError(f"GPU: expected a real {self.facts.name} to load, launch or time on, got a pretended one")


def _replace_triton_driver(stack: contextlib.ExitStack, facts: GpuFacts) -> None:
    """Triton's NVIDIA backend keeps its compiler and gets a driver that needs no GPU."""
    import triton.backends

    driver = type("_PretendDriver", (_PretendDriver,), {"facts": facts})
    nvidia = replace(triton.backends.backends["nvidia"], driver=driver)
    stack.enter_context(mock.patch.dict(triton.backends.backends, {"nvidia": nvidia}))
    _replace(stack, triton.runtime.driver, _active=driver())


class _KernelStub:
    """Stands for a loaded kernel while the wrapper module is imported: never called."""

    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, *args: object, **kwargs: object) -> None:
        raise PretendGpuError(f"kernel {self.name}: expected a real GPU to run on, got a pretended one")


class _ConstantsOnTheCpu(TorchDispatchMode):
    """Makes real tensors on the CPU that were asked for on "cuda". Only their one value is read."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def move(value: object) -> object:
            return torch.device("cpu") if isinstance(value, torch.device) and value.type == "cuda" else value

        args, kwargs = tree_map(move, (args, kwargs or {}))
        return func(*args, **kwargs)


def _with_constants_on_the_cpu(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _ConstantsOnTheCpu():
            return method(*args, **kwargs)

    return run


def _collect_generated_code(stack: contextlib.ExitStack, gpu: PretendedGpu) -> None:
    """Inductor hands over its sources instead of compiling them, reads no cache and refuses to time choices."""
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
    from torch._inductor.graph import GraphLowering
    from torch._inductor.select_algorithm import AlgorithmSelectorCache

    def keep_kernel(self: object, kernel_name: str, source_code: str, *args: object, **kwargs: object) -> _KernelStub:
        gpu.kernels.append((kernel_name, source_code))
        return _KernelStub(kernel_name)

    select = AlgorithmSelectorCache.__call__

    @functools.wraps(select)
    def select_the_only_choice(self: Any, name: str, choices: list[Any], *args: Any, **kwargs: Any) -> Any:
        if len(choices) > 1:
            raise PretendGpuError(
                f"{name}: expected one choice, got {len(choices)} ({', '.join(choice.name for choice in choices)}); "
                "without a GPU they cannot be timed: compile without max-autotune, or offer one choice"
            )
        return select(self, name, choices, *args, **kwargs)

    for method in ("__init__", "run"):
        original = getattr(UniformValueConstantFolder, method)
        _replace(stack, UniformValueConstantFolder, **{method: _with_constants_on_the_cpu(original)})
    _replace(stack, AsyncCompile, triton=keep_kernel)
    _replace(stack, AlgorithmSelectorCache, __call__=select_the_only_choice)
    _replace_static(stack, GraphLowering, save_output_code=lambda code: gpu.wrappers.append(code))
    # compile_threads=1: no pool of worker processes is started. Backwards are lowered at once, not at .backward().
    # shape_padding would time matrix products on the GPU.
    config = {"force_disable_caches": True, "compile_threads": 1, "shape_padding": False}
    stack.enter_context(torch._inductor.config.patch(config))
    stack.enter_context(torch._functorch.config.patch(force_non_lazy_backward_lowering=True))
    stack.enter_context(warnings.catch_warnings())
    warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")


def _prepare_pattern_tables(stack: contextlib.ExitStack) -> None:
    """Fill Inductor's pattern tables for the CPU, then keep the joint one from being filled for the pretended GPU.

    Tables are filled once in a process, the joint one once for each device: a real GPU's entries must not come from
    a pretence. The calls are spelled as Inductor spells them, because their arguments are the key it remembers.
    """
    from torch._inductor.fx_passes import joint_graph, post_grad

    joint_graph.lazy_init(torch.device("cpu"))
    post_grad.lazy_init()
    _replace(stack, joint_graph, lazy_init=_always(None))


def _forget_device_answers() -> None:
    """Empty every cache in `_DEVICE_CACHES` whose module is loaded in this version of PyTorch."""
    import sys

    for module_name, names in _DEVICE_CACHES.items():
        module = sys.modules.get(module_name)
        if module is None:
            continue
        if names == ("*",):
            cached: list[Any] = [value for value in vars(module).values() if isinstance(value, _CACHED_FUNCTION)]
        else:
            cached = [functools.reduce(lambda owner, part: getattr(owner, part, None), name.split("."), module) for name in names]
        for function in cached:
            # A cached classmethod shows as a bound method; the cache belongs to the function under it.
            function = getattr(function, "__func__", function)
            if isinstance(function, _CACHED_FUNCTION):
                function.cache_clear()


_CACHED_FUNCTION = type(functools.cache(lambda: None))


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
