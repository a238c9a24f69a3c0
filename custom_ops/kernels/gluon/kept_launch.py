"""A launch that is made once: later ones of the same kernel, sizes and strides only fill in addresses and floats.

Triton binds, specialises and encodes the arguments of every launch anew, which takes longer than many kernels run.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver

from custom_ops.kernels.gluon.compat import is_watched, start_of, tensor_map

TENSOR_MAPS = 2048
"""Maps that are kept: some 300 bytes each. A step of training has new addresses in each of its layers."""


class KeptLaunch:
    """A launch of jit ``function`` on ``programs`` programs of one GPU.

    Whoever keeps one sees to it that its launches differ in nothing but the addresses of descriptors and tensors, and
    in floats: neither is a compiled kernel specialised on, but for whether a tensor's address is a multiple of 16.
    """

    def __init__(self, function: Any, programs: int, device: int, **options: Any) -> None:
        """``device``: its index. ``options``: of the compiler, such as ``num_warps``."""
        self._function = function
        self._programs = programs
        self._device = device
        self._options = options
        self._later: _LaterLaunches | None = None

    @property
    def is_ready(self) -> bool:
        """Whether the next launch needs no more than ``again``: there was one, and nobody watches Triton's."""
        return self._later is not None and not is_watched(self._function)

    def first(self, arguments: tuple[Any, ...]) -> None:
        """Launches through Triton: ``arguments`` are all of the kernel's, in its order."""
        driver.active.set_current_device(self._device)  # see kept_tensor_map
        kernel = self._function[(self._programs,)](*arguments, **self._options)
        # None: a launch that was only compiled.
        if kernel is not None and not is_watched(self._function):
            start = start_of(kernel)
            self._later = None if start is None else _LaterLaunches(start, kernel, self._device, arguments)

    def again(self, addresses: Sequence[int], floats: Sequence[float]) -> None:
        """The launch that is ready, with addresses and floats in the places of ``arguments``' tensors and floats."""
        assert self._later is not None
        self._later(self._programs, driver.active.get_current_stream(self._device), addresses, floats)


class _LaterLaunches:
    """Starts a compiled kernel with arguments of which only addresses and floats are missing."""

    def __init__(self, start: Any, kernel: Any, device: int, arguments: tuple[Any, ...]) -> None:
        self._start = start
        self._kernel = kernel  # its code stays loaded
        self._arguments: list[Any] = []
        self._addresses_at: list[tuple[int, _Box | None]] = []
        self._floats_at: list[int] = []
        maps = iter(kernel.metadata.tensordesc_meta)
        for argument in arguments:
            at = len(self._arguments)
            if isinstance(argument, TensorDescriptor):
                self._addresses_at.append((at, _Box(argument, next(maps), device)))
                self._arguments += [None, *argument.shape, *argument.strides]
                continue
            if isinstance(argument, Tensor):
                self._addresses_at.append((at, None))
                argument = None  # not to keep its memory
            elif isinstance(argument, float):
                self._floats_at.append(at)
            self._arguments.append(argument)

    def __call__(self, programs: int, stream: int, addresses: Sequence[int], floats: Sequence[float]) -> None:
        arguments = self._arguments.copy()
        for (at, box), address in zip(self._addresses_at, addresses, strict=True):
            arguments[at] = address if box is None else kept_tensor_map(address, box)
        for at, value in zip(self._floats_at, floats, strict=True):
            arguments[at] = value
        self._start(programs, stream, arguments)


class _Address(NamedTuple):
    """Stands for the tensor of a descriptor, of which address and dtype are read."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


class _Box:
    """Descriptors of one kernel's argument, all but the address; one is equal to itself alone."""

    def __init__(self, descriptor: TensorDescriptor, metadata: Any, device: int) -> None:
        self.device = device
        self.dtype = descriptor.base.dtype
        # Not to keep the memory of its tensor.
        self.descriptor = dataclasses.replace(descriptor, base=_Address(0, self.dtype))
        self.metadata = metadata


@functools.lru_cache(TENSOR_MAPS)
def kept_tensor_map(address: int, box: _Box) -> Any:
    """The tensor map of a box at an address.

    It says where, how large and how strided, and nothing of what lies there: where memory is freed and used again, the
    map of another tensor at the same address is right. A launch, and a captured graph, take a copy.
    """
    # In a thread that has not used the GPU yet, the driver would find no context to encode in.
    driver.active.set_current_device(box.device)
    return tensor_map(dataclasses.replace(box.descriptor, base=_Address(address, box.dtype)), box.metadata)
