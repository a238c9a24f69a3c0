"""The CPU path of every form: torch's CPU flash kernel, in chunks of queries cut to the keys that they see.

No ``[Lq, Lk]`` tensor is ever whole in memory: a chunk's mask in the forward, and its scores of all heads in the
backward, hold at most ``CHUNK_ELEMENTS`` elements (or 16 queries, where those have more). A forward chunk that sees
all of its keys has no mask. The backward recomputes the weights of a chunk from the saved log-sum-exp.

Capped scores, and values that several KV heads share, go through explicit scores instead: the flash kernel has no cap,
and wants a value head a KV head and one width for keys and values, which would pad every head's keys to the width of
the values. The weights of all heads
that share a value head are rows of one product with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import sympy
import torch
from torch import Tensor
from torch.nn.functional import pad

from custom_ops.form import Form, Slots, empty_outputs, unseeing_outputs
from custom_ops.masks import Mask, q
from custom_ops.padding import clear_padded

CHUNK = 256
"""Queries a chunk: the CPU flash kernel's own query block for long inputs."""
CHUNK_ELEMENTS = 1 << 24
"""Most elements of a chunk's mask or scores (64 MiB in fp32)."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class _Chunk(NamedTuple):
    rows: slice
    keys: slice
    visible: Tensor | None
    """bool ``[B or 1, rows, keys]``; None = every query of the chunk sees every key of it."""


def is_plain_causal(mask: Mask, slots: Slots) -> bool:
    """Whether the mask is ``k <= q`` with positions from 0: torch's ``is_causal`` for as many queries as keys."""
    return slots[:-1] == (None,) * 5 and mask.interval() == (sympy.S.Zero, q + 1)


def sees_everything(mask: Mask, slots: Slots) -> bool:
    """Whether every query sees every key, whatever the lengths: attention without a mask."""
    return slots[:-1] == (None,) * 5 and mask.interval() == (sympy.S.Zero, sympy.oo)


def forward(
    form: Form, query: Tensor, key: Tensor, value: Tensor, slots: Slots, scale: float, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` of ``form`` for CPU tensors; shapes as in ``torch.ops.lowered_attn``."""
    query_len, key_len, value_dim = query.shape[2], key.shape[2], value.shape[3]
    if query.numel() == 0 or key_len == 0:
        return unseeing_outputs(query, value)
    key, value = clear_padded(key, value, slots.key_padding)
    if softcap or value.shape[1] != key.shape[1]:
        return _forward_explicitly(form, query, key, value, slots, scale, softcap)
    width = max(query.shape[3], value_dim)  # the CPU kernel wants one head dim for all three
    query, key, value = (pad(t, (0, width - t.shape[3])) if t.shape[3] < width else t for t in (query, key, value))
    query, key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value))
    mask = form.mask_of(slots)
    causal = query_len == key_len and is_plain_causal(mask, slots)
    if causal or sees_everything(mask, slots):
        result, result_lse = _flash(query, key, value, 0.0, causal, scale=scale)
        return _token_major(result[..., :value_dim]), result_lse.contiguous()
    out, lse = empty_outputs(query, value[..., :value_dim])
    for chunk in _chunks(form, mask, slots, query_len, key_len, query.shape[0] * key_len):
        part = attend(query[:, :, chunk.rows], key[:, :, chunk.keys], value[:, :, chunk.keys], chunk.visible, scale)
        out[:, :, chunk.rows] = part[0][..., :value_dim]
        lse[:, :, chunk.rows] = part[1]
    return out, lse


def _forward_explicitly(
    form: Form, query: Tensor, key: Tensor, value: Tensor, slots: Slots, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """``forward`` by scores in memory, padded keys cleared; low-precision inputs are computed in fp32."""
    out, lse = empty_outputs(query, value)
    dtype = lse.dtype
    key, value = key.to(dtype), value.to(dtype)
    batch, heads, query_len, _ = query.shape
    key_len = key.shape[2]
    for rows, keys, visible in _chunks(form, form.mask_of(slots), slots, query_len, key_len, batch * heads * key_len):
        if keys.start == keys.stop:
            out[:, :, rows], lse[:, :, rows] = 0, -math.inf
            continue
        part = attend_explicitly(query[:, :, rows], key[:, :, keys], value[:, :, keys], visible, scale, softcap)
        out[:, :, rows], lse[:, :, rows] = part
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v for CPU tensors.

    With weights ``P = exp(scale * Q K^T - lse)``: ``dV = P^T dO``, ``dS = P * (dO V^T - rowsum(dO * O) + dlse)``,
    ``dQ = scale * dS K``, ``dK = scale * dS^T Q``. The query heads of a group are rows of one product, so dK and dV
    sum over the group by themselves, and dV over all heads that share a value head. A soft-cap multiplies dS by the
    slope of ``softcap * tanh(s / softcap)``, ``1 - tanh(s / softcap)^2``. Low-precision inputs are computed in fp32.
    """
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    batch, heads, query_len, head_dim = query.shape
    kv_heads, key_len = key.shape[1:3]
    value_heads = value.shape[1]
    dq = query.new_zeros(batch, query_len, heads, head_dim).transpose(1, 2)
    if query.numel() == 0 or key.numel() == 0:
        return dq, _token_major(torch.zeros_like(key)), _token_major(torch.zeros_like(value))
    kept_key, kept_value = (t.to(dtype) for t in clear_padded(key, value, slots.key_padding))
    dk, dv = torch.zeros_like(kept_key), torch.zeros_like(kept_value)
    mask = form.mask_of(slots)
    row_term = lse.new_zeros(lse.shape, dtype=dtype) if grad_lse is None else -grad_lse.to(dtype)
    if grad_out is not None:
        row_term = row_term + (grad_out.to(dtype) * out.to(dtype)).sum(-1)
    # A row that sees nothing has lse -inf: a finite stand-in keeps exp() finite, and the mask makes its weights 0.
    finite_lse = lse.to(dtype).masked_fill(lse == -math.inf, 0)
    for rows, keys, visible in _chunks(form, mask, slots, query_len, key_len, batch * heads * key_len):
        if keys.start == keys.stop:
            continue  # nothing visible: dq is 0 already
        k_part, v_part = kept_key[:, :, keys], kept_value[:, :, keys]
        q_rows = _rows_of(query[:, :, rows].to(dtype), kv_heads)
        scores = _rows_of(torch.matmul(q_rows, k_part.transpose(2, 3)).mul_(scale), value_heads)
        slope = None
        if softcap:
            capped = scores.div_(softcap).tanh_()
            slope, scores = capped.square().neg_().add_(1), capped.mul_(softcap)
        weights = scores.sub_(_rows_of(finite_lse[:, :, rows, None], value_heads)).exp_()
        if visible is not None:
            weights.unflatten(2, (-1, rows.stop - rows.start)).masked_fill_(~visible[:, None, None], 0)
        row_terms = _rows_of(row_term[:, :, rows, None], value_heads)
        if grad_out is None:
            grad_scores = weights * -row_terms
        else:
            grad_rows = _rows_of(grad_out[:, :, rows].to(dtype), value_heads)
            dv[:, :, keys] += torch.matmul(weights.transpose(2, 3), grad_rows)
            grad_scores = torch.matmul(grad_rows, v_part.transpose(2, 3)).sub_(row_terms).mul_(weights)
        grad_scores = _rows_of(grad_scores if slope is None else grad_scores.mul_(slope), kv_heads)
        dq[:, :, rows] = torch.matmul(grad_scores, k_part).mul_(scale).view(batch, heads, -1, head_dim)
        dk[:, :, keys] += torch.matmul(grad_scores.transpose(2, 3), q_rows).mul_(scale)
    return dq, _token_major(dk.to(key.dtype)), _token_major(dv.to(value.dtype))


def _rows_of(t: Tensor, heads: int) -> Tensor:
    """``[B, Hq, rows, X] -> [B, heads, Hq / heads * rows, X]``, or back: what shares a head becomes rows of it."""
    return t.reshape(t.shape[0], heads, -1, t.shape[3])


def attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """One chunk through the CPU flash kernel: ``[B, H, rows or keys, D]``, one head dim, last stride 1.

    ``visible`` bool ``[B or 1, rows, keys]``, None where every row sees every key. Returns ``out [B, Hq, rows, D]`` and
    ``lse [B, Hq, rows]``; rows that see nothing get 0 and -inf. Keys that no row sees must not hold NaN.
    """
    if key.shape[2] == 0:
        return unseeing_outputs(query, value)
    if visible is None:
        return _flash(query, key, value, 0.0, False, scale=scale)
    bias = torch.zeros(visible.shape, dtype=query.dtype).masked_fill_(~visible, float("-inf"))[:, None]
    out, lse = _flash(query, key, value, 0.0, False, attn_mask=bias, scale=scale)
    # The CPU kernel gives such rows output 0 but lse 0.
    return out, lse.masked_fill(~visible.any(-1)[:, None], float("-inf"))


def attend_explicitly(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, scale: float, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """What ``attend`` does, by scores in memory, in fp32 or the query's fp64: for what the flash kernel does not take.

    ``value [B, Hv, keys, Dv]`` may be shared by several KV heads, and be of any width. Scores s become ``softcap *
    tanh(s / softcap)`` where there is a cap. ``out [B, Hq, rows, Dv]`` is not rounded to the query's dtype. All heads
    that share keys are rows of one product, and so are those that share values: nothing is copied a head.
    """
    heads, dtype = query.shape[1], torch.float64 if query.dtype == torch.float64 else torch.float32
    q_rows = _rows_of(query.to(dtype), key.shape[1])
    scores = _rows_of(torch.matmul(q_rows, key.to(dtype).transpose(2, 3)), heads).mul_(scale)
    if softcap:
        scores.div_(softcap).tanh_().mul_(softcap)
    if visible is not None:
        scores.masked_fill_(~visible[:, None], -math.inf)
    lse = scores.logsumexp(-1)
    weights = scores.sub_(lse.masked_fill(lse == -math.inf, 0)[..., None]).exp_()
    return _rows_of(torch.matmul(_rows_of(weights, value.shape[1]), value.to(dtype)), heads), lse


def chunk_size(elements_a_query: int) -> int:
    """Queries a chunk, where one query takes that many elements of the largest tensor made of a chunk."""
    return max(16, min(CHUNK, CHUNK_ELEMENTS // max(elements_a_query, 1)))


def _chunks(
    form: Form, mask: Mask, slots: Slots, query_len: int, key_len: int, elements_a_query: int
) -> Iterator[_Chunk]:
    """The queries in chunks, each with the keys that its tile bounds leave; none of the sizes may be 0.

    ``elements_a_query``: what one query takes in the largest tensor that the caller makes of a chunk.
    """
    operands = {n: v for n, v in form.operands_of(slots).items() if n != "q_start" and v is not None}
    ints = {n: v for n, v in operands.items() if isinstance(v, int)}
    starts = None if slots.q_start is None else slots.q_start.to(torch.int64)
    start_range = (0, 0) if starts is None else (int(starts.min()), int(starts.max()))
    # Bounds hold for one request's value: for a batch they are the widest of all, as they are over its starts.
    request_values = [None] if slots.request_value is None else slots.request_value.unique().tolist()
    size = chunk_size(elements_a_query)
    key_positions = torch.arange(key_len)
    for begin in range(0, query_len, size):
        rows = slice(begin, min(begin + size, query_len))
        per_query = None if slots.query_value is None else slots.query_value[:, rows]
        query_range = None if per_query is None else (int(per_query.min()), int(per_query.max()))
        first, last = begin + start_range[0], rows.stop - 1 + start_range[1]
        bounds = [mask.evaluate_bounds(first, last, key_len, ints, query_range, value) for value in request_values]
        (lo_any, _, hi_all, _), (_, lo_all, _, hi_any) = (tuple(map(f, *bounds, bounds[0])) for f in (min, max))
        keys = slice(lo_any, max(lo_any, hi_any))
        if mask.per_key == sympy.true and lo_all <= keys.start and keys.stop <= hi_all:
            yield _Chunk(rows, keys, None)
            continue
        positions = torch.arange(rows.start, rows.stop)
        cut = dict(operands)
        for operand in mask.operands:
            if operand.kind in ("query", "key"):
                part = rows if operand.kind == "query" else keys
                cut[operand.name] = operands[operand.name][:, part]  # type: ignore[index]
        rows_at = positions if starts is None else starts[:, None] + positions
        yield _Chunk(rows, keys, mask.dense(rows_at, key_positions[keys], cut))


def _token_major(t: Tensor) -> Tensor:
    """``[B, H, S, D]`` with the memory of a contiguous ``[B, S, H, D]``: no copy where it has that already."""
    return t.transpose(1, 2).contiguous().transpose(1, 2)
