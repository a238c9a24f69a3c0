"""Eager CUDA launches of the forward and backward kernels (CPU tensors too, under Triton's interpreter)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from custom_ops.epilogue import Epilogue
from custom_ops.form import Form, Slots, empty_gradients, empty_outputs
from custom_ops.kernels import backward as backward_kernels
from custom_ops.kernels.forward import forward_kernel
from custom_ops.kernels.gluon.dense_choice import Kernel, Present, choose, sees_everything
from custom_ops.kernels.gluon.dense_cost import Sizes
from custom_ops.kernels.gluon.dense_shape import dense_reasons, epilogue_reasons
from custom_ops.kernels.mask_functions import mask_functions
from custom_ops.kernels.specialise import architecture, constants, gpu_of, kernel_operands, may_be_full
from custom_ops.kernels.tile_config import (
    DESCRIPTOR_ALIGNMENT,
    TileConfig,
    backward_config,
    can_use_descriptors,
    forward_config,
    heads_together,
    rows_can_be_copied,
)
from custom_ops.masks import Mask

LEAST_CUDNN = 91900
"""Rates are of this one, and older ones have fewer kernels."""
CUDNN_STEP = 128
"""Of a new shape cuDNN takes milliseconds to plan: it is called for lengths that there are few of."""


def forward(
    form: Form,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Slots,
    scale: float,
    softcap: float = 0.0,
    config: TileConfig | None = None,
    outputs: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` of ``form``.

    Shapes as in ``torch.ops.lowered_attn``. Who takes a call is ``kernel_for``. ``config`` asks for the portable kernel
    and overrides its shipped tiling. ``outputs``: written in place of new ones, and laid out like them; cuDNN has none.
    """
    batch, kv_heads, key_len, head_dim = key.shape
    value_dim = value.shape[3]
    if query.numel() == 0 or key_len == 0:
        out, lse = outputs or empty_outputs(query, value)
        return out.zero_(), lse.fill_(float("-inf"))
    query, key, value = unit_last_stride(query), unit_last_stride(key), unit_last_stride(value)
    mask = form.mask_of(slots)
    kernel = "triton" if config is not None else _decide(mask, query, key, value, slots, softcap)[0]
    if kernel == "cudnn" and outputs is None:
        with on_device_of(query):
            return _cudnn(query, key, value, scale, is_causal=not sees_everything(mask))
    out, lse = outputs or empty_outputs(query, value)
    if kernel != "triton":
        with on_device_of(query):
            _hopper().forward(mask, query, key, value, slots, scale, softcap, out, lse)
        return out, lse
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


def forward_with_epilogue(
    form: Form,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Slots,
    scale: float,
    softcap: float,
    epilogue: Epilogue,
    extra: Tensor | None,
) -> Tensor | None:
    """The epilogue of attention's output ``[B, Hq, Lq, Dv]``, by the Hopper kernel; None where that cannot take it.

    ``extra``: what the epilogue reads, of the same sizes.
    """
    if query.numel() == 0 or key.shape[2] == 0:
        return None
    query, key, value = unit_last_stride(query), unit_last_stride(key), unit_last_stride(value)
    if epilogue_reasons(query.shape[3]) or against_hopper(form, query, key, value, slots, softcap):
        return None
    if extra is not None and not can_copy(extra):
        extra = extra.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
    out, lse = empty_outputs(query, value)
    with on_device_of(query):
        _hopper().forward(
            form.mask_of(slots), query, key, value, slots, scale, softcap, out, lse, epilogue=epilogue, extra=extra
        )
    return out


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


def kernel_for(
    form: Form, query: Tensor, key: Tensor, value: Tensor, slots: Slots, softcap: float = 0.0
) -> tuple[Kernel, str]:
    """Who takes the forward of this call, and why: the Hopper kernel, cuDNN, or the portable Triton one."""
    kernel, against, why = _decide(form.mask_of(slots), query, key, value, slots, softcap)
    return kernel, "; ".join(against) or why


def against_hopper(
    form: Form, query: Tensor, key: Tensor, value: Tensor, slots: Slots, softcap: float = 0.0
) -> list[str]:
    """Why the Hopper kernel cannot, or had better not, take this call; empty where the choice is one of speed."""
    return list(_decide(form.mask_of(slots), query, key, value, slots, softcap)[1])


@functools.cache
def _hopper() -> Any:
    """``gluon.dense_launch``, imported at the first call that takes it: Gluon is there for GPUs that have it."""
    from custom_ops.kernels.gluon import dense_launch

    return dense_launch


def _decide(
    mask: Mask, query: Tensor, key: Tensor, value: Tensor, slots: Slots, softcap: float
) -> tuple[Kernel, tuple[str, ...], str]:
    aligned = (query.data_ptr() | key.data_ptr() | value.data_ptr()) % DESCRIPTOR_ALIGNMENT == 0
    padding, q_start, query_value, key_value, request_value, ints = slots
    return _decision(
        mask, ints,
        (
            q_start is not None, query_value is not None, request_value is not None, key_value is not None,
            padding is not None,
        ),
        query.device, query.dtype, query.shape, query.stride(), key.shape, key.stride(), value.shape, value.stride(),
        softcap, aligned,
    )  # fmt: skip


@functools.lru_cache(1024)
def _decision(
    mask: Mask,
    ints: tuple[int, ...],
    present: Present,
    device: torch.device,
    dtype: torch.dtype,
    query_sizes: tuple[int, ...],
    query_strides: tuple[int, ...],
    key_sizes: tuple[int, ...],
    key_strides: tuple[int, ...],
    value_sizes: tuple[int, ...],
    value_strides: tuple[int, ...],
    softcap: float,
    aligned: bool,
) -> tuple[Kernel, tuple[str, ...], str]:
    """``kernel_for`` of calls that are alike, and what is against the Hopper kernel. ``aligned``: addresses are."""
    layouts = ((query_sizes, query_strides), (key_sizes, key_strides), (value_sizes, value_strides))
    reasons = dense_reasons(
        architecture=architecture(device) if device.type == "cuda" else 0,
        dtype=dtype,
        head_dim=query_sizes[3],
        value_dim=value_sizes[3],
        query_len=query_sizes[2],
        width=mask.width_for(ints),
        softcap=softcap,
        aligned=aligned and all(rows_can_be_copied(*layout, dtype.itemsize) for layout in layouts),
    )
    if reasons:
        return "triton", tuple(reasons), ""
    sizes = Sizes.of(query_sizes, key_sizes, value_sizes)
    choice = choose(
        mask, ints, present, sizes, has_softcap=softcap != 0.0, gpu=gpu_of(device),
        cudnn=not cudnn_call_reasons(sizes, layouts, torch.backends.cudnn.version() or 0),
    )  # fmt: skip
    return choice.kernel, (), choice.reason


def cudnn_call_reasons(
    sizes: Sizes, layouts: Sequence[tuple[Sequence[int], Sequence[int]]], version: int
) -> list[str]:
    """Why an eager call does not take cuDNN's attention, besides its mask and sizes; empty where it may.

    ``layouts``: sizes and strides of q, k and v. ``version``: cuDNN's, as torch tells it, 0 without.
    """
    # Its output has q's order of dimensions, and ours is token-major. Of one head the stride is either order's.
    token_major = all(
        size[2] > 1
        and strides[2] >= (size[1] - 1) * strides[1] + size[3]
        and strides[1] >= size[3]
        and strides[0] >= strides[2]
        for size, strides in layouts
    )
    checks = (
        (version >= LEAST_CUDNN, f"cuDNN: expected at least version {LEAST_CUDNN}, got {version}"),
        (
            sizes.query_len % CUDNN_STEP == 0 and sizes.key_len % CUDNN_STEP == 0,
            f"lengths: expected multiples of {CUDNN_STEP}, got {sizes.query_len} and {sizes.key_len}",
        ),
        (token_major, "q, k and v: expected all heads of a token side by side"),
    )
    return [reason for holds, reason in checks if not holds]


def _cudnn(query: Tensor, key: Tensor, value: Tensor, scale: float, is_causal: bool) -> tuple[Tensor, Tensor]:
    """cuDNN's fused attention, whose log-sum-exp is the same natural logarithm, as ``[B, H, L, 1]``."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, is_causal, False, scale=scale
    )
    batch, heads, query_len, value_dim = out.shape
    row = heads * value_dim
    promised = (query_len * row, value_dim, row, 1)  # by the op's fake implementation
    if out.stride() != promised:
        # Dimensions of one have q's strides, which say nothing of where elements are.
        same = out.transpose(1, 2).is_contiguous()
        out = out.as_strided(out.shape, promised) if same else empty_outputs(query, value)[0].copy_(out)
    return out, lse.view(batch, heads, query_len)


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


def can_copy(t: Tensor) -> bool:
    """Whether the copy engine can read ``t`` ``[B, H, L, D]``: rows in one piece, all aligned, none repeated."""
    return t.data_ptr() % DESCRIPTOR_ALIGNMENT == 0 and rows_can_be_copied(t.shape, t.stride(), t.element_size())


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
    if not t.is_cuda or t.get_device() == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(t.device)
