"""Triton's own launcher without a GPU, above a library that stands for libcuda and records what is launched.

It changes the process for good (the loader keeps the library), so tests that use it have a process of their own.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import subprocess
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("fake_cuda.c")


@dataclasses.dataclass(frozen=True)
class Launched:
    """The last launch."""

    programs: int
    stream: int
    function: int
    shared_bytes: int
    values: bytes
    """All parameters, one after another: tensor maps, addresses, numbers."""


class FakeCuda:
    """The library, and Triton's NVIDIA driver on top of it: one Hopper GPU. Call before CUDA is asked for."""

    def __init__(self, folder: Path) -> None:
        import triton.backends.nvidia

        headers = Path(triton.backends.nvidia.__file__).parent / "include"
        library = folder / "libcuda.so.1"
        compiler = os.environ.get("CC", "cc")
        command = [compiler, "-O1", "-shared", "-fPIC", f"-I{headers}", "-Wl,-soname,libcuda.so.1", str(SOURCE)]
        subprocess.run([*command, "-o", str(library)], check=True)
        (folder / "libcuda.so").symlink_to(library)
        self._library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
        self.stream = 7
        self._set_driver()

    def _set_driver(self) -> None:
        import torch
        from triton.backends.nvidia.driver import CudaDriver
        from triton.runtime import driver

        if not hasattr(torch._C, "_cuda_getCurrentRawStream"):  # builds for CPUs
            torch._C._cuda_getCurrentRawStream = lambda device: 0  # type: ignore[attr-defined]
        fake = CudaDriver()
        fake.get_current_device = lambda: 0
        fake.get_current_stream = lambda device: self.stream
        fake.get_device_capability = lambda device=0: (9, 0)
        driver.set_active(fake)

    def expect(self, kernel: Any) -> None:
        """The next launches are of compiled ``kernel``: so many bytes has each of its parameters."""
        sizes = [*_sizes(tuple(kernel.src.signature.values())), 8, 8]  # last: memory that Triton may allocate
        self._library.fake_expect(len(sizes), (ctypes.c_int * len(sizes))(*sizes))

    def expect_any(self) -> None:
        """The next launches are of kernels whose parameters are not looked at: others' may be fewer."""
        self._library.fake_expect(0, (ctypes.c_int * 0)())

    @property
    def launches(self) -> int:
        return self._facts()[0]

    @property
    def encoded(self) -> int:
        """Tensor maps that were encoded."""
        return self._facts()[1]

    @property
    def launched(self) -> Launched:
        values = ctypes.create_string_buffer(1 << 16)
        count = self._library.fake_values(values)
        return Launched(*self._facts()[2:], values=values.raw[:count])

    def _facts(self) -> list[int]:
        facts = (ctypes.c_int64 * 6)()
        self._library.fake_facts(facts)
        return list(facts)


def _sizes(signature: Any) -> list[int]:
    """Bytes of the parameters of a kernel with Triton's ``signature``."""
    if isinstance(signature, tuple):
        return [size for part in signature for size in _sizes(part)]
    if signature == "constexpr":
        return []
    if signature.startswith("tensordesc"):
        rank = signature.split("[")[1].split("]")[0].count(",") + 1
        return [128, *[4] * rank, *[8] * rank]
    return [8] if signature.startswith("*") else [{"i32": 4, "i64": 8, "fp32": 4}[signature]]
