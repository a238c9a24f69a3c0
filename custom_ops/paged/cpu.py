"""The CPU path of everything paged: one for both layouts and for every ``impl``.

Attention takes one request after the other. Its lengths are read on the host, which costs nothing on a CPU. The pages
of the keys that its rows see are gathered once (no other page id is looked at), the new keys appended from k and v
where those are given, and the rows go through torch's CPU flash kernel in chunks cut to the keys that they see, as
those of the dense forms do (``custom_ops/cpu.py``). Two things are added around it: sinks, which only rescale a row by
its log-sum-exp, and explicit scores in fp32 for the softcap, for decode steps in 16-bit dtypes and for latents. fp8
caches are dequantised, and computed in fp32.

A latent is never copied a head: the rows of all heads are rows of one product with the latents, of which values are a
view. The flash kernel takes no values narrower than keys, and packs keys and values for every query head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from custom_ops.checks import fail
from custom_ops.cpu import CHUNK, CHUNK_ELEMENTS, attend, attend_explicitly, chunk_size
from custom_ops.paged.call import PagedCall, empty_outputs
from custom_ops.paged.layout import FP8, LAYOUTS

FEW_ROWS = 4
"""Up to that many rows of 16-bit dtypes take explicit scores: 0.6 ms instead of 5.3 (bf16) and 8.9 (fp16) for one row
of 32 heads on 8 over 1,024 keys, since the flash kernel multiplies a row by itself. From 5 on bf16 loses by it."""


class _Request(NamedTuple):
    number: int
    start: int
    """Its first row of q."""
    context: int
    valid: int
    values: dict[str, int]
    """Every operand of the mask, by name."""


def attention(call: PagedCall) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` of ``torch.ops.lowered_attn.paged_attention`` for CPU tensors."""
    out, lse = empty_outputs(call)
    out.zero_()
    lse.fill_(-math.inf)
    # Latents are computed explicitly, in fp32: converted here once, not in every chunk.
    dtype = torch.float32 if call.k_cache.dtype == FP8 or call.latent else call.q.dtype
    for request in _requests(call):
        first, end = request.context, request.context + request.valid
        lo, _, _, hi = _bounds(call, request, first, end - 1)
        if lo >= hi:
            continue
        key, value = _gather(call, request, lo, hi, dtype)
        size = _rows_a_chunk(call, hi - lo)
        for begin in range(first, end, size):
            stop = min(begin + size, end)
            rows = slice(request.start + begin - first, request.start + stop - first)
            out[rows], lse[rows] = _chunk(call, request, begin, stop, lo, key, value)
    return out, lse


def store(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    layout: str,
) -> None:
    """``torch.ops.lowered_attn.store_kv_cache`` for CPU tensors."""
    chosen = LAYOUTS[layout]
    rows, slots = _rows_to_store(slot_mapping, *chosen.sizes(k_cache)[:2])
    for new, cache, scale, tokens in (
        (k, k_cache, k_scale, chosen.key_tokens),
        (v, v_cache, v_scale, chosen.value_tokens),
    ):
        kept = new[rows]
        if cache.dtype == FP8:
            # Bytes: torch's index_put_ has no kernel for float8 dtypes on every version.
            kept, cache = quantise(kept, scale).view(torch.uint8), cache.view(torch.uint8)
        view = tokens(cache)
        view[slots] = kept.view(-1, *view.shape[2:])


def store_latent(latent: Tensor, latent_cache: Tensor, slot_mapping: Tensor) -> None:
    """``torch.ops.lowered_attn.store_latent_cache`` for CPU tensors."""
    rows, slots = _rows_to_store(slot_mapping, *latent_cache.shape[:2])
    latent_cache[slots] = latent[rows]


def _rows_to_store(slot_mapping: Tensor, pages: int, page_size: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Which rows have a slot in the cache, and the page and the offset of each."""
    (rows,) = ((slot_mapping >= 0) & (slot_mapping < pages * page_size)).nonzero(as_tuple=True)
    slots = slot_mapping[rows]
    return rows, (slots // page_size, slots % page_size)


def quantise(t: Tensor, scale: Tensor | None) -> Tensor:
    """``t / scale`` as float8_e4m3fn, to nearest even; what is out of its range becomes its largest value."""
    largest = torch.finfo(FP8).max
    wide = t.float() if scale is None else t.float() / scale
    return wide.clamp(-largest, largest).to(FP8)


def _requests(call: PagedCall) -> list[_Request]:
    """The requests with valid new tokens. Lengths that make no sense are cut to what the tensors hold."""
    total = call.q.shape[0]
    names = [o.name for o in call.mask.operands[2:]]
    starts = [min(max(s, 0), total) for s in call.cu_seqlens_q.tolist()]
    contexts = call.context_lens.tolist()
    valids = [None] * len(contexts) if call.valid_lens is None else call.valid_lens.tolist()
    extras = zip(*(t.tolist() for t in call.request_values), strict=True) if names else [()] * len(contexts)
    requests = []
    for r, (context, valid, values) in enumerate(zip(contexts, valids, extras, strict=True)):
        new = starts[r + 1] - starts[r]
        valid, context = new if valid is None else min(valid, new), max(context, 0)
        if valid > 0:
            named = {"context": context, "valid": valid, **dict(zip(names, values, strict=True))}
            requests.append(_Request(r, starts[r], context, valid, named))
    return requests


def _bounds(call: PagedCall, request: _Request, first: int, last: int) -> tuple[int, int, int, int]:
    """``Mask.evaluate_bounds`` for the queries at positions ``first..last``."""
    return call.mask.evaluate_bounds(first, last, request.context + request.valid, {}, None, request.values)


def _rows_a_chunk(call: PagedCall, keys: int) -> int:
    """Queries a chunk, by the largest tensor made of it: scores of all heads, or a mask for the flash kernel."""
    of_all_heads = keys * call.q.shape[1]
    if call.latent:  # one query is enough rows for an efficient product: one for each head
        return max(1, min(CHUNK, CHUNK_ELEMENTS // max(of_all_heads, 1)))
    return chunk_size(of_all_heads if call.softcap else keys)


def _gather(call: PagedCall, request: _Request, lo: int, hi: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys ``[hi - lo, Hkv, D]`` and values ``[hi - lo, Hkv, out_dim]`` at the positions ``lo <= k < hi``."""
    sizes, layout = call.cache_sizes, call.cache_layout
    stored_end = min(hi, request.context) if call.direct else hi
    capacity = call.page_tables.shape[1] * sizes.page_size
    if stored_end > capacity:
        fail(
            call.op, f"page_tables (request {request.number})", f"pages for {stored_end} tokens",
            f"{call.page_tables.shape[1]} pages of {sizes.page_size}", "give page_tables more columns",
        )  # fmt: skip
    first_page = lo // sizes.page_size
    table = call.page_tables[request.number, first_page : -(-stored_end // sizes.page_size)]
    # An id outside the cache is the engine's error, or that of a page that the prefix hole hides: read any page.
    pages = table.clamp(0, max(sizes.pages - 1, 0))

    def gathered(cache: Tensor, tokens: Callable[[Tensor], Tensor], scale: Tensor | None, new: Tensor | None) -> Tensor:
        found = tokens(cache.index_select(0, pages)).flatten(3).flatten(0, 1)
        found = found[lo - first_page * sizes.page_size :][: max(stored_end - lo, 0)]
        if new is None or hi <= request.context:
            return found.to(dtype) if scale is None else found.to(dtype).mul_(scale.to(dtype))
        whole = found.new_empty((hi - lo, *found.shape[1:]), dtype=dtype)  # filled once: torch.cat would copy again
        whole[: len(found)] = found
        if scale is not None:
            whole[: len(found)] *= scale
        row = request.start - request.context
        whole[len(found) :] = new[row + lo + len(found) : row + hi]
        return whole

    key = gathered(call.k_cache, layout.key_tokens, call.k_scale, call.k)
    if call.latent:
        return key, key[..., : call.value_dim]
    return key, gathered(call.v_cache, layout.value_tokens, call.v_scale, call.v)


def _chunk(
    call: PagedCall, request: _Request, begin: int, stop: int, offset: int, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """``out [rows, Hq, D]`` and ``lse [rows, Hq]`` of the queries at positions ``begin <= q < stop``.

    ``key`` and ``value`` start at position ``offset``.
    """
    lo, lo_all, hi_all, hi = _bounds(call, request, begin, stop - 1)
    hi = max(lo, hi)
    key, value = key[lo - offset : hi - offset], value[lo - offset : hi - offset]
    visible = None
    if not lo_all <= lo <= hi <= hi_all:
        operands = {name: torch.tensor([number]) for name, number in request.values.items()}
        visible = call.mask.dense(torch.arange(begin, stop), torch.arange(lo, hi), operands)
        hidden = ~visible[0].any(0)
        if hidden.any():  # what nobody sees may be NaN, and 0 * NaN is NaN
            key = key.masked_fill(hidden[:, None, None], 0)
            value = key[..., : call.value_dim] if call.latent else value.masked_fill(hidden[:, None, None], 0)
    first_row = request.start + begin - request.context
    query = call.q[first_row : first_row + stop - begin].to(key.dtype)
    query, key, value = (t.transpose(0, 1)[None] for t in (query, key, value))
    query, key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value))
    if call.latent or call.softcap or (stop - begin <= FEW_ROWS and query.dtype != torch.float32):
        out, lse = attend_explicitly(query, key, value, visible, call.score_scale, call.softcap)
    else:
        out, lse = attend(query, key, value, visible, call.score_scale)
    out, lse = out[0].transpose(0, 1), lse[0].transpose(0, 1)
    if call.sinks is not None:
        blind = lse == -math.inf
        with_sink = torch.logaddexp(lse, call.sinks).masked_fill(blind, -math.inf)
        kept = (lse - with_sink).exp().masked_fill(blind, 0)  # the share of the keys
        out, lse = out.float() * kept[..., None], with_sink
    return out.to(call.q.dtype), lse
