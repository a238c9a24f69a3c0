"""Readable paged attention, one request after the other: the oracle that every kernel is held against.

Nothing here is fast, and lengths are read on the host. ``attn_impl="reference"`` runs it through the op
``lowered_attn::paged_attention_reference``, which takes what ``paged_attention`` takes; latents have a twin like it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from custom_ops.paged.call import PagedCall
from custom_ops.paged.checks import check_attention


class RequestRows(NamedTuple):
    """The rows of one request that see something or might: its valid new tokens."""

    number: int
    """Which request."""
    rows: slice
    """Of q, out and lse."""
    query: Tensor
    """``[rows, Hq, D]``."""
    key: Tensor
    """``[keys, Hq, D]``, position 0 first, the same for every query head of a group; 0 where no row sees it. A view of
    one head's keys where all heads share them."""
    value: Tensor
    """``[keys, Hq, out_dim]``, likewise."""
    visible: Tensor
    """bool ``[rows, keys]``."""


def reference_paged_attention(
    *arguments: Any, dtype: torch.dtype = torch.float32, **keywords: Any
) -> tuple[Tensor, Tensor]:
    """Attention by its definition, computed in ``dtype`` (float32, or float64 as an oracle) on any device.

    Takes the arguments of ``torch.ops.lowered_attn.paged_attention``, see ``custom_ops.paged.call.PagedCall``. Returns
    ``out [T, Hq, D]`` in q's dtype (in ``dtype`` when that is float64) and ``lse [T, Hq]``, natural log, in ``dtype``.
    Rows that see nothing, rows past a request's valid tokens and rows past the last request get 0 and -inf. What no
    valid row sees is never read: neither its page id nor its page.
    """
    call = PagedCall(*arguments, **keywords)
    check_attention(call, "paged_attention_reference")
    return reference_attention_of(call, dtype)


def reference_attention_of(call: PagedCall, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """``reference_paged_attention`` of a checked call, be it over keys and values or over latents."""
    q = call.q
    out = q.new_zeros((*q.shape[:2], call.out_dim), dtype=torch.float64 if dtype == torch.float64 else q.dtype)
    lse = q.new_full(q.shape[:2], float("-inf"), dtype=dtype)
    for request in requests(call, dtype):
        scores = torch.einsum("ihd,jhd->hij", request.query, request.key) * call.score_scale
        if call.softcap:
            scores = call.softcap * (scores / call.softcap).tanh()
        scores = scores.masked_fill(~request.visible, float("-inf"))
        logits = scores
        if call.sinks is not None:
            sinks = call.sinks.to(dtype)[:, None, None].expand(-1, scores.shape[1], 1)
            logits = torch.cat([scores, sinks], -1)
        blind = ~request.visible.any(-1)
        row_lse = logits.logsumexp(-1).masked_fill(blind, 0)  # a finite stand-in: -inf - -inf is NaN
        weights = (scores - row_lse[..., None]).exp()
        out[request.rows] = torch.einsum("hij,jhd->ihd", weights, request.value).to(out.dtype)
        lse[request.rows] = row_lse.masked_fill(blind, float("-inf")).t()
    return out, lse


def requests(call: PagedCall, dtype: torch.dtype) -> Iterator[RequestRows]:
    """Every request with valid new tokens, its keys and values gathered and all in ``dtype``."""
    group = call.q.shape[1] // call.cache_sizes.kv_heads
    starts = call.cu_seqlens_q.tolist()
    for r in range(call.requests):
        start, new, context = starts[r], starts[r + 1] - starts[r], int(call.context_lens[r])
        valid = new if call.valid_lens is None else min(new, int(call.valid_lens[r]))
        if valid <= 0:
            continue
        keys = torch.arange(context + valid, device=call.q.device)
        values = {"context": call.context_lens, "valid": torch.full_like(call.context_lens, valid)}
        values |= dict(zip((o.name for o in call.mask.operands[2:]), call.request_values, strict=True))
        (visible,) = call.mask.dense(keys[context:], keys, {name: t[r : r + 1].long() for name, t in values.items()})
        key, value = _keys_and_values(call, r, start, context, visible.any(0), dtype)
        rows = slice(start, start + valid)
        # Flattening copies only where several KV heads serve several query heads each.
        key, value = (t[:, :, None].expand(-1, -1, group, -1).flatten(1, 2) for t in (key, value))
        yield RequestRows(r, rows, call.q[rows].to(dtype), key, value, visible)


def _keys_and_values(
    call: PagedCall, r: int, start: int, context: int, seen: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys ``[keys, Hkv, D]`` and values ``[keys, Hkv, out_dim]``: the seen ones from the cache or from k and v, 0 for
    the others."""
    sizes = call.cache_sizes
    (positions,) = seen.nonzero(as_tuple=True)
    new = positions >= context if call.direct else torch.zeros_like(positions, dtype=torch.bool)
    cached = positions[~new]
    pages = call.page_tables[r, cached // sizes.page_size].long()

    def gathered(tokens: Tensor, scale: Tensor | None, fresh: Tensor | None) -> Tensor:
        stored = tokens[pages, cached % sizes.page_size].to(dtype).flatten(2)
        result = stored.new_zeros(len(seen), sizes.kv_heads, sizes.head_dim)
        result[cached] = stored if scale is None else stored * scale.to(dtype)
        if fresh is not None:
            result[positions[new]] = fresh[start + positions[new] - context].to(dtype)
        return result

    key = gathered(call.cache_layout.key_tokens(call.k_cache), call.k_scale, call.k)
    if call.latent:
        return key, key[..., : call.value_dim]
    return key, gathered(call.cache_layout.value_tokens(call.v_cache), call.v_scale, call.v)
