"""Readable attention over any form's mask: the oracle that every kernel is held against."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from custom_ops.form import Form, default_scale
from custom_ops.masks import OperandValue
from custom_ops.padding import clear_padded


def query_positions(query: Tensor, operands: Mapping[str, OperandValue]) -> Tensor:
    """Absolute positions of the queries, ``[Lq]``, or ``[B, Lq]`` where ``q_start`` shifts them."""
    positions = torch.arange(query.shape[2], device=query.device)
    start = operands.get("q_start")
    return positions if start is None else start[:, None] + positions  # type: ignore[index]


def _times(rows: Tensor, shared: Tensor) -> Tensor:
    """The rows of every query head, ``[B, Hq, L, X]``, times the matrix of its group in ``[B, H, X, Y]``.

    Heads that share a matrix are rows of one product, so that no matrix is copied a head.
    """
    batch, heads, length, width = rows.shape
    groups = shared.shape[1]
    product = rows.reshape(batch, groups, heads // groups * length, width) @ shared
    return product.reshape(batch, heads, length, shared.shape[3])


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    form: Form,
    operands: Mapping[str, OperandValue],
    scale: float | None = None,
    dtype: torch.dtype = torch.float32,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attention by its definition, computed in ``dtype`` (float32, or float64 as an oracle), differentiable,
    ``[Lq, Lk]`` in memory.

    ``query [B, Hq, Lq, D]``, ``key [B, Hkv, Lk, D]``, ``value [B, Hv, Lk, Dv]``. With ``softcap``, scaled scores s
    become ``softcap * tanh(s / softcap)``. Returns ``out [B, Hq, Lq, Dv]`` in
    the query's dtype (in ``dtype`` when that is float64) and ``lse [B, Hq, Lq]``, natural log, in ``dtype``. Padded
    keys are never read, NaN or not; a query that sees nothing returns 0 with lse -inf and passes no gradient.
    """
    form.check(query, key, value, dict(operands), scale, softcap)
    q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
    k, v = clear_padded(k, v, operands.get("key_padding"))  # type: ignore[arg-type]
    visible = form.mask.dense(
        query_positions(query, operands),
        torch.arange(key.shape[2], device=key.device),
        {n: v for n, v in operands.items() if n != "q_start"},
    )[:, None]
    scores = _times(q, k.transpose(-1, -2)) * default_scale(query, scale)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~visible, float("-inf"))
    sees_nothing = ~visible.any(-1)
    # A row of -inf alone has no maximum to subtract: give it a finite one, so that neither value nor gradient is NaN.
    lse = torch.logsumexp(scores.masked_fill(sees_nothing[..., None], 0), -1)
    weights = (scores - lse[..., None]).exp()
    lse = lse.masked_fill(sees_nothing, float("-inf"))
    out = _times(weights, v)
    return out.to(torch.float64 if dtype == torch.float64 else query.dtype), lse
