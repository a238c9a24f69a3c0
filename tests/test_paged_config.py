"""Tilings of paged attention as data, and what the portable kernels cost on GPUs when compiled with them."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from custom_ops.kernels.paged_config import PagedConfig, paged_config, resolve_shape_class
from custom_ops.kernels.paged_specialise import attention_constants
from custom_ops.kernels.specialise import padded_dim
from custom_ops.paged.call import LatentCall, PagedCall
from custom_ops.paged.layout import FP8, CacheSizes, empty_caches
from custom_ops.paged.schedule import ScheduleCall
from custom_ops.paged.schedule_layout import ScheduleLayout
from inductor_passes.gpu_facts import gpu_facts

SMS = {80: 108, 90: 132, 100: 148}


def config(architecture: int = 90, **changes: Any) -> PagedConfig:
    arguments: dict[str, Any] = {
        "sms": SMS.get(architecture, 1), "impl": "triton_portable", "shape_class": "decode", "dtype": torch.bfloat16,
        "cache_dtype": torch.bfloat16, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "page_size": 16,
        "layout": "unified", **changes,
    }  # fmt: skip
    return paged_config(architecture, **arguments)


@pytest.mark.parametrize(
    "shape_class, tokens, requests, expected",
    (
        ("auto", 64, 64, "decode"),
        ("auto", 511, 64, "decode"),
        ("auto", 512, 64, "chunk"),
        ("auto", 1, 0, "chunk"),
        ("decode", 4096, 1, "decode"),
        ("chunk", 1, 1, "chunk"),
    ),
)
def test_shape_class_follows_from_capacities(shape_class: str, tokens: int, requests: int, expected: str) -> None:
    assert resolve_shape_class(shape_class, tokens, requests) == expected


@pytest.mark.parametrize("heads, kv_heads", ((32, 32), (24, 8), (28, 4), (32, 2), (40, 1), (63, 1), (128, 1), (3, 1)))
@pytest.mark.parametrize("value_dim", (None, 128))
def test_a_tile_holds_whole_tokens_of_a_block_of_heads(heads: int, kv_heads: int, value_dim: int | None) -> None:
    group = heads // kv_heads
    for shape_class in ("decode", "chunk"):
        sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "shape_class": shape_class, "value_dim": value_dim}
        grouped, alone = config(**sizes), config(**sizes, impl="triton")
        for found, most in ((grouped, grouped.block_m), (alone, 1)):
            assert found.items_per_entry == kv_heads and found.head_blocks == -(-group // most)
            # As few heads a block as that many blocks need, and the next power of two.
            in_block = -(-group // found.head_blocks)
            assert in_block <= found.padded_group < 2 * in_block
            assert found.tile_tokens * found.padded_group == found.block_m >= 16
            assert found.counters_per_program == found.head_blocks
            assert 1 <= found.programs <= 2 * SMS[90] // found.head_blocks or found.programs == 1
            assert found.scratch_rows == 2 * found.programs * found.head_blocks * found.block_m


@pytest.mark.parametrize("requests, kv_heads", ((1, 8), (4, 8), (1, 5), (1, 1)))
def test_where_items_are_few_each_kv_head_has_as_many_programs(requests: int, kv_heads: int) -> None:
    found = config(requests=requests, num_kv_heads=kv_heads, num_heads=4 * kv_heads)
    assert found.programs % kv_heads == 0 and SMS[90] - kv_heads < found.programs <= SMS[90]
    assert config(requests=64).programs == 2 * SMS[90], "many items are dealt out evenly by any number of programs"


def test_sections_of_a_schedule_follow_one_another() -> None:
    layout = config().schedule_layout(7, 100)
    assert layout == ScheduleLayout(7, 100, 4, 264)
    assert layout.entries == 8 + 25
    offsets = [layout.entries_at, layout.programs_at, layout.counters_at, layout.size]
    assert offsets == sorted(offsets) and all(at % 4 == 0 for at in offsets), "records are read 16 bytes at a time"
    assert layout.size - layout.counters_at == 264


@pytest.mark.parametrize("tile_tokens", (1, 4, 16))
def test_every_request_finds_room_among_the_entries(tile_tokens: int) -> None:
    for new in ((), (0, 0), (1,) * 9, (17, 0, 1, 40), (3, 5, 3, 5)):
        for padding in (0, 1, 30):
            tokens = sum(new) + padding
            row_tiles = sum(-(-n // tile_tokens) for n in (*new, padding))
            assert row_tiles <= ScheduleLayout(len(new), tokens, tile_tokens, 1).entries


# ---------------------------------------------------------------------- compiled ahead of time


def call_of(
    *, cache: torch.dtype, head_dim: int, direct: bool, layout: str = "unified", page_size: int = 16,
    dtype: torch.dtype = torch.bfloat16, requests: int = 64, **more: Any,
) -> PagedCall:  # fmt: skip
    """A call of some requests on device "cuda", under fake tensors."""

    def empty(*shape: int, of: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=of, device="cuda")

    k_cache, v_cache = empty_caches(layout, CacheSizes(4096, page_size, 8, head_dim), cache, "cuda")
    new = empty(requests, 8, head_dim, of=dtype) if direct else None
    scale = empty(1, of=torch.float32) if cache == FP8 else None
    return PagedCall(
        empty(requests, 32, head_dim, of=dtype), new, new, k_cache, v_cache, empty(requests + 1), empty(requests),
        empty(requests, 256), None, [],
        k_scale=scale, v_scale=scale, layout=layout, impl="triton_portable", **more,
    )  # fmt: skip


def latent_call_of(
    *, heads: int, value_dim: int, rotary_dim: int, direct: bool, page_size: int = 64,
    dtype: torch.dtype = torch.bfloat16, requests: int = 64, **more: Any,
) -> LatentCall:  # fmt: skip
    """The same over latents."""

    def empty(*shape: int, of: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=of, device="cuda")

    head_dim = value_dim + rotary_dim
    cache, new = empty(4096, page_size, 1, head_dim, of=dtype), empty(requests, 1, head_dim, of=dtype)
    return LatentCall(
        empty(requests, heads, head_dim, of=dtype), new if direct else None, new[..., :value_dim] if direct else None,
        cache, cache[..., :value_dim], empty(requests + 1), empty(requests), empty(requests, 256), None, [],
        scale=0.1, impl="triton_portable", first_elements=value_dim, **more,
    )  # fmt: skip


def compiled(arch: str, shape_class: str, **sizes: Any) -> list[Any]:
    """Resources of the attention kernel and of the schedule's, with the shipped tiling."""
    pytest.importorskip("triton", reason="Triton compiles the kernels")
    from custom_ops.kernels import paged_launch
    from inductor_passes.pretend_gpu import compile_launches, pretend_gpu
    from inductor_passes.resources import read_resources

    with pretend_gpu(arch) as gpu, gpu.fake_tensors():
        call = latent_call_of(**sizes) if "value_dim" in sizes else call_of(**sizes)
        call = dataclasses.replace(call, shape_class=shape_class)
        kernels = compile_launches(lambda q: paged_launch.attention(dataclasses.replace(call, q=q)), call.q)
    return [read_resources(kernel, arch) for kernel in kernels]


BF16 = torch.bfloat16
SHIPPED = {
    "decode": ("decode", {"cache": BF16, "head_dim": 128, "direct": True}),
    "decode-one-request": ("decode", {"cache": BF16, "head_dim": 128, "direct": True, "requests": 1}),
    "decode-fp8": ("decode", {"cache": FP8, "head_dim": 128, "direct": True}),
    "decode-d64-page64-cached": ("decode", {"cache": BF16, "head_dim": 64, "direct": False, "page_size": 64}),
    "decode-d256": ("decode", {"cache": BF16, "head_dim": 256, "direct": True}),
    "decode-fp32": ("decode", {"cache": torch.float32, "head_dim": 64, "direct": True, "dtype": torch.float32}),
    "chunk": ("chunk", {"cache": BF16, "head_dim": 128, "direct": True}),
    "chunk-d96-window": ("chunk", {"cache": BF16, "head_dim": 96, "direct": True, "window": 512}),
    "chunk-d64": ("chunk", {"cache": BF16, "head_dim": 64, "direct": True}),
    "chunk-page3-cached": ("chunk", {"cache": BF16, "head_dim": 128, "direct": False, "page_size": 3}),
    "decode-distinct": ("decode", {"cache": BF16, "head_dim": 128, "direct": True, "layout": "distinct"}),
    "chunk-distinct": ("chunk", {"cache": BF16, "head_dim": 128, "direct": True, "layout": "distinct"}),
    "chunk-d256": ("chunk", {"cache": BF16, "head_dim": 256, "direct": True}),
}


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize(
    "arch", ("sm_90", pytest.param("sm_80", marks=pytest.mark.slow), pytest.param("sm_100", marks=pytest.mark.slow))
)
def test_shipped_tilings_neither_spill_nor_outgrow_shared_memory(arch: str, name: str) -> None:
    shape_class, sizes = SHIPPED[name]
    if arch == "sm_80" and sizes["cache"] == FP8:
        pytest.skip("sm_80 has no instructions for fp8")
    found = compiled(arch, shape_class, **sizes)
    assert {kernel.kernel for kernel in found} == {"schedule_kernel", "paged_forward_kernel"}
    # Triton 3.6 keeps 16 to 96 bytes more than 3.7 does on sm_80 and sm_100, outside the loop over key tiles.
    allowed = 0 if arch == "sm_90" else 128
    for kernel in found:
        problems = dataclasses.replace(kernel, spills=max(0, kernel.spills - allowed)).problems
        assert not problems, (kernel.kernel, kernel.config, problems)
    (attention,) = (kernel for kernel in found if kernel.kernel == "paged_forward_kernel")
    assert "cp.async" in attention.ptx, "keys and values must be fetched ahead of their use"
    changes = {name: sizes[name] for name in ("head_dim", "dtype", "layout", "requests") if name in sizes}
    architecture = int(arch.removeprefix("sm_"))
    tiling = config(architecture, shape_class=shape_class, **changes)
    # A program leaves room on a multiprocessor for as many as the grid has for each, with 1 KB kept for the system.
    programs = tiling.programs // SMS[architecture]
    assert programs * (attention.shared_memory + 1024) <= gpu_facts(arch).shared_memory_per_multiprocessor
    assert programs * attention.registers * 32 * tiling.num_warps <= gpu_facts(arch).regs_per_multiprocessor


DEEPSEEK = {"value_dim": 512, "rotary_dim": 64, "direct": True}
LATENTS = {
    "decode": ("decode", {**DEEPSEEK, "heads": 128}),
    "decode-page16-cached": ("decode", {**DEEPSEEK, "heads": 128, "page_size": 16, "direct": False}),
    "decode-page16": ("decode", {**DEEPSEEK, "heads": 128, "page_size": 16}),
    "decode-h16": ("decode", {**DEEPSEEK, "heads": 16}),
    "decode-fp32": ("decode", {**DEEPSEEK, "heads": 16, "dtype": torch.float32}),
    "decode-d256": ("decode", {"value_dim": 256, "rotary_dim": 64, "direct": True, "heads": 16, "page_size": 16}),
    "decode-d128-h128": ("decode", {"value_dim": 128, "rotary_dim": 64, "direct": False, "heads": 128}),
    "decode-d96": ("decode", {"value_dim": 96, "rotary_dim": 0, "direct": True, "heads": 16}),
    "chunk": ("chunk", {**DEEPSEEK, "heads": 128}),
    "chunk-h16-cached": ("chunk", {**DEEPSEEK, "heads": 16, "direct": False}),
    "chunk-window": ("chunk", {**DEEPSEEK, "heads": 63, "window": 512}),
    "chunk-d256": ("chunk", {"value_dim": 256, "rotary_dim": 64, "direct": True, "heads": 128, "page_size": 16}),
    "chunk-d128": ("chunk", {"value_dim": 128, "rotary_dim": 32, "direct": True, "heads": 8}),
}


@pytest.mark.parametrize("name", LATENTS)
@pytest.mark.parametrize(
    "arch", ("sm_90", pytest.param("sm_80", marks=pytest.mark.slow), pytest.param("sm_100", marks=pytest.mark.slow))
)
def test_shipped_tilings_of_latents_neither_spill_nor_read_a_key_twice(arch: str, name: str) -> None:
    shape_class, sizes = LATENTS[name]
    found = compiled(arch, shape_class, **sizes)
    (attention,) = (kernel for kernel in found if kernel.kernel == "paged_forward_kernel")
    # Triton 3.6 keeps up to 8 bytes more on sm_80.
    allowed = 16 if arch == "sm_80" else 0
    problems = dataclasses.replace(attention, spills=max(0, attention.spills - allowed)).problems
    assert not problems, (attention.config, problems)
    width, architecture = sizes["value_dim"] + sizes["rotary_dim"], int(arch.removeprefix("sm_"))
    tiling = config(
        architecture, shape_class=shape_class, num_heads=sizes["heads"], num_kv_heads=1, head_dim=width,
        page_size=sizes.get("page_size", 64), value_dim=sizes["value_dim"], dtype=sizes.get("dtype", BF16),
    )  # fmt: skip
    # 16 bytes a copy: the tiles that are fetched before the loop, and one in it, of keys alone.
    padded = sum(padded_dim(dim) for dim in (sizes["value_dim"], sizes["rotary_dim"]) if dim)
    bytes_of_tile = tiling.block_n * padded * sizes.get("dtype", BF16).itemsize
    copies = len(re.findall(r"cp\.async\.c[ag]", attention.ptx))
    assert 0 < copies <= tiling.num_stages * bytes_of_tile // (16 * 32 * tiling.num_warps) + tiling.num_stages
    programs = max(1, tiling.programs * tiling.head_blocks // SMS[architecture])
    assert programs * (attention.shared_memory + 1024) <= gpu_facts(arch).shared_memory_per_multiprocessor
    assert programs * attention.registers * 32 * tiling.num_warps <= gpu_facts(arch).regs_per_multiprocessor


@pytest.mark.parametrize("value_dim", (512, 256, 128))
@pytest.mark.parametrize("shape_class, heads", (("decode", 16), ("chunk", 128)))
def test_tilings_of_latents_fit_gpus_with_less_shared_memory(value_dim: int, shape_class: str, heads: int) -> None:
    pytest.importorskip("triton", reason="Triton compiles the kernels")
    from custom_ops.kernels import paged_launch
    from inductor_passes.pretend_gpu import compile_launches, pretend_gpu

    # sm_89 cannot be pretended; it takes sm_80's instructions, and 99 KB for a program.
    tiling = config(89, shape_class=shape_class, num_heads=heads, num_kv_heads=1, value_dim=value_dim, page_size=64)
    with pretend_gpu("sm_80") as gpu, gpu.fake_tensors():
        call = latent_call_of(heads=heads, value_dim=value_dim, rotary_dim=64, direct=True)
        call = dataclasses.replace(call, schedule=call.context_lens)
        (kernel,) = compile_launches(lambda q: paged_launch.attention(dataclasses.replace(call, q=q), tiling), call.q)
    assert kernel.shared_memory <= 99 * 1024


def test_constants_of_latents() -> None:
    with torch.device("cpu"):
        call = latent_call_of_cpu(heads=63, value_dim=48, rotary_dim=16)
    tiling = config(num_heads=63, num_kv_heads=1, head_dim=64, value_dim=48)
    constants = attention_constants(call, tiling)
    assert (constants["LATENT"], constants["D"], constants["DV"], constants["DV_PAD"], constants["R_PAD"]) == (
        True, 64, 48, 64, 16,
    )  # fmt: skip
    assert constants["SAME_STRIDES"] and constants["MERGED"] and constants["HEADS"] == 1
    assert (constants["G_ALL"], constants["HEAD_BLOCKS"]) == (63, -(-63 // tiling.block_m))
    assert constants["G"] * constants["HEAD_BLOCKS"] >= 63
    alone = attention_constants(call_of_cpu(direct=True), config())
    assert not alone["LATENT"] and alone["D"] == alone["DV"] == 16


def latent_call_of_cpu(*, heads: int, value_dim: int, rotary_dim: int) -> LatentCall:
    head_dim = value_dim + rotary_dim
    new, cache, lengths = torch.empty(4, 1, head_dim), torch.empty(2, 16, 1, head_dim), torch.empty(4).int()
    return LatentCall(
        torch.empty(4, heads, head_dim), new, new[..., :value_dim], cache, cache[..., :value_dim], lengths, lengths,
        lengths[:, None], None, [], first_elements=value_dim, scale=1.0,
    )  # fmt: skip


def test_constants_know_what_is_absent() -> None:
    call = call_of_cpu(direct=False)
    constants = attention_constants(call, config())
    assert not constants["DIRECT"] and not constants["MERGED"] and constants["EXACT"]
    names = ("HEADS", "HEAD_BLOCKS", "G_ALL", "G", "PG")
    assert [constants[name] for name in names] == [8, 1, 4, 4, 4]
    hole = dataclasses.replace(call, prefix_hole=True, request_values=[call.context_lens] * 2)
    assert not attention_constants(hole, config())["EXACT"]
    alone = attention_constants(dataclasses.replace(call, impl="triton"), config(impl="triton"))
    assert [alone[name] for name in names] == [8, 4, 4, 1, 1]


def call_of_cpu(direct: bool) -> PagedCall:
    with torch.device("cpu"):
        q = torch.empty(4, 32, 16)
        k_cache, v_cache = empty_caches("unified", CacheSizes(2, 16, 8, 16), torch.float32)
        lengths = torch.empty(4, dtype=torch.int32)
        new = torch.empty(4, 8, 16) if direct else None
        return PagedCall(q, new, new, k_cache, v_cache, lengths, lengths, lengths[:, None], None, [])


def test_a_schedule_call_describes_its_attention_call() -> None:
    made = ScheduleCall.of(call_of_cpu(direct=True))
    assert (made.num_tokens, made.num_heads, made.num_kv_heads, made.head_dim, made.page_size) == (4, 32, 8, 16, 16)
    assert made.direct and made.size == 0
