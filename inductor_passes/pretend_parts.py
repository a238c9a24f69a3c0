"""The parts of PyTorch and Triton that `pretend_gpu` replaces, one function a layer.

Each function replaces what it names until the given ExitStack closes. With `pretend_gpu.py` and `compat.py`, these are
the files that touch private parts of PyTorch: replacing them is the job here.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from inductor_passes.gpu_facts import GpuFacts
from inductor_passes.pretend_device import PretendGpuError

# Functions that remember what the device said. They are emptied on entry and on exit. "*" stands for all of a module,
# where all are cheap questions; elsewhere only the named ones may go: emptying joint_graph.lazy_init, say, would
# register every pattern twice.
_DEVICE_CACHES: dict[str, tuple[str, ...]] = {
    "custom_ops.kernels.gluon.dense_launch": ("_launch_of",),
    "custom_ops.kernels.launch": ("_decision",),
    "custom_ops.kernels.specialise": ("gpu_of",),
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
_CachedFunction = type(functools.cache(lambda: None))


def _replace(stack: contextlib.ExitStack, owner: Any, **values: Any) -> None:
    """Replace attributes of a module or class. Those that only CUDA builds have are added."""
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


# ---------------------------------------------------------------- torch


class _NoDeviceSwitch:
    """Stands for torch.cuda.device: there is one device, so nothing to switch."""

    def __init__(self, device: object = None) -> None:
        self.device = device

    def __enter__(self) -> _NoDeviceSwitch:
        return self

    def __exit__(self, *exc: object) -> None:
        return None


def replace_torch_queries(stack: contextlib.ExitStack, facts: GpuFacts) -> None:
    """torch.cuda, the device interface (which copied torch.cuda's functions when it was defined) and torch._C."""
    import torch._dynamo.device_interface as device_interface
    import torch._subclasses.fake_tensor as fake_tensor

    cuda_interface = device_interface.CudaInterface
    properties = _always(facts)
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
        get_device_capability=_always((facts.major, facts.minor)),
        get_device_name=_always(facts.name),
        # Dynamo saves and restores the random state around tracing; this one is never drawn from.
        get_rng_state=lambda *args: torch.zeros(16, dtype=torch.uint8),
        set_rng_state=_always(None),
        is_current_stream_capturing=_always(False),
    )
    _replace_static(stack, cuda_interface, **shared, get_compute_capability=_always(facts.capability))
    _replace_static(stack, cuda_interface.Worker, current_device=_always(0), get_device_properties=properties)
    _replace(stack, torch.cuda.graphs, is_current_stream_capturing=_always(False))
    _replace(stack, fake_tensor, init_gpu_context=_always(None))
    _replace(
        stack,
        torch._C,
        _cuda_cudaCachingAllocator_is_enabled=_always(True),
        _cuda_getCurrentRawStream=_always(0),
    )
    # CPU builds register the interface of "cuda" only when asked for devices while one is available.
    device_interface.init_device_reg()


def forget_device_answers() -> None:
    """Empty every cache in `_DEVICE_CACHES` that this version of PyTorch has loaded."""
    for module_name, names in _DEVICE_CACHES.items():
        module = sys.modules.get(module_name)
        if module is None:
            continue
        functions = list(vars(module).values()) if names == ("*",) else list(_attributes(module, names))
        for function in functions:
            # A cached class method shows as a bound method; the cache belongs to the function under it.
            function = getattr(function, "__func__", function)
            if isinstance(function, _CachedFunction):
                function.cache_clear()  # type: ignore[attr-defined]


def _attributes(module: types.ModuleType, names: tuple[str, ...]) -> Iterator[object]:
    for name in names:
        # Not every version has every one of them.
        with contextlib.suppress(AttributeError):
            yield operator.attrgetter(name)(module)


# ---------------------------------------------------------------- Triton


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
        self.set_current_device = _always(None)

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


def replace_triton_driver(stack: contextlib.ExitStack, facts: GpuFacts) -> None:
    """Triton's NVIDIA backend keeps its compiler and gets a driver that needs no GPU."""
    import triton.backends

    driver = type("_PretendDriver", (_PretendDriver,), {"facts": facts})
    nvidia = replace(triton.backends.backends["nvidia"], driver=driver)
    stack.enter_context(mock.patch.dict(triton.backends.backends, {"nvidia": nvidia}))
    _replace(stack, triton.runtime.driver, _active=driver())


# ---------------------------------------------------------------- Inductor


class _KernelStub:
    """Stands for a loaded kernel while the wrapper module is imported: never called."""

    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, *args: object, **kwargs: object) -> None:
        raise PretendGpuError(f"kernel {self.name}: expected a real GPU to run on, got a pretended one")


def collect_generated_code(
    stack: contextlib.ExitStack, on_kernel: Callable[[str, str], None], on_wrapper: Callable[[str], None]
) -> None:
    """Inductor hands over its sources instead of compiling them: `on_kernel(name, source)`, `on_wrapper(source)`."""
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.graph import GraphLowering

    def keep(self: object, kernel_name: str, source_code: str, *args: object, **kwargs: object) -> _KernelStub:
        on_kernel(kernel_name, source_code)
        return _KernelStub(kernel_name)

    _replace(stack, AsyncCompile, triton=keep)
    _replace_static(stack, GraphLowering, save_output_code=on_wrapper)


def keep_constants_on_the_cpu(stack: contextlib.ExitStack) -> None:
    """Let `torch.tensor(..., device="cuda")` be traced, as models make the empty tensors of a cache that grows.

    Fake modes and proxies otherwise copy small constants to the device, in case that somebody reads their values.
    """
    from torch.fx.experimental import proxy_tensor

    _replace(stack, FakeTensorMode, avoid_device_init=property(lambda mode: True))
    _replace(stack, proxy_tensor, CONSTANT_NUMEL_LIMIT=-1)


def let_modules_convert(stack: contextlib.ExitStack) -> None:
    """Let `Module.to` change the dtype of fake parameters, as users' modules do when they are imported.

    It swaps them with the converted ones, which torch refuses while weak references point to either: those of the fake
    mode's memo of what it has seen.
    """
    swap = torch.utils.swap_tensors

    def swap_forgotten(one: torch.Tensor, other: torch.Tensor) -> None:
        for tensor in (one, other):
            if isinstance(tensor, FakeTensor):
                memo = tensor.fake_mode.fake_tensor_converter.meta_converter.tensor_memo
                for key in [key for key, seen in memo.items() if seen is tensor]:
                    del memo[key]
        swap(one, other)

    _replace(stack, torch.utils, swap_tensors=swap_forgotten)


def settle_inductor(stack: contextlib.ExitStack) -> None:
    """Inductor reads no cache, times nothing and computes nothing on the device."""
    from torch._inductor.fx_passes import joint_graph, post_grad
    from torch._inductor.select_algorithm import AlgorithmSelectorCache

    # Pattern tables are filled once in a process, the joint one once for each device: a real GPU's entries must not
    # come from a pretence. The patterns do not depend on the device. The calls are spelled as Inductor spells them,
    # because their arguments are the key it remembers.
    joint_graph.lazy_init(torch.device("cpu"))
    post_grad.lazy_init()
    _replace(stack, joint_graph, lazy_init=_always(None))
    folder = joint_graph.UniformValueConstantFolder
    _replace(stack, folder, __init__=_on_the_cpu(folder.__init__), run=_on_the_cpu(folder.run))
    _replace(stack, AlgorithmSelectorCache, __call__=_the_only_choice(AlgorithmSelectorCache.__call__))
    # compile_threads=1: no pool of worker processes is started. shape_padding would time matrix products.
    settings = {"force_disable_caches": True, "compile_threads": 1, "shape_padding": False}
    stack.enter_context(torch._inductor.config.patch(settings))
    # A backward is otherwise lowered when .backward() is called.
    stack.enter_context(torch._functorch.config.patch(force_non_lazy_backward_lowering=True))
    stack.enter_context(warnings.catch_warnings())
    warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")


class _ConstantsOnTheCpu(TorchDispatchMode):
    """Makes real tensors on the CPU that were asked for on "cuda". Only their one value is read."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def move(value: object) -> object:
            return torch.device("cpu") if isinstance(value, torch.device) and value.type == "cuda" else value

        args, kwargs = tree_map(move, (args, kwargs or {}))
        return func(*args, **kwargs)


def _on_the_cpu(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _ConstantsOnTheCpu():
            return method(*args, **kwargs)

    return run


def _the_only_choice(select: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(select)
    def run(self: Any, name: str, choices: list[Any], *args: Any, **kwargs: Any) -> Any:
        if len(choices) > 1:
            raise PretendGpuError(
                f"{name}: expected one choice, got {len(choices)} ({', '.join(choice.name for choice in choices)}); "
                "without a GPU they cannot be timed: compile without max-autotune, or offer one choice"
            )
        return select(self, name, choices, *args, **kwargs)

    return run
