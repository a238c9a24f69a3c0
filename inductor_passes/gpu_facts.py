"""The GPUs that code can be generated for, and what a compiler asks a GPU about itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
class Peak:
    """The most a card can do, for a roofline: dense matrix products, and memory."""

    bandwidth: float
    """Bytes a second."""
    sixteen_bits: float
    """Floating-point operations a second of matrix products in bfloat16 or float16, without sparsity."""
    single: float
    """The same in IEEE float32, which the matrix units do not have."""

    def flops(self, dtype: torch.dtype) -> float:
        """Operations a second for inputs of that dtype, as our kernels compute them now.

        float32 is IEEE arithmetic unless torch's matmul precision allows TF32, which runs at half of 16 bits' rate.
        """
        if dtype != torch.float32:
            return self.sixteen_bits
        return self.single if torch.get_float32_matmul_precision() == "highest" else self.sixteen_bits / 2


_PEAKS = {
    "sm_80": Peak(bandwidth=2.039e12, sixteen_bits=312e12, single=19.5e12),
    "sm_90": Peak(bandwidth=4.8e12, sixteen_bits=989e12, single=67e12),
    "sm_100": Peak(bandwidth=8e12, sixteen_bits=2250e12, single=75e12),
}


def peak(arch: str) -> Peak:
    """The data sheet's numbers for the card of `GPUS` with this architecture; ValueError for any other."""
    return _PEAKS[gpu_facts(arch).arch]
