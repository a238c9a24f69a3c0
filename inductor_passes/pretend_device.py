"""The C++ side of pretending to have a GPU: a CUDA device that can be switched to, and has no work on it.

PyTorch's C++ code asks three things about a CUDA tensor's device even where the tensor is fake:

- c10's table of device guards, on every x[0] or x.contiguous(): a CPU build has no guard for CUDA, and a CUDA
  build's guard calls the driver;
- the CUDA hooks, in the autograd engine that traces a backward: whether CUDA is built in (a CPU build raises where
  it is not) and whether the device has a context (a CUDA build raises where there is no such device);
- the guard again, for streams and events: PyTorch's own stand-in, c10::impl::NoOpDeviceGuardImpl, raises on
  events, and numbers its device -1, with which the engine then indexes an array.

So a guard that does nothing goes into the table, and two of the hooks' virtual functions are exchanged. Neither can
be done from Python, hence about 50 lines of C++, built once for a PyTorch version in about 2 seconds, with the
headers that PyTorch ships. Sources: c10/core/impl/DeviceGuardImplInterface.h, ATen/detail/CUDAHooksInterface.h,
GraphTask::exec_post_processing in torch/csrc/autograd/engine.cpp.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

_SOURCE = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <cstring>

namespace {
using Hooks = at::CUDAHooksInterface;

const c10::Device kDevice(c10::DeviceType::CUDA, 0);
const c10::Stream kStream(c10::Stream::DEFAULT, kDevice);

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Device getDevice() const override { return kDevice; }
  c10::Stream getStream(c10::Device) const noexcept override { return kStream; }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return kStream; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
};

bool is_built(const Hooks*) { return true; }
bool has_no_context(const Hooks*, c10::DeviceIndex) { return false; }

// Itanium C++ ABI, "Member Function Pointers": a virtual function's is its byte offset in the table, plus one.
template <typename Method>
size_t slot(Method method) {
  ptrdiff_t offset;
  std::memcpy(&offset, &method, sizeof(offset));
  return (offset - 1) / sizeof(void*);
}

// An object points behind two words that belong to its table. The interface has about 60 functions.
constexpr size_t kHeader = 2, kWords = 160;

struct Installed {
  Guard guard;
  void* table[kWords];
  const c10::impl::DeviceGuardImplInterface* old_guard;
  void** old_table;
};

void**& table_of(const Hooks& hooks) { return *reinterpret_cast<void***>(const_cast<Hooks*>(&hooks)); }
auto& guard_entry() {
  return c10::impl::device_guard_impl_registry[static_cast<size_t>(c10::DeviceType::CUDA)];
}
}  // namespace

extern "C" void* install() {
  auto* installed = new Installed;
  installed->old_guard = guard_entry().exchange(&installed->guard);
  void**& table = table_of(at::detail::getCUDAHooks());
  installed->old_table = table;
  std::memcpy(installed->table, table - kHeader, sizeof(installed->table));
  installed->table[kHeader + slot(&Hooks::isBuilt)] = reinterpret_cast<void*>(&is_built);
  installed->table[kHeader + slot(&Hooks::hasPrimaryContext)] = reinterpret_cast<void*>(&has_no_context);
  table = installed->table + kHeader;
  return installed;
}

// The record itself is kept: guards are looked up without a lock, and a tensor's destructor may hold one.
extern "C" void restore(void* record) {
  auto* installed = static_cast<Installed*>(record);
  table_of(at::detail::getCUDAHooks()) = installed->old_table;
  guard_entry().store(installed->old_guard);
}
"""


class PretendGpuError(RuntimeError):
    """Something was asked of a pretended GPU that only a real one can answer, or it could not be set up."""


@contextlib.contextmanager
def pretend_cuda_device() -> Iterator[None]:
    """Let C++ code handle fake CUDA tensors, and trace backwards over them, until the context closes.

    Does nothing on a machine with a GPU, whose own guard and hooks serve. Contexts may nest. Raises PretendGpuError
    where the C++ part is not built yet and cannot be.
    """
    if torch.cuda.is_available():
        yield
        return
    library = _library()
    record = library.install()
    try:
        yield
    finally:
        library.restore(record)


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_build()))
    library.install.restype = ctypes.c_void_p
    library.restore.argtypes = [ctypes.c_void_p]
    return library


def _build() -> Path:
    """The path of the shared library, built now unless a build for this PyTorch is there already."""
    root = Path(torch.__file__).parent
    flags = ["-shared", "-fPIC", "-O1", "-std=c++20", f"-I{root / 'include'}", f"-L{root / 'lib'}"]
    key = hashlib.sha256("\n".join([_SOURCE, torch.__version__, str(root), *flags]).encode()).hexdigest()[:16]
    target = Path(tempfile.gettempdir()) / f"lowered_attn_{os.getuid()}" / f"pretend_device_{key}.so"
    if target.exists() and target.parent.stat().st_uid == os.getuid():
        return target
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise PretendGpuError("C++ compiler: expected g++, clang++ or the variable CXX, got none; install one")
    target.parent.mkdir(mode=0o700, exist_ok=True)
    if target.parent.stat().st_uid != os.getuid():
        raise PretendGpuError(f"{target.parent}: expected a folder of this user's, got another's; remove it")
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        source, library = Path(folder, "device.cpp"), Path(folder, "device.so")
        source.write_text(_SOURCE)
        command = [compiler, *flags, str(source), "-o", str(library), "-lc10", "-ltorch_cpu"]
        built = subprocess.run(command, capture_output=True, text=True)
        if built.returncode != 0:
            raise PretendGpuError(f"C++ compiler: expected {' '.join(command)} to succeed, got:\n{built.stderr}")
        # Several processes may build at once; the last rename wins and all files are the same.
        library.replace(target)
    return target
