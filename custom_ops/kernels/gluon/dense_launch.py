"""Launches the Hopper kernel of the dense forms: descriptors over q, k, v and the output."""

from __future__ import annotations

import dataclasses
import functools

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from custom_ops.epilogue import Epilogue
from custom_ops.form import Slots
from custom_ops.kernels.gluon.dense_attention import dense_attention_kernel
from custom_ops.kernels.gluon.dense_choice import Present, best_plan, plan
from custom_ops.kernels.gluon.dense_cost import Sizes, Walk
from custom_ops.kernels.gluon.dense_epilogue import epilogue_function
from custom_ops.kernels.gluon.dense_shape import BOX_COLUMNS, CONSUMER_ROWS, DenseShape, dense_shape
from custom_ops.kernels.gluon.kept_launch import KeptLaunch
from custom_ops.kernels.mask_functions import hopper_functions
from custom_ops.kernels.specialise import gpu_of, kernel_operands
from custom_ops.masks import Mask

LOG2_E = 1.4426950408889634
ALIGNMENT = 16
"""Bytes: Triton compiles for whether an address is a multiple of these."""
LAUNCHES = 256
"""Launches that are kept: one for each shape of call."""


def forward(
    mask: Mask,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Slots,
    scale: float,
    softcap: float,
    out: Tensor,
    lse: Tensor,
    shape: DenseShape | None = None,
    epilogue: Epilogue | None = None,
    extra: Tensor | None = None,
) -> None:
    """Fills ``out`` and ``lse`` (contiguous), on the current GPU, which is the tensors'.

    The call is one that ``dense_shape.dense_reasons`` finds nothing against; ``mask`` is the form's for its operands.
    ``shape`` overrides the tiling that ``dense_choice`` chooses. ``epilogue``: what attention's output becomes in
    ``out``, where ``epilogue_reasons`` finds nothing against it; ``extra``: what it reads, of out's sizes, such as
    ``can_copy`` says.
    """
    if slots.key_padding is not None:
        # Padded keys' values are read too, and 0 * NaN is NaN.
        value = value.masked_fill(slots.key_padding[:, None, :, None], 0)
    operands = [None if t is None else t.contiguous() for t in kernel_operands(slots).values()]
    # Any tensor: the kernel never reads an operand that is not there.
    extras = [] if extra is None else [extra]
    tensors = [query, key, value, out, *extras, lse, *[lse if t is None else t for t in operands]]
    addresses = [t.data_ptr() for t in tensors]
    launch = _launch_of(
        mask, shape, query.get_device(), query.dtype, query.shape, query.stride(), key.shape, key.stride(),
        value.shape, value.stride(), out.shape, out.stride(), tuple([None if t is None else t.dtype for t in operands]),
        tuple([address % ALIGNMENT == 0 for address in addresses]), slots.ints, softcap != 0.0,
        epilogue, None if extra is None else extra.stride(),
    )  # fmt: skip
    # Never 0: 0 * -inf, a hidden score, is NaN. Never infinite: so is 0 * inf.
    to_base_2 = max(LOG2_E * (softcap or scale), 1e-30)
    tanh_scale = min(2 * LOG2_E * scale / softcap, 3e38) if softcap else 0.0
    launch(tensors, addresses, [to_base_2, tanh_scale])


class _Launch:
    """Launches of calls that differ in addresses and in scales only: here are the kernel's arguments, in its order."""

    def __init__(
        self,
        mask: Mask,
        shape: DenseShape,
        walk: Walk,
        device: int,
        sizes: Sizes,
        ints: tuple[int, ...],
        epilogue: Epilogue | None,
    ) -> None:
        row_tiles = triton.cdiv(sizes.query_len, shape.block_m)
        items = row_tiles * sizes.all_heads
        programs = min(gpu_of(device).multiprocessors, items)
        functions = hopper_functions(mask)
        self._boxes = (
            (CONSUMER_ROWS, shape.box, shape.box), (shape.block_n, shape.box, shape.box),
            (shape.block_n, shape.value_box, shape.value_box),
            *[(CONSUMER_ROWS, shape.value_dim, BOX_COLUMNS)] * (2 if shape.extra else 1),
        )  # fmt: skip
        self._no_extra = () if shape.extra else (None,)
        self._sizes = (
            ints or (0,), items, row_tiles, triton.cdiv(sizes.all_heads, walk.group_heads), walk.group_heads,
            sizes.all_heads, sizes.heads, sizes.query_len, sizes.key_len, walk.snake,
        )  # fmt: skip
        self._constants = (
            shape, functions.visible, functions.key_visible, functions.bounds, functions.interval,
            None if epilogue is None else epilogue_function(epilogue),
        )  # fmt: skip
        self._kept = KeptLaunch(dense_attention_kernel, programs, device, num_warps=4)

    def __call__(self, tensors: list[Tensor], addresses: list[int], floats: list[float]) -> None:
        """``tensors``: those that the kernel reads and writes in boxes, then the others. ``addresses``: theirs."""
        if self._kept.is_ready:
            self._kept.again(addresses, floats)
        else:
            boxes = [_boxes(t, *box) for t, box in zip(tensors, self._boxes, strict=False)]
            others = tensors[len(boxes) :]
            self._kept.first((*boxes, *self._no_extra, *others, *self._sizes, *floats, *self._constants))


@functools.lru_cache(LAUNCHES)
def _launch_of(
    mask: Mask,
    shape: DenseShape | None,
    device: int,
    dtype: torch.dtype,
    query_sizes: tuple[int, ...],
    query_strides: tuple[int, ...],
    key_sizes: tuple[int, ...],
    key_strides: tuple[int, ...],
    value_sizes: tuple[int, ...],
    value_strides: tuple[int, ...],
    out_sizes: tuple[int, ...],
    out_strides: tuple[int, ...],
    operands: tuple[torch.dtype | None, ...],
    aligned: tuple[bool, ...],
    ints: tuple[int, ...],
    has_softcap: bool,
    epilogue: Epilogue | None,
    extra_strides: tuple[int, ...] | None,
) -> _Launch:
    """The launch of a call, by all that its kernel is compiled for and all that its descriptors say.

    ``operands``: dtypes of the mask's. ``aligned``: which of all addresses are multiples of 16, as Triton compiles for.
    """
    sizes = Sizes.of(query_sizes, key_sizes, value_sizes)
    present: Present = tuple(operand is not None for operand in operands)  # type: ignore[assignment]
    if shape is None:
        best = best_plan(mask, ints, present, sizes, has_softcap, gpu_of(device))
        group, sharing = sizes.heads // sizes.kv_heads, sizes.kv_heads // sizes.value_heads
        shape = dense_shape(
            mask, present, group, sharing, sizes.head_dim, sizes.value_dim, has_softcap, best.consumers
        )
        walk = best.walk
    else:
        walk, _ = plan(mask, ints, present, sizes, shape, gpu_of(device))
    shape = dataclasses.replace(shape, extra=extra_strides is not None)
    return _Launch(mask, shape, walk, device, sizes, ints, epilogue)


def _boxes(t: Tensor, rows: int, columns: int, swizzled: int) -> TensorDescriptor:
    """``[B, H, L, D]`` by boxes of ``columns`` columns of ``rows`` rows of a head, ``swizzled`` columns at a time."""
    # The stride of a dimension of one may be anything, and is never used.
    strides = [BOX_COLUMNS if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True)]
    strides[3] = 1
    return TensorDescriptor(t, list(t.shape), strides, [1, 1, rows, columns], _box_layout(swizzled))


@functools.cache
def _box_layout(columns: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=columns * 2, element_bitwidth=16, rank=4)
