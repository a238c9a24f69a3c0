"""Eager CUDA launches of the forward and backward kernels (CPU tensors too, under Triton's interpreter)."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from custom_ops.form import Form, Slots, empty_gradients, empty_outputs, unseeing_outputs
from custom_ops.kernels import backward as backward_kernels
from custom_ops.kernels.forward import forward_kernel
from custom_ops.kernels.mask_functions import mask_functions
from custom_ops.kernels.specialise import architecture, constants, kernel_operands, may_be_full
from custom_ops.kernels.tile_config import (
    DESCRIPTOR_ALIGNMENT,
    TileConfig,
    backward_config,
    can_use_descriptors,
    forward_config,
    heads_together,
)


def forward(
    form: Form,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Slots,
    scale: float,
    softcap: float = 0.0,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` of ``form``.

    Shapes as in ``torch.ops.lowered_attn``. ``config`` overrides the shipped tiling.
    """
    batch, kv_heads, key_len, head_dim = key.shape
    value_dim = value.shape[3]
    if query.numel() == 0 or key_len == 0:
        return unseeing_outputs(query, value)
    out, lse = empty_outputs(query, value)
    query, key, value = (unit_last_stride(t) for t in (query, key, value))
    call = _Call(form, query, key, value, slots, softcap)
    config = config or forward_config(
        call.architecture, query.dtype, head_dim, value_dim, call.width, call.descriptors_fit
    )
    if config.descriptors:
        _set_allocator()
    heads = batch * kv_heads
    grid = (triton.cdiv(query.shape[2] * call.group, config.block_m) * heads,)
    elements_a_key = head_dim + value_dim * value.shape[1] // kv_heads
    together = heads_together(call.l2_bytes, heads, key_len * elements_a_key * query.element_size())
    with on_device_of(query):
        forward_kernel[grid](
            query, key, value, out, lse, *call.operand_pointers,
            query.stride()[:3], key.stride()[:3], value.stride()[:3],
            out.stride()[:3], kv_heads, query.shape[2], key_len, heads, call.ints, scale, softcap,
            **call.constants, MAY_BE_FULL=may_be_full(call.mask, slots.ints, config.block_n), HEADS_TOGETHER=together,
            DESCRIPTORS=config.descriptors,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out, lse


def backward(
    form: Form,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    slots: Slots,
    scale: float,
    softcap: float = 0.0,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv; see ``custom_ops/kernels/backward.py``. ``config`` overrides the shipped tiling."""
    dq, dk, dv = empty_gradients(query, key, value)
    batch, kv_heads, key_len, head_dim = key.shape
    value_heads, value_dim, query_len = value.shape[1], value.shape[3], query.shape[2]
    if query.numel() == 0 or key_len == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    query, key, value, out = (unit_last_stride(t) for t in (query, key, value, out))
    grad_out = torch.zeros_like(out) if grad_out is None else unit_last_stride(grad_out)
    call = _Call(form, query, key, value, slots, softcap)
    config = config or backward_config(call.architecture, query.dtype, head_dim, value_dim)
    delta = torch.empty_like(lse)
    delta_rows = min(64, 16384 // call.constants["DV_PAD"])  # 64 rows of 512 spill 296 bytes on Blackwell
    widths = {"DV": call.constants["DV"], "DV_PAD": call.constants["DV_PAD"]}
    strides = (query.stride()[:3], key.stride()[:3], value.stride()[:3], grad_out.stride()[:3])
    tiling: dict[str, Any] = {
        **call.constants, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
    sizes = (kv_heads, query_len, key_len, call.ints, scale, softcap)
    with on_device_of(query):
        backward_kernels.delta_kernel[(triton.cdiv(query_len, delta_rows) * batch * query.shape[1],)](
            grad_out, out, delta if grad_lse is None else grad_lse.contiguous(), delta,
            grad_out.stride()[:3], out.stride()[:3],
            query.shape[1], query_len, HAS_GRAD_LSE=grad_lse is not None, BLOCK_M=delta_rows, **widths,
            num_warps=4,
        )  # fmt: skip
        backward_kernels.query_gradient_kernel[
            (triton.cdiv(query_len * call.group, config.block_m) * batch * kv_heads,)
        ](
            query, key, value, grad_out, lse, delta, dq, *call.operand_pointers,
            *strides, dq.stride()[:3],
            *sizes, **tiling,
        )  # fmt: skip
        backward_kernels.key_value_gradient_kernel[(triton.cdiv(key_len, config.block_n) * batch * value_heads,)](
            query, key, value, grad_out, lse, delta, dk, dv, *call.operand_pointers,
            *strides, dk.stride()[:3], dv.stride()[:3],
            *sizes, **tiling,
        )  # fmt: skip
    return dq, dk, dv


class _Call:
    """What the forward and the backward launches of one call share."""

    def __init__(self, form: Form, query: Tensor, key: Tensor, value: Tensor, slots: Slots, softcap: float) -> None:
        self.mask = form.mask_of(slots)
        functions = mask_functions(self.mask)
        self.group = query.shape[1] // key.shape[1]
        self.constants = {
            **constants(
                self.mask,
                slots,
                group=self.group,
                sharing=key.shape[1] // value.shape[1],
                head_dim=query.shape[3],
                value_dim=value.shape[3],
                dtype=query.dtype,
                softcap=softcap,
            ),
            "VISIBLE": functions.visible,
            "KEY_VISIBLE": functions.key_visible,
            "BOUNDS": functions.bounds,
        }
        absent = key  # any tensor: the kernel never reads an operand that is not there
        self.operand_pointers = tuple(absent if t is None else t.contiguous() for t in kernel_operands(slots).values())
        self.ints = slots.ints or (0,)
        self.width = self.mask.width_for(slots.ints)
        if query.is_cuda:
            self.architecture = architecture(query.device)
            self.l2_bytes = torch.cuda.get_device_properties(query.device).L2_cache_size
        else:  # the interpreter
            self.architecture, self.l2_bytes = 0, 1 << 20
        self.descriptors_fit = can_use_descriptors(self.architecture, slots.key_padding is not None) and all(
            _is_aligned(t) for t in (key, value)
        )


def _is_aligned(t: Tensor) -> bool:
    """Whether every row of every head starts at an address that the bulk copy engine takes."""
    offsets = (t.data_ptr(), *(stride * t.element_size() for stride in t.stride()[:3]))
    return all(offset % DESCRIPTOR_ALIGNMENT == 0 for offset in offsets)


def _set_allocator() -> None:
    """Descriptors are built by the kernel, in scratch memory that Triton asks torch for: 128 bytes each a program."""

    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device="cuda")

    triton.set_allocator(allocate)


def unit_last_stride(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def on_device_of(t: Tensor) -> Any:
    """Launch on the tensors' own GPU, whichever is current."""
    return torch.cuda.device(t.device if t.is_cuda else -1)
