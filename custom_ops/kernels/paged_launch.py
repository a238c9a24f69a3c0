"""Eager CUDA launches of the paged kernels (CPU tensors too, under Triton's interpreter), of checked arguments."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton
from torch import Tensor

from custom_ops.checks import fail
from custom_ops.kernels.launch import on_device_of, unit_last_stride
from custom_ops.kernels.mask_functions import paged_functions
from custom_ops.kernels.paged_config import PagedConfig
from custom_ops.kernels.paged_forward import paged_forward_kernel
from custom_ops.kernels.paged_schedule import schedule_kernel
from custom_ops.kernels.paged_specialise import attention_constants
from custom_ops.kernels.paged_store import store_kernel
from custom_ops.kernels.specialise import FP8_ARCHITECTURE, architecture, padded_dim
from custom_ops.paged.call import PagedCall, empty_outputs
from custom_ops.paged.layout import FP8, LAYOUTS
from custom_ops.paged.masks import MAX_EXTRAS
from custom_ops.paged.schedule import ScheduleCall, config_of


def schedule_blocks(requests: int, tokens: int, config: PagedConfig) -> dict[str, Any]:
    """How much the schedule kernel works on at once.

    A thread a program and few row tiles a request, for short code: it is fetched from device memory once a step, which
    takes longer than running it.
    """
    block = max(triton.next_power_of_2(requests), 4)
    programs_block = triton.next_power_of_2(config.programs)
    row_tiles = triton.next_power_of_2(triton.cdiv(tokens, max(requests, 1) * config.tile_tokens))
    return {
        "PROGRAMS": config.programs,
        "PROGRAMS_BLOCK": programs_block,
        "REQUESTS_BLOCK": block,
        "TILES_BLOCK": max(1, min(row_tiles, 1024 // block)),
        "SORT": config.kernel == "gluon" and block <= 1024,
        "num_warps": 16 if max(block, programs_block) > 256 else 8,
    }


def overlaps(device: torch.device) -> bool:
    """Whether attention is launched before the kernel before it has ended (programmatic dependent launch).

    It then waits on the device, in place: the schedule it waits for is one small program, and the rest of the GPU idle.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def schedule(call: ScheduleCall, config: PagedConfig | None = None) -> Tensor:
    """The schedule of a step, int32, laid out by ``custom_ops.paged.schedule_layout``.

    ``config`` overrides the shipped tiling.
    """
    config = config or config_of(call)
    requests, tokens = call.requests, call.num_tokens
    layout = config.schedule_layout(requests, tokens)
    out = call.context_lens.new_empty(layout.size)
    if tokens == 0:
        return out
    lengths = [call.cu_seqlens_q, call.context_lens, call.valid_lens, *call.request_values]
    lengths += [None] * (3 + MAX_EXTRAS - len(lengths))
    # Any tensor stands for one that is absent: the kernel does not read it.
    pointers = [call.context_lens if t is None else t.contiguous() for t in lengths]
    with on_device_of(out):
        schedule_kernel[(1,)](
            out, *pointers, requests, tokens, layout.entries,
            RANGE=paged_functions(call.mask).range, DIRECT=call.direct, HAS_VALID=call.valid_lens is not None,
            EXTRAS=len(call.request_values), HEADS=config.items_per_entry, TILE_TOKENS=config.tile_tokens,
            BLOCK_N=config.block_n, TOLERANCE=config.tolerance, COUNTERS_PER_PROGRAM=config.counters_per_program,
            DEAL=config.kernel == "gluon", OVERLAP=overlaps(out.device), **schedule_blocks(requests, tokens, config),
        )  # fmt: skip
    return out


def attention(call: PagedCall, config: PagedConfig | None = None) -> tuple[Tensor, Tensor]:
    """``out [T, Hq, out_dim]`` and ``lse [T, Hq]`` of a call; makes the schedule where the call has none.

    ``config`` overrides the shipped tiling; the call's schedule must have been made with the same.
    """
    out, lse = empty_outputs(call)
    if call.q.numel() == 0:
        return out, lse
    schedule_call = ScheduleCall.of(call)
    config = config or config_of(schedule_call)
    made = schedule(schedule_call, config) if call.schedule is None else call.schedule
    with on_device_of(out):
        if config.kernel == "gluon":
            from custom_ops.kernels.gluon import launch as gluon_launch

            gluon_launch.attention(call, made, config, out, lse)
        else:
            _launch_attention(call, config, made, out, lse)
    return out, lse


def _launch_attention(call: PagedCall, config: PagedConfig, made: Tensor, out: Tensor, lse: Tensor) -> None:
    _check_fp8(call.op, call.q, call.k_cache)
    _check_cache_strides(call)
    k = call.k if call.k is None else unit_last_stride(call.k)
    # Of latents nothing is read as a value: keys stand for values, as their tokens lie.
    v = k if call.latent or call.v is None else unit_last_stride(call.v)
    call = dataclasses.replace(call, q=unit_last_stride(call.q), k=k, v=v)
    q = call.q
    functions = paged_functions(call.mask)
    keys, values = call.cache_layout.key_tokens(call.k_cache), call.cache_layout.value_tokens(call.v_cache)
    rows = config.scratch_rows
    parts = q.new_empty(rows * padded_dim(call.out_dim), dtype=torch.float32)
    part_stats = q.new_empty(2 * rows, dtype=torch.float32)
    layout = config.schedule_layout(call.requests, q.shape[0])
    pages = unit_last_stride(call.page_tables)
    # Any tensor stands for one that is absent: the kernel does not read it.
    absent = q
    operands = [absent if t is None else t for t in (call.sinks, call.k_scale, call.v_scale)]
    new_keys, new_values = (absent if t is None else t for t in (call.k, call.v))
    paged_forward_kernel[(config.programs * config.head_blocks,)](
        q, new_keys, new_values, call.k_cache, call.v_cache, pages, made, *operands, parts, part_stats, out, lse,
        q.stride()[:2], new_keys.stride()[:2], new_values.stride()[:2], keys.stride()[:4], values.stride(),
        pages.stride(0), out.stride()[:2],
        layout.entries, config.programs, call.cache_sizes.pages, pages.shape[1],
        call.score_scale, call.softcap,
        RANGE=functions.range, VISIBLE=functions.visible, **attention_constants(call, config),
        OVERLAP=overlaps(q.device), **({"launch_pdl": True} if overlaps(q.device) else {}),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def store(
    *,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    layout: str,
) -> None:
    """``torch.ops.lowered_attn.store_kv_cache``: ``k`` and ``v`` ``[T, Hkv, D]`` to the slots of ``slot_mapping``."""
    _store(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale, layout)


def store_latent(*, latent: Tensor, latent_cache: Tensor, slot_mapping: Tensor) -> None:
    """``torch.ops.lowered_attn.store_latent_cache``: ``latent [T, D]`` to the slots of ``slot_mapping``."""
    _store(latent.unsqueeze(1), None, latent_cache.unsqueeze(2), None, slot_mapping, None, None, "unified")


def _store(
    k: Tensor, v: Tensor | None, k_cache: Tensor, v_cache: Tensor | None, slot_mapping: Tensor,
    k_scale: Tensor | None, v_scale: Tensor | None, layout: str,
) -> None:  # fmt: skip
    if k.numel() == 0:
        return
    _check_fp8("store_kv_cache", k, k_cache)
    has_values = v is not None and v_cache is not None
    # Any tensor stands for one that is absent: the kernel does not read or write it.
    k = unit_last_stride(k)
    v = k if v is None else unit_last_stride(v)
    v_cache = k_cache if v_cache is None else v_cache
    chosen = LAYOUTS[layout]
    sizes, keys, values = chosen.sizes(k_cache), chosen.key_tokens(k_cache), chosen.value_tokens(v_cache)
    wide = padded_dim(sizes.head_dim)
    block_heads = max(1, min(triton.next_power_of_2(sizes.kv_heads), 1024 // wide))
    block_tokens = max(1, 1024 // (block_heads * wide))
    with on_device_of(k):
        store_kernel[(triton.cdiv(k.shape[0], block_tokens),)](
            k, v, k_cache, v_cache, slot_mapping.contiguous(),
            k if k_scale is None else k_scale, v if v_scale is None else v_scale,
            k.stride()[:2], v.stride()[:2], keys.stride(), (*values.stride()[:3], 0, values.stride(3)),
            k.shape[0], sizes.pages * sizes.page_size, sizes.kv_heads,
            HAS_V=has_values, HAS_K_SCALE=k_scale is not None, HAS_V_SCALE=v_scale is not None,
            TO_FP8=k_cache.dtype == FP8,
            PAGE_SIZE=sizes.page_size, X=keys.shape[4], BLOCK_TOKENS=block_tokens, BLOCK_HEADS=block_heads,
            D=sizes.head_dim, D_PAD=wide, num_warps=4,
        )  # fmt: skip


def _check_fp8(op: str, like: Tensor, cache: Tensor) -> None:
    if cache.dtype == FP8 and like.is_cuda and architecture(like.device) < FP8_ARCHITECTURE:
        fail(
            op, "k_cache", "float16 or bfloat16 below compute capability 8.9", "float8_e4m3fn",
            "keep the caches in q's dtype on this GPU",
        )  # fmt: skip


def _check_cache_strides(call: PagedCall) -> None:
    keys, values = call.cache_layout.key_tokens(call.k_cache), call.cache_layout.value_tokens(call.v_cache)
    for name, stride in zip(call.cache_names, (keys.stride(4), values.stride(3)), strict=False):
        if stride != 1 and (name != "v_cache" or call.layout == "unified"):
            remedy = "allocate it in the layout's own order"
            fail(call.op, name, "its last dimension without gaps", f"stride {stride}", remedy)
