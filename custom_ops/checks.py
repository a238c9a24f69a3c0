"""Checks of calls, before any kernel starts: messages name the operand, what was expected, what came, the remedy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

if TYPE_CHECKING:
    from custom_ops.form import Form
    from custom_ops.masks import Operand, OperandValue

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HEAD_DIMS = (1, 256)
"""Head dims of q and k."""
VALUE_DIMS = (1, 512)
"""Head dims of v: values that many heads share, such as a latent, are wider than keys."""


def fail(op: str, name: str, expected: str, got: str, remedy: str) -> NoReturn:
    """Raise the ValueError of a bad argument."""
    raise ValueError(f"lowered_attn::{op}: {name}: expected {expected}, got {got}; {remedy}")


def check_call(
    form: Form,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    operands: dict[str, OperandValue],
    scale: float | None = None,
    softcap: float = 0.0,
) -> None:
    """Raise ValueError where a call of ``form`` is not one that every backend could compute."""
    op = form.name
    for name, t in (("q", query), ("k", key), ("v", value)):
        if t.dim() != 4:
            fail(op, name, "4 dimensions [B, H, S, D]", f"shape {_shape(t)}", "add or fold dimensions")
    _same(op, "device", query.device, key.device, value.device, "move q, k and v to one device")
    _same(op, "dtype", query.dtype, key.dtype, value.dtype, "cast q, k and v to one dtype, or use autocast")
    if query.dtype not in FLOAT_DTYPES:
        fail(op, "q, k, v", "float16, bfloat16, float32 (or float64 on a CPU)", str(query.dtype), "cast them")
    batch, query_heads, query_len, head_dim = query.shape
    _, kv_heads, key_len, _ = key.shape
    _, value_heads, value_len, value_dim = value.shape
    if not (batch == key.shape[0] == value.shape[0]):
        fail(
            op,
            "batch size",
            "the same for q, k and v",
            f"{batch}, {key.shape[0]}, {value.shape[0]}",
            "expand them: there is no broadcast",
        )
    if value_len != key_len:
        fail(op, "v", f"the length of k, {key_len}", f"{value_len}", "pass one value a key")
    if key.shape[3] != head_dim:
        fail(op, "k", f"head dim of q, {head_dim}", f"{key.shape[3]}", "project q and k to one head dim")
    if kv_heads == 0:
        fail(op, "k", "at least 1 head", "0", "pass at least one KV head")
    if query_heads % kv_heads != 0:
        fail(
            op,
            "q",
            f"a head count divisible by k's {kv_heads}",
            f"{query_heads}",
            "each KV head serves Hq / Hkv query heads",
        )
    if value_heads == 0 or kv_heads % value_heads != 0:
        fail(
            op, "v", f"a head count that divides k's {kv_heads}", f"{value_heads}",
            "each value head serves Hkv / Hv KV heads: pass one a KV head, or one that all share",
        )  # fmt: skip
    for name, dim, limits in (("head dim of q and k", head_dim, HEAD_DIMS), ("head dim of v", value_dim, VALUE_DIMS)):
        if not limits[0] <= dim <= limits[1]:
            fail(op, name, f"{limits[0]} to {limits[1]}", f"{dim}", "split or pad the heads")
    # Kernels take the maximum of scores before they scale them, which a negative scale would turn around.
    if scale is not None and not 0 <= scale < math.inf:
        fail(op, "scale", "a finite number, at least 0", f"{scale}", "negate q for a negative scale")
    if not 0 <= softcap < math.inf:
        fail(op, "softcap", "a finite number, at least 0", f"{softcap}", "0 means no soft-cap")
    lengths = {"request": None, "query": query_len, "key": key_len}
    for operand in form.operands:
        _check_operand(op, operand, operands.get(operand.name), query, batch, lengths)
    if form.self_attention and operands.get("q_start") is None and query_len != key_len:
        fail(
            op, "q", f"as many queries as keys ({key_len}) when q_start is None", f"{query_len}",
            "pass q_start, the position of each request's first query among the keys",
        )  # fmt: skip


def check_kernels(form: Form, query: Tensor) -> None:
    """Raise ValueError where the form's own kernels cannot compute a call that the form itself accepts."""
    if query.is_cuda and query.dtype == torch.float64:
        fail(form.name, "q, k, v", "float16, bfloat16 or float32 on CUDA", "float64", "cast them, or use a CPU")


def _check_operand(
    op: str, operand: Operand, value: OperandValue, query: Tensor, batch: int, lengths: dict[str, int | None]
) -> None:
    name = operand.name
    if value is None:
        if not operand.optional:
            fail(op, name, "a value", "None", f"pass {name}")
        return
    if operand.kind == "int":
        if isinstance(value, Tensor):
            fail(op, name, "an int", f"a tensor of shape {_shape(value)}", "pass a Python int")
        if value < (operand.minimum or 0):
            fail(op, name, f"at least {operand.minimum}", f"{value}", f"{name} counts keys: pass a larger number")
        return
    if not isinstance(value, Tensor):
        fail(op, name, "a tensor", type(value).__name__, f"pass {name} as a tensor")
    dtypes = (
        (torch.bool,)
        if operand.boolean
        else (torch.int32,)
        if operand.kind == "request"
        else (torch.int32, torch.int64)
    )
    if value.dtype not in dtypes:
        expected = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        fail(op, name, f"dtype {expected}", str(value.dtype).removeprefix("torch."), f"cast it with .to({dtypes[0]})")
    length = lengths[operand.kind]
    expected_shape = (batch,) if length is None else (batch, length)
    if value.dim() != len(expected_shape) or any(a != b for a, b in zip(value.shape, expected_shape, strict=True)):
        fail(op, name, f"shape {list(expected_shape)}", f"{_shape(value)}", "there is no broadcast: expand it")
    if value.device != query.device:
        fail(op, name, f"device {query.device}", f"{value.device}", f"move it with .to({str(query.device)!r})")


def _same(op: str, what: str, query: object, key: object, value: object, remedy: str) -> None:
    if not query == key == value:
        fail(op, what, "the same for q, k and v", f"q {query}, k {key}, v {value}", remedy)


def _shape(t: Tensor) -> list:
    return list(t.shape)
