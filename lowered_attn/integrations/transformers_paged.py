"""Transformers' continuous batching on paged attention: ``attn_implementation="paged|lowered_attn"``.

Transformers keeps keys and values in token slots ``[slots, Hkv, D]``, which it hands out in blocks of ``block_size``, a
group of layers at a time. A step is R requests of packed tokens; per group it has the slot of every token that is read
(``read_index``, requests one after another, cached tokens before new ones) and written (``write_index``). All of it
maps onto a paged call:

- full attention: pages are Transformers' blocks; a request's page ids are every ``block_size``-th slot that it reads;
- sliding attention: a request's slots are a ring that may start inside a block, so a page is one slot, and the ring's
  order is the page table's. Positions count from the oldest token that is still in the window.

New keys are read from the layer's own k and v, before they are stored: in a ring they overwrite what is read.

Transformers 5.17 makes block tables for flash attention's kernels alone (``ensure_decode_fast_path_is_available``), so
the page tables come from ``read_index``, which its host code fills token by token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from custom_ops.paged.layout import PAGE_SIZES, CacheSizes
from lowered_attn.checks import fail
from lowered_attn.paged_layer import Step, attend

if TYPE_CHECKING:
    from transformers.generation.continuous_batching.cache import PagedAttentionCache

WHERE = "attn_implementation='paged|lowered_attn'"


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    *,
    cache: PagedAttentionCache | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | dict[str, Tensor] | None = None,
    max_seqlen_k: int | dict[str, int] = 0,
    read_index: list[Tensor] | None = None,
    write_index: list[Tensor] | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer in a step of continuous batching; stores the new keys and values in ``cache``.

    query is ``[1, Hq, T, D]``, key and value ``[1, Hkv, T, D]``, all requests' new tokens one after another. Returns
    ``[1, T, Hq, D]`` and no weights; rows that pad the step return 0. ValueError outside continuous batching.
    """
    if cache is None or cu_seq_lens_q is None or cu_seq_lens_k is None or read_index is None or write_index is None:
        fail(WHERE, "cache", "a paged cache and its indices", "none", "call generate_batch(), or use 'lowered_attn'")
    if dropout:
        fail(WHERE, "dropout", "0", dropout, "call model.eval(): paged attention serves")
    layer: int = module.layer_idx  # type: ignore[assignment]
    group, index = cache.layer_index_to_group_indices[layer]
    window = None if cache.sliding_windows[layer] == 1 else cache.sliding_windows[layer]
    kind = "full_attention" if window is None else "sliding_attention"
    cu_seqlens_k = cu_seq_lens_k[kind] if isinstance(cu_seq_lens_k, dict) else cu_seq_lens_k
    longest = max_seqlen_k[kind] if isinstance(max_seqlen_k, dict) else max_seqlen_k
    page_size = cache.block_size if window is None else 1
    if page_size > PAGE_SIZES[1]:
        fail(WHERE, "block_size", f"at most {PAGE_SIZES[1]}", page_size, "set it in ContinuousBatchingConfig")

    slots = write_index[group]
    slots = slots.masked_fill(slots >= cache.write_trash_index, -1)
    tables = _page_tables(read_index[group], cu_seqlens_k, longest, page_size)
    # Not a metadata object, whose checks a graph cannot hold: the step is read straight from Transformers' tensors.
    step = Step(cu_seq_lens_q, cu_seqlens_k.diff() - cu_seq_lens_q.diff(), tables)
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    k_cache, v_cache = (t[index].unflatten(0, (-1, page_size)) for t in (cache.key_cache, cache.value_cache))
    sinks = None if s_aux is None else s_aux.float()
    out, _ = attend(
        "paged_attention",
        "triton_grouped",
        q,
        (k, v),
        (k_cache, v_cache),
        step,
        CacheSizes(*k_cache.shape),
        (sinks, None, None),
        sliding_window=window,
        softcap=softcap,
        scale=scaling,
        layout="unified",
    )
    torch.ops.lowered_attn.store_kv_cache(k, v, k_cache, v_cache, slots)
    return out[None], None


def _page_tables(read_index: Tensor, cu_seqlens_k: Tensor, longest: int, page_size: int) -> Tensor:
    """int32 ``[R, pages]`` from the slots that requests read, one after another; empty where nothing is cached."""
    starts = cu_seqlens_k[:-1, None]
    if read_index.shape[0] == 0:
        return starts.new_full((starts.shape[0], 1), -1)
    pages = torch.arange(0, max(longest, 1), page_size, dtype=starts.dtype, device=starts.device)
    rows = (starts + pages).clamp(max=read_index.shape[0] - 1)  # a page past a request's end is never read
    return (read_index[rows.long()] // page_size).to(torch.int32)
