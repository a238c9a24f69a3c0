"""Launches the Hopper kernel of paged attention: descriptors over caches, queries and new keys; no lengths."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from custom_ops.checks import fail
from custom_ops.kernels.gluon.paged_attention import paged_attention_kernel
from custom_ops.kernels.gluon.shape import BOX_COLUMNS, CONSUMER_ROWS, KernelShape, registers_of, shape_of
from custom_ops.kernels.launch import unit_last_stride
from custom_ops.kernels.mask_functions import paged_functions
from custom_ops.kernels.paged_config import PagedConfig
from custom_ops.paged.call import PagedCall

LOG2_E = 1.4426950408889634
ALIGNMENT = 16
"""Bytes: of where the copy engine reads from, and of the strides it reads by."""


def attention(call: PagedCall, schedule: Tensor, config: PagedConfig, out: Tensor, lse: Tensor) -> None:
    """Fills ``out`` ``[T, Hq, out_dim]`` and ``lse`` ``[T, Hq]``, both contiguous.

    ``call`` is one that ``unsupported_reasons`` finds nothing against, ``schedule`` was made under ``config``. Raises
    ValueError where the strides of the caches are none that the kernel can take.
    """
    _check(call)
    shape = shape_of(call, config)
    registers = registers_of(shape)
    layout = config.schedule_layout(call.requests, call.q.shape[0])
    functions = paged_functions(call.mask, gluon=True)
    q = call.q if _can_copy(call.q) else call.q.contiguous()
    queries = TensorDescriptor(
        q, list(q.shape), list(q.stride()), [shape.consumer_tokens, shape.padded_group, BOX_COLUMNS], _swizzled()
    )
    caches = [_pages(cache, shape) for cache in _keys_and_values(call, call.k_cache, call.v_cache)]
    new = caches
    if call.k is not None and call.v is not None:
        new_keys_and_values = _keys_and_values(call, call.k, call.v)
        new = [_pages(t[None] if _heads_together(t) else t.contiguous()[None], shape) for t in new_keys_and_values]
    pages = unit_last_stride(call.page_tables)
    programs = config.programs * config.head_blocks
    scratch = torch.empty(scratch_size(shape, programs), dtype=torch.float32, device=q.device)
    # Never 0: 0 * -inf, a hidden score, is NaN.
    to_base_2 = max(LOG2_E * (call.softcap if shape.softcap else call.score_scale), 1e-30)
    tanh_scale = 2 * LOG2_E * call.score_scale / call.softcap if shape.softcap else 0.0
    paged_attention_kernel[(programs,)](
        queries, *caches, *new, pages, pages.stride(0), pages.shape[1],
        (call.requests - 1) * pages.stride(0) + pages.shape[1] if call.requests else 0,
        schedule, layout.entries_at, layout.programs_at,
        out, lse, lse if call.sinks is None else call.sinks, scratch, to_base_2, tanh_scale,
        S=shape, RANGE=functions.range, VISIBLE=functions.visible,
        CONSUMER_REGISTERS=registers.consumer, PRODUCER_REGISTERS=registers.producer,
        num_warps=4, launch_pdl=True, **({"maxnreg": registers.limit} if registers.limit else {}),
    )  # fmt: skip


def scratch_size(shape: KernelShape, programs: int) -> int:
    """Elements of fp32 scratch: two parts a program, and two statistics for each of their rows."""
    return 2 * programs * shape.consumers * CONSUMER_ROWS * (shape.value_columns + 2)


def _keys_and_values(call: PagedCall, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """What is copied from: latents once for both."""
    return (keys, keys) if call.latent else (keys, values)


def _check(call: PagedCall) -> None:
    portable = "pass impl='triton_portable'"
    for name, cache in zip(call.cache_names, (call.k_cache, call.v_cache), strict=False):
        if not _heads_together(cache):
            got = f"strides {tuple(cache.stride())} at address {cache.data_ptr():#x}"
            fail(call.op, name, f"a token's heads without gaps, aligned to {ALIGNMENT} bytes", got, portable)


def _can_copy(t: Tensor) -> bool:
    """Whether the copy engine can read ``t``: its last dimension in one piece, everything else aligned."""
    aligned = all(stride * t.element_size() % ALIGNMENT == 0 for stride in t.stride()[:-1])
    return t.stride(-1) == 1 and aligned and t.data_ptr() % ALIGNMENT == 0


def _heads_together(t: Tensor) -> bool:
    """Whether the last two dimensions of ``t`` are one piece that the copy engine can read."""
    return _can_copy(t) and (t.shape[-2] == 1 or t.stride(-2) == t.shape[-1])


def _pages(cache: Tensor, shape: KernelShape) -> TensorDescriptor:
    """``[pages, page_size, Hkv, D]`` by boxes of 64 columns of a page's keys; new keys are one page of T keys."""
    if cache.shape[0] == 0:
        # A descriptor needs a page; no page id is right, so nothing that counts reads it.
        cache = cache.new_zeros(1, *cache.shape[1:])
    pages, page_size, heads, dim = cache.shape
    strides = [cache.stride(0), cache.stride(1), 1]
    box = [1, shape.box_keys, BOX_COLUMNS]
    return TensorDescriptor(cache, [pages, page_size, heads * dim], strides, box, _swizzled())


def _swizzled() -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
