"""Epilogues for tests: their text, and how they are computed in any dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from custom_ops.epilogue import parse, torch_function

CASES: dict[str, str] = {
    "gate": "v0 = sigmoid(y); v1 = mul(x, v0); v2 = bfloat16(v1)",
    "residual": "v0 = add(x, y); v1 = bfloat16(v0)",
    "rounded gate": "v0 = bfloat16(x); v1 = sigmoid(y); v2 = bfloat16(v1); v3 = mul(v0, v2); v4 = bfloat16(v3)",
    "silu": "v0 = sigmoid(y); v1 = mul(y, v0); v2 = mul(x, v1); v3 = bfloat16(v2)",
    "silu by exp": (
        "v0 = neg(y); v1 = exp(v0); v2 = add(v1, 1.0); v3 = div(y, v2); v4 = mul(x, v3); v5 = bfloat16(v4)"
    ),
    "gate and residual": "v0 = sigmoid(y); v1 = mul(x, v0); v2 = sub(v1, y); v3 = float32(v2); v4 = bfloat16(v3)",
    "no further tensor": (
        "v0 = div(x, 0.4); v1 = abs(v0); v2 = sub(1.0, v1); v3 = relu(v2); v4 = maximum(v3, 0.25); "
        "v5 = minimum(v4, 0.75); v6 = float16(v5); v7 = bfloat16(v6)"
    ),
}


def of_dtype(text: str, dtype: torch.dtype) -> str:
    """The text of a case for outputs of ``dtype``."""
    return text.replace("bfloat16", "float16") if dtype == torch.float16 else text


def extra_of(text: str, sizes: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> Tensor | None:
    """What an epilogue of outputs ``[B, H, L, D]`` reads, rows of several heads in one piece, as projections are."""
    if not parse(text).reads_extra:
        return None
    batch, heads, length, dim = sizes
    rows = torch.randn(batch, length, heads * dim, dtype=dtype, device=device)
    return rows.view(batch, length, heads, dim).transpose(1, 2)


def exact(text: str, x: Tensor, extra: Tensor | None) -> Tensor:
    """The epilogue in ``x``'s dtype and on its device, the last cast left out, so that only a kernel rounds."""
    return torch_function(parse(text))(x, None if extra is None else extra.to(x.device, x.dtype))


def rounding(result: Tensor, expected: Tensor) -> float:
    """How far a rounding of ``expected`` to ``result``'s dtype moves it."""
    return torch.finfo(result.dtype).eps * float(expected.abs().max())
