"""The form's own op in `torch.ops.lowered_attn`: a kernel when eager, a template under Inductor."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from custom_ops.form import Form
from custom_ops.masks import OperandValue

NAME = "lowered"
DEVICES = ("cpu", "cuda", "meta")


def unsupported_reasons(
    form: Form, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, OperandValue], softcap: float = 0.0
) -> list[str]:
    """Only devices that the ops have no kernel for are refused, and float64 on CUDA."""
    if q.device.type not in DEVICES:
        known = " and ".join(DEVICES)
        return [f"torch.ops.lowered_attn.{form.name} has kernels for {known}, got {q.device.type}"]
    if q.is_cuda and q.dtype == torch.float64:
        return [f"torch.ops.lowered_attn.{form.name} takes float16, bfloat16 or float32 on CUDA, got float64"]
    return []


def run(
    form: Form,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Mapping[str, OperandValue],
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Call the op; return [B, Hq, Lq, Dv], token-major in memory, so that merging the heads is a view."""
    out, _ = form.op(q, k, v, **operands, scale=scale, softcap=softcap)
    return out
