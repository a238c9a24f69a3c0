"""The readable attention of `custom_ops.reference`: it builds every score, so it is for small inputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from custom_ops.form import Form
from custom_ops.masks import OperandValue
from custom_ops.reference import reference_attention

NAME = "reference"


def unsupported_reasons(
    form: Form, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, OperandValue], softcap: float = 0.0
) -> list[str]:
    """Nothing: the reference runs whatever the form accepts."""
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
    """Compute in fp32 (fp64 for fp64 inputs); return [B, Hq, Lq, Dv] in q's dtype."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    out, _ = reference_attention(q, k, v, form, operands, scale, dtype, softcap)
    return out.to(q.dtype)
