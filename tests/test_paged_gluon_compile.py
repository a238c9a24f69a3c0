"""The Hopper kernel of paged attention compiled for sm_90 as it is launched: registers, spills, wgmma. No GPU."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from custom_ops.kernels.gluon import HEAD_DIMS, LARGEST_GROUP, LATENT_DIMS, PAGE_SIZES, unsupported_reasons
from custom_ops.kernels.gluon.shape import registers_of, shape_of
from custom_ops.kernels.paged_config import PagedConfig, paged_config
from custom_ops.paged.call import PagedCall, empty_outputs
from custom_ops.paged.latent import latent_call
from custom_ops.paged.layout import CacheSizes, empty_caches
from inductor_passes.gpu_facts import gpu_facts

SMS = 132


def empty(*shape: int, of: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(shape, dtype=of, device="cuda")


def latent_call_of(*, page_size: int = 64, heads: int = 128, direct: bool = False, **more: Any) -> PagedCall:
    """A call over latents of 64 requests, for Hopper, on device "cuda": under fake tensors."""
    dim, dtype = sum(LATENT_DIMS), torch.bfloat16
    return latent_call(
        empty(64, heads, dim, of=dtype), empty(64, dim, of=dtype) if direct else None,
        empty(4096, page_size, dim, of=dtype), empty(65), empty(64), empty(64, 256), None,
        [empty(64)] * 3 if more.get("prefix_hole") else [], value_dim=LATENT_DIMS[0], scale=0.1, **more,
    )  # fmt: skip


def call_of(
    *, head_dim: int = 128, page_size: int = 16, heads: int = 32, direct: bool = False, **more: Any
) -> PagedCall:
    """A call of 64 requests, for Hopper, on device "cuda": under fake tensors."""
    k_cache, v_cache = empty_caches("unified", CacheSizes(4096, page_size, 8, head_dim), torch.bfloat16, "cuda")
    new = empty(64, 8, head_dim, of=torch.bfloat16) if direct else None
    if more.pop("sinks", False):
        more["sinks"] = empty(heads, of=torch.float32)
    return PagedCall(
        empty(64, heads, head_dim, of=torch.bfloat16), new, new, k_cache, v_cache,
        empty(65), empty(64), empty(64, 256), None, [empty(64)] * 2 if more.get("prefix_hole") else [],
        layout="unified", impl="triton_grouped", **more,
    )  # fmt: skip


def config_of(call: PagedCall) -> PagedConfig:
    sizes = call.cache_sizes
    return paged_config(
        90, SMS, call.impl, call.shape_class, torch.bfloat16, torch.bfloat16, call.q.shape[1], sizes.kv_heads,
        sizes.head_dim, sizes.page_size, "unified", gluon=True, value_dim=call.value_dim,
    )  # fmt: skip


def compiled(*, latents: bool = False, **sizes: Any) -> tuple[Any, PagedCall, PagedConfig]:
    """Resources of the kernel as the launcher starts it, under the shipped tiling."""
    pytest.importorskip("triton.experimental.gluon", reason="the kernel is written in Gluon")
    from custom_ops.kernels.gluon import launch
    from inductor_passes.pretend_gpu import compile_launches, pretend_gpu
    from inductor_passes.resources import read_resources

    # Descriptors ask where tensors lie: fake ones lie aligned.
    aligned = mock.patch.object(FakeTensor, "data_ptr", lambda self: 0)
    with pretend_gpu("sm_90") as gpu, gpu.fake_tensors(), aligned:
        call = (latent_call_of if latents else call_of)(**sizes)
        config = config_of(call)
        schedule = call.context_lens.new_empty(config.schedule_layout(call.requests, call.q.shape[0]).size)
        outputs = empty_outputs(call)
        (kernel,) = compile_launches(
            lambda q: launch.attention(dataclasses.replace(call, q=q), schedule, config, *outputs), call.q
        )
    return read_resources(kernel, "sm_90"), call, config


DECODE: dict[str, Any] = {"shape_class": "decode"}
CHUNK: dict[str, Any] = {"shape_class": "chunk", "page_size": 32}
ALL: dict[str, Any] = {"direct": True, "softcap": 20.0, "sinks": True, "window": 1000, "page_size": 8}
HOLE: dict[str, Any] = {"direct": True, "mode": "prefix_full", "block_size": 32, "prefix_hole": True}
LATENTS: dict[str, Any] = {"latents": True, "shape_class": "decode"}
ALL_OF_LATENTS: dict[str, Any] = {"direct": True, "softcap": 20.0, "window": 1000, "page_size": 8}
SHIPPED: dict[str, dict[str, Any]] = {
    "decode": DECODE,
    "decode-direct": DECODE | {"direct": True},
    "decode-all": DECODE | ALL | {"heads": 56},
    "decode-hole": DECODE | HOLE,
    "decode-d64": DECODE | {"head_dim": 64},
    "decode-d256": DECODE | {"head_dim": 256},
    "chunk": CHUNK | {"mode": "block_causal", "block_size": 32},
    "chunk-direct": CHUNK | {"direct": True},
    "chunk-direct-page16": CHUNK | {"direct": True, "page_size": 16},
    "chunk-d64": CHUNK | {"head_dim": 64},
    "chunk-d256": CHUNK | {"head_dim": 256},
    "chunk-all": CHUNK | ALL,
    "chunk-hole": CHUNK | HOLE,
    "latents-decode": LATENTS,
    "latents-decode-h16": LATENTS | {"heads": 16},
    "latents-decode-h16-direct": LATENTS | {"heads": 16, "direct": True, "page_size": 16},
    "latents-decode-h63-direct": LATENTS | {"heads": 63, "direct": True, "page_size": 32},
    "latents-decode-h127-all": LATENTS | ALL_OF_LATENTS | {"heads": 127},
    "latents-decode-h3-all": LATENTS | ALL_OF_LATENTS | {"heads": 3},
    "latents-decode-h16-hole": LATENTS | HOLE | {"heads": 16},
    "latents-decode-hole": LATENTS | HOLE,
    "latents-chunk": LATENTS | {"shape_class": "chunk", "mode": "block_causal", "block_size": 32},
    "latents-chunk-direct": LATENTS | {"shape_class": "chunk", "direct": True},
    "latents-chunk-h16": LATENTS | {"shape_class": "chunk", "heads": 16},
    "latents-chunk-h16-direct": LATENTS | {"shape_class": "chunk", "heads": 16, "direct": True, "page_size": 16},
    "latents-chunk-h16-all": LATENTS | ALL_OF_LATENTS | {"shape_class": "chunk", "heads": 16},
    "latents-chunk-h16-hole": LATENTS | HOLE | {"shape_class": "chunk", "heads": 16},
}


def allowed_spills(name: str) -> int:
    """Bytes stored plus bytes loaded, over the whole code.

    By ptxas of Triton 3.6, with which the kernel is measured: nothing, but for 16 page ids a tile (``chunk-all``: once
    an item, outside the loops over tiles) and for one register that a consumer of ``chunk-hole`` loads again in its
    loop. That of 3.7 spills an address or two that all roles need and loads it again, in loops too; that of 3.9 keeps
    ten to twenty registers less where there are several consumers.
    """
    import triton

    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 7):
        return {"chunk-all": 80, "chunk-hole": 8}.get(name, 0)
    if version < (3, 9):
        return {"chunk-all": 128, "chunk-direct-page16": 128, "chunk-d256": 192}.get(name, 0)
    return 448 if name.startswith(("chunk", "latents")) else 16


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_kernels_neither_spill_nor_run_wgmma_one_by_one(name: str) -> None:
    found, call, config = compiled(**SHIPPED[name])
    problems = dataclasses.replace(found, spills=max(0, found.spills - allowed_spills(name))).problems
    assert not problems, (found.spills, problems)
    assert found.wgmma, "products must be wgmma"
    shape = shape_of(call, config)
    assert found.shared_memory >= shape.shared_bytes
    programs = config.programs // SMS
    assert programs * (found.shared_memory + 1024) <= gpu_facts("sm_90").shared_memory_per_multiprocessor

    # Roles' registers are multiples of 8. The first role gets what the others leave of the program's: of latents the
    # scorer, else the first consumer, 8 fewer than the second one at the least.
    registers = registers_of(shape)
    others = shape.consumers if shape.latent else shape.consumers - 1
    roles = [registers.producer, *[registers.consumer] * others]
    assert all(24 <= count <= 256 and count % 8 == 0 for count in roles)
    a_thread = gpu_facts("sm_90").regs_per_multiprocessor // (128 * (others + 2)) // 8 * 8
    launched = (registers.limit or a_thread) * (others + 2)
    least = 88 if shape.latent else max(registers.consumer - 8, 192)
    assert launched - sum(roles) >= least, "too few for the first role"
    assert programs * launched * 128 <= gpu_facts("sm_90").regs_per_multiprocessor


FINE: dict[str, Any] = {
    "architecture": 90, "impl": "triton_grouped", "dtype": torch.bfloat16, "cache_dtype": torch.bfloat16,
    "group": 4, "head_dim": 128, "page_size": 16, "layout": "unified",
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    (
        {},
        {"dtype": torch.float16, "cache_dtype": torch.float16},
        *({"group": group} for group in (1, 7, LARGEST_GROUP)),
        *({"head_dim": head_dim} for head_dim in HEAD_DIMS),
        *({"page_size": page_size} for page_size in PAGE_SIZES),
        *({"value_dim": 512, "head_dim": 576, "group": group} for group in (1, 16, 63, 128, 1000)),
    ),
    ids=str,
)
def test_nothing_is_said_against_what_the_kernel_takes(changes: dict[str, Any]) -> None:
    assert unsupported_reasons(**FINE | changes) == []


@pytest.mark.parametrize(
    "changes, reasons",
    (
        ({"architecture": 100}, ["architecture: expected 90 (Hopper), got 100"]),
        ({"architecture": 80}, ["architecture: expected 90 (Hopper), got 80"]),
        ({"impl": "triton_portable"}, ["impl: expected 'triton_grouped', got 'triton_portable'"]),
        (
            {"dtype": torch.float32, "cache_dtype": torch.float32},
            ["q: expected bfloat16 or float16, got torch.float32"],
        ),
        (
            {"cache_dtype": torch.float8_e4m3fn},
            ["k_cache: expected q's dtype torch.bfloat16, got torch.float8_e4m3fn"],
        ),
        ({"group": 17}, ["heads: expected at most 16 query heads a KV head, got 17"]),
        ({"head_dim": 96}, ["head_dim: expected one of (64, 128, 256), got 96"]),
        ({"page_size": 12}, ["page_size: expected one of (8, 16, 32, 64, 128, 256), got 12"]),
        ({"layout": "distinct"}, ["layout: expected 'unified', got 'distinct'"]),
        (
            {"value_dim": 512, "head_dim": 512, "group": 128},
            ["value_dim and rotary elements: expected (512, 64), got (512, 0)"],
        ),
        (
            {"value_dim": 64, "head_dim": 128},
            ["value_dim and rotary elements: expected (512, 64), got (64, 64)"],
        ),
        (
            {"page_size": 4, "group": 64},
            [
                "heads: expected at most 16 query heads a KV head, got 64",
                "page_size: expected one of (8, 16, 32, 64, 128, 256), got 4",
            ],
        ),
    ),
    ids=str,
)
def test_reasons_name_what_was_expected_and_what_was_found(changes: dict[str, Any], reasons: list[str]) -> None:
    assert unsupported_reasons(**FINE | changes) == reasons
