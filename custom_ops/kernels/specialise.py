"""What a call compiles into a kernel.

The compile-time constants of the tile loop, for eager launches and templates alike. No triton.
"""

from __future__ import annotations

import functools
from typing import Any

import sympy
import torch

from custom_ops.form import Slots
from custom_ops.kernels.gluon.dense_cost import Gpu
from custom_ops.masks import Mask

FP8_ARCHITECTURE = 89
"""The first architecture for which Triton casts to float8_e4m3fn."""


def dot_precision(dtype: torch.dtype) -> str:
    """fp32 products follow torch's matmul precision.

    TF32 only where the user allows it. Other dtypes have one precision.
    """
    return "ieee" if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest" else "tf32"


def architecture(device: torch.device) -> int:
    """A GPU's compute capability times ten: 80, 90, 100."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def gpu_of(device: torch.device | int) -> Gpu:
    """What the choice of a dense kernel asks of a GPU."""
    properties = torch.cuda.get_device_properties(device)
    return Gpu(properties.multi_processor_count, properties.L2_cache_size)


def kernel_operands(slots: Slots) -> dict[str, Any]:
    """The mask's tensor operands by their names in kernels and templates, in the order in which those take them."""
    return {
        "Q_START": slots.q_start,
        "QUERY_VALUES": slots.query_value,
        "REQUEST_VALUES": slots.request_value,
        "KEY_VALUES": slots.key_value,
        "KEY_PADDING": slots.key_padding,
    }


def constants(
    mask: Mask,
    slots: Slots,
    *,
    group: int,
    sharing: int,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    softcap: float,
) -> dict[str, Any]:
    """The constants that do not depend on the tiling, by their names in ``custom_ops/kernels/tile.py``.

    ``slots`` may hold anything that is not None where an operand is present (tensors, or the compiler's buffers).
    """
    return {
        "READS_KEYS": mask.per_key != sympy.true,
        **{f"HAS_{name}": operand is not None for name, operand in kernel_operands(slots).items()},
        "HAS_SOFTCAP": softcap != 0,
        "PRECISION": dot_precision(dtype),
        "G": group,
        "SHARING": sharing,
        "D": head_dim,
        "D_PAD": padded_dim(head_dim),
        "DV": value_dim,
        "DV_PAD": padded_dim(value_dim),
    }


def padded_dim(dim: int) -> int:
    """The tile width of a head dim: the next power of two, at least 16 (the least a matrix instruction takes)."""
    return max(16, 1 << (dim - 1).bit_length())


def loads_in_parts(head_dim: int) -> bool:
    """Whether ``load_query`` of ``custom_ops/kernels/tile.py`` cuts a query of this head dim in two."""
    pad = padded_dim(head_dim)
    return pad >= 64 and head_dim - pad // 2 <= pad // 4


def may_be_full(mask: Mask, ints: tuple[int, ...], block_n: int) -> bool:
    """Whether a tile of ``block_n`` keys can be visible to a whole tile of rows.

    If not, the loop over full tiles is left out.

    ``ints`` are the values of the mask's int operands, in its order.
    """
    if mask.tile_bounds().lo_all == sympy.oo:
        return False
    width = mask.width_for(ints)
    return width is None or width >= block_n
