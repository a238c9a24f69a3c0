"""What a generated kernel costs on a GPU, read from what Triton and ptxas made of it. No GPU is needed."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from inductor_passes.gpu_facts import gpu_facts
from inductor_passes.pretend_gpu import CompiledKernel, compile_with_triton, pretend_gpu

_REGISTERS = re.compile(r"Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
# ptxas numbers its performance warnings: C7510 to C7514 say that wgmma instructions had to run one by one.
_WARNING = re.compile(r"\(C75\d\d\)[^\n]*")
_INSTRUCTIONS = {"wgmma": r"\bwgmma\.mma_async\b", "mma": r"\bmma\.sync\b", "tcgen05": r"\btcgen05\.mma\b"}


@dataclass(frozen=True)
class Resources:
    """One kernel, compiled with one config for one architecture."""

    kernel: str
    """The kernel's name."""
    arch: str
    """Architecture, such as "sm_90"."""
    config: str
    """Triton's config: warps, stages and what else was chosen."""
    registers: int
    """32-bit registers a thread uses, at most 255."""
    spills: int
    """Bytes of registers moved to memory and back for want of registers: stores plus loads, over the whole code."""
    shared_memory: int
    """Bytes of shared memory a block needs."""
    wgmma: int
    """Hopper's asynchronous matrix instructions in the PTX (wgmma.mma_async)."""
    mma: int
    """The older synchronous matrix instructions in the PTX (mma.sync)."""
    tcgen05: int
    """Blackwell's matrix instructions in the PTX (tcgen05.mma)."""
    warnings: tuple[str, ...] = ()
    """ptxas's performance warnings, each with its number, such as C7510."""
    ptx: str = field(default="", repr=False)
    """The PTX text."""

    @property
    def problems(self) -> list[str]:
        """Why the kernel should not ship: spills, performance warnings, more shared memory than a block can have."""
        found = [*self.warnings]
        if self.spills:
            found.append(f"spills: expected 0 bytes, got {self.spills}; use smaller tiles or more warps")
        limit = gpu_facts(self.arch).shared_memory_per_block_optin
        if self.shared_memory > limit:
            found.append(
                f"shared memory: expected at most {limit} bytes on {self.arch}, got {self.shared_memory}; "
                "use smaller tiles or fewer stages"
            )
        return found

    def lines(self) -> list[str]:
        """The numbers as "name: value" lines, one a number, then a line a warning."""
        values = {
            "registers": self.registers,
            "spills": self.spills,
            "shared memory": self.shared_memory,
            "wgmma": self.wgmma,
            "mma": self.mma,
        }
        if gpu_facts(self.arch).major >= 10:
            values["tcgen05"] = self.tcgen05
        return [f"{name}: {value}" for name, value in values.items()] + [f"warning: {text}" for text in self.warnings]


def compile_kernel(source: str, arch: str) -> Resources:
    """Compile one of Inductor's Triton kernels to a cubin and read its resources.

    `source` is a value of `Generated.kernels`, generated for `arch` ("sm_80", "sm_90" or "sm_100"). Where Inductor
    wrote several configs beside a kernel and would time them, the first is compiled. Raises ValueError for an
    unknown `arch`, PretendGpuError for a source of another one, and Triton's errors for code that does not compile.
    """
    with pretend_gpu(arch):
        return read_resources(compile_with_triton(source)[0], arch)


def read_resources(compiled: CompiledKernel, arch: str) -> Resources:
    """The resources of a kernel that is compiled already. Raises ValueError where ptxas's report is not understood."""
    registers = [int(count) for count in _REGISTERS.findall(compiled.log)]
    spills = [int(count) for pair in _SPILLS.findall(compiled.log) for count in pair]
    if not registers or not spills:
        raise ValueError(f"ptxas: expected a report of registers and spills, got {compiled.log!r}")
    return Resources(
        kernel=compiled.name,
        arch=arch,
        config=compiled.config,
        # A kernel may call functions that were not inlined: each has its own report.
        registers=max(registers),
        spills=sum(spills),
        shared_memory=compiled.shared_memory,
        warnings=tuple(sorted(set(_WARNING.findall(compiled.log)))),
        ptx=compiled.ptx,
        **{name: len(re.findall(pattern, compiled.ptx)) for name, pattern in _INSTRUCTIONS.items()},
    )
