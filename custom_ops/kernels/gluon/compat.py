"""What changed between the versions of Triton that are supported, 3.6 to 3.9: names of Gluon, and how kernels start."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

# 3.9 renamed both.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
# 3.9 made it public.
reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret
# 3.7 renamed it. In a warp-specialised kernel it waits for the warps of the role that calls it.
warpgroup_barrier = getattr(gl, "thread_barrier", None) or gl.barrier
# 3.8 passes the launch's other arguments too, which tiled maps do not need.
_MORE_OF_A_MAP = (None,) * (len(inspect.signature(nvidia.make_tensordesc_arg).parameters) - 2)

Start = Callable[[int, int, "list[Any]"], None]
"""``start(programs, stream, arguments)``: arguments in the kernel's order, constants too; for a descriptor its tensor
map, sizes and strides, for a tensor its address."""


def tensor_map(descriptor: Any, metadata: Any) -> Any:
    """The 128 bytes that the copy engine reads, encoded from a descriptor and what its kernel says of it."""
    return nvidia.make_tensordesc_arg(descriptor, metadata, *_MORE_OF_A_MAP)[0]


def is_watched(function: Any) -> bool:
    """Whether somebody wants to see the launches of jit ``function``, or other code of it, than Triton's own."""
    runtime = knobs.runtime
    return bool(
        _listens(runtime.launch_enter_hook)
        or _listens(runtime.launch_exit_hook)
        or runtime.debug
        or runtime.add_stages_inspection_hook
        or knobs.compilation.instrumentation_mode
        or function.pre_run_hooks
    )


def start_of(kernel: Any) -> Start | None:
    """Triton's launch of ``kernel``, a compiled kernel that takes descriptors, under all that it does at every launch.

    None where a launch is more than that: where Triton allocates memory for the kernel, and in versions of Triton that
    launch in another way.
    """
    launcher = kernel.run
    # A function that encodes the maps, around the one that launches.
    encodes = getattr(launcher, "launch", None)
    launch = inspect.getclosurevars(encodes).nonlocals.get("launcher") if inspect.isfunction(encodes) else None
    if launch is None or not kernel.metadata.tensordesc_meta:
        return None
    if launcher.global_scratch_size or launcher.profile_scratch_size or getattr(launcher, "gsan_enabled", False):
        return None
    function, packed = kernel.function, kernel.packed_metadata
    flags = (launcher.launch_cooperative_grid, launcher.launch_pdl)
    # No hooks, so nothing to tell them.
    metadata_and_hooks = (None, None, None)
    scratch = (None, None)
    if not hasattr(launcher, "arg_annotations"):  # 3.6: a function compiled for the signature

        def start(programs: int, stream: int, arguments: list[Any]) -> None:
            launch(programs, 1, 1, stream, function, *flags, *scratch, packed, *metadata_and_hooks, *arguments)

        return start
    signature = (launcher.arg_annotations, launcher.kernel_signature)

    def start_by_signature(programs: int, stream: int, arguments: list[Any]) -> None:
        launch(
            programs, 1, 1, stream, function, *flags, packed, *metadata_and_hooks, *scratch, *signature, arguments
        )  # fmt: skip

    return start_by_signature


def _listens(hook: Any) -> bool:
    """Hooks are chains, which may be empty, or functions put in the place of a chain."""
    return hook is not None and bool(getattr(hook, "calls", True))
