"""What attention's kernel can compute besides attention: before it on q, after it on the output.

Shared by the tests that count kernels, those that run generated code in Triton's interpreter, and those for a GPU.
Everything is token-major, ``[..., heads, dim]``, but what is named after heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

OPS = torch.ops.lowered_attn
FP8 = torch.float8_e4m3fn


class Inputs(NamedTuple):
    """Tensors of one call, q as its projection gives it."""

    q: Tensor
    """``[B, S, H, D]``"""
    k: Tensor
    """``[B, S, Hkv, D]``, and so is v."""
    v: Tensor
    turns: Tensor
    """``[B, S, 2, D]``: cosines and sines, each for both halves."""
    factor: Tensor
    """``[1]``, fp32."""
    gate: Tensor
    """``[B, S, H, D]``"""
    x: Tensor
    """``[B, S, H * D]``: the residual stream."""


def inputs(
    batch: int, length: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, device: str,
    q_dtype: torch.dtype | None = None,
) -> Inputs:  # fmt: skip
    """Random values, or fake ones in a fake mode; q, k and v are slices of one projection but where q has a dtype."""
    wide = torch.randn(batch, length, heads + 2 * kv_heads, dim, device=device, dtype=dtype)
    q, k, v = wide.split([heads, kv_heads, kv_heads], 2)
    turns = 6 * torch.rand(batch, length, 1, dim // 2, device=device)
    turns = torch.cat([turns, turns], -1)
    return Inputs(
        q if q_dtype is None else q.to(q_dtype), k, v, torch.cat([turns.cos(), turns.sin()], 2).to(dtype),
        torch.full((1,), 0.5, device=device), torch.randn(batch, length, heads, dim, device=device, dtype=dtype),
        torch.randn(batch, length, heads * dim, device=device, dtype=dtype),
    )  # fmt: skip


def rope(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE by halves as most models write it; cos and sin for all of q's elements."""
    first, second = q.chunk(2, -1)
    return q * cos + torch.cat([-second, first], -1) * sin


def rope_of(q: Tensor, given: Inputs) -> Tensor:
    cos, sin = given.turns.unsqueeze(3).unbind(2)
    return rope(q, cos, sin)


def rope_of_heads(q: Tensor, given: Inputs) -> Tensor:
    """The same after the heads were moved in front of the tokens, as Hugging Face's models do."""
    cos, sin = given.turns.unsqueeze(1).unbind(3)
    return rope(q.transpose(1, 2), cos, sin).transpose(1, 2)


def rope_in_fp32(q: Tensor, given: Inputs) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)  # fp64 in the oracle
    cos, sin = given.turns.to(wide).unsqueeze(3).unbind(2)
    return rope(q.to(wide), cos, sin).to(given.k.dtype)


def scale(q: Tensor, given: Inputs) -> Tensor:
    return (q * given.factor).to(given.k.dtype)


def dequantise(q: Tensor, given: Inputs) -> Tensor:
    return (q.to(given.factor.dtype) * given.factor).to(given.k.dtype)


def rope_and_scale(q: Tensor, given: Inputs) -> Tensor:
    return scale(rope_of(q, given), given)


PROLOGUES: dict[str, Callable[[Tensor, Inputs], Tensor]] = {
    "rope": rope_of,
    "rope of heads": rope_of_heads,
    "rope in fp32": rope_in_fp32,
    "scale": scale,
    "dequantise": dequantise,
    "rope and scale": rope_and_scale,
}
"""On q ``[B, S, H, D]``. ``dequantise`` is for a q of fewer bits than k's."""


def to_fp8(out: Tensor, factor: Tensor) -> Tensor:
    return (out.to(factor.dtype) / factor).clamp(-448, 448).to(FP8)


def to_int8(out: Tensor, factor: Tensor) -> Tensor:
    return (out.to(factor.dtype) / factor).round().clamp(-128, 127).to(torch.int8)


EPILOGUES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "gate an element": lambda out, gate, x, factor: out * torch.sigmoid(gate),
    "gate a head": lambda out, gate, x, factor: out * torch.sigmoid(gate[..., :1]),
    "gate merged heads": lambda out, gate, x, factor: out.flatten(-2) * torch.sigmoid(x),
    "gate, then merge": lambda out, gate, x, factor: (out * torch.sigmoid(gate)).flatten(-2),
    "residual": lambda out, gate, x, factor: x + out.flatten(-2),
    "fp8": lambda out, gate, x, factor: to_fp8(out.flatten(-2), factor),
    "int8": lambda out, gate, x, factor: to_int8(out.flatten(-2), factor),
    "gate, merge, fp8": lambda out, gate, x, factor: to_fp8((out * torch.sigmoid(gate)).flatten(-2), factor),
}
"""On the output ``[..., H, D]``, with a gate like it, a residual stream ``[..., H * D]`` and a factor."""

EPILOGUES_OF_HEADS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gate an element of heads": lambda out, gate: out * torch.sigmoid(gate),
    "gate heads": lambda out, gate: out * torch.sigmoid(gate[..., :1]),
}
"""On ``[B, H, S, D]``, where heads are merged only afterwards."""


def attend(given: Inputs, q: Tensor) -> Tensor:
    """Causal attention ``[B, H, S, D]``."""
    return OPS.full_self(*(t.transpose(1, 2) for t in (q, given.k, given.v)))[0]


def after(name: str, out: Tensor, given: Inputs) -> Tensor:
    """An epilogue on attention's output ``[B, H, S, D]``; by-heads ones are followed by the merge of heads."""
    if name in EPILOGUES_OF_HEADS:
        return EPILOGUES_OF_HEADS[name](out, given.gate.transpose(1, 2)).transpose(1, 2).flatten(2)
    return EPILOGUES[name](out.transpose(1, 2), given.gate, given.x, given.factor)
