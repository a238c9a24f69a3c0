"""Checks of paged calls. ``check_*`` look at shapes, dtypes and names: they run before every kernel and in every fake.

``check_values`` looks at what lengths, page ids and slots hold, which syncs with the device: it is for debugging.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from custom_ops.checks import HEAD_DIMS, VALUE_DIMS, fail
from custom_ops.paged.call import IMPLS, SHAPE_CLASSES, PagedCall
from custom_ops.paged.layout import FP8, LAYOUTS, PAGE_SIZES, CacheSizes
from custom_ops.paged.masks import MODES, request_operand_names

QUERY_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CUDA_HEAD_DIM_STEP = 8
"""Head dims on CUDA are multiples of it: 16 bytes of a 16-bit dtype, the least that a kernel loads at once."""
ROTARY_DIMS = (0, 128)
"""Elements of a latent behind the VALUE_DIMS that are its value."""
CUDA_LATENT_STEP = 16
"""Both are multiples of it on CUDA: the least depth of a matrix product."""


def check_attention(call: PagedCall, op: str | None = None) -> None:
    """Raise ValueError where ``call`` is not one that every path could compute. ``op``: what it names, if not call.op.

    Of a ``LatentCall`` ``check_latents`` has looked at the latents, of which keys and values here are views.
    """
    op = op or call.op
    check_names(op, call.mode, call.block_size, call.window, call.impl, call.shape_class)
    q = call.q
    _check_query(op, q)
    sizes = check_caches(op, call.k_cache, call.v_cache, call.layout, q, call.value_dim)
    check_scales(op, call.k_cache, call.k_scale, call.v_scale)
    rows, heads, head_dim = q.shape
    if head_dim != sizes.head_dim:
        fail(op, "q", f"the caches' head dim, {sizes.head_dim}", f"{head_dim}", "make caches for this head dim")
    if heads % sizes.kv_heads != 0:
        remedy = "each KV head serves Hq / Hkv query heads"
        fail(op, "q", f"a head count divisible by the caches' {sizes.kv_heads}", f"{heads}", remedy)
    if (call.k is None) != (call.v is None):
        fail(
            op, "k, v", "both new keys and new values, or neither", "no k" if call.k is None else "no v",
            "pass both, or None for both where they are in the caches already",
        )  # fmt: skip
    for name, t, elements in (("k", call.k, head_dim), ("v", call.v, call.out_dim)):
        if t is not None:
            remedy = "one row for each of q's, one head for each of the caches'"
            _tensor(op, name, t, (q.dtype,), (rows, sizes.kv_heads, elements), q, remedy)
    check_lengths(op, call.cu_seqlens_q, call.context_lens, call.valid_lens, q)
    check_request_values(op, call.mode, call.prefix_hole, call.request_values, call.context_lens)
    _tensor(
        op, "page_tables", call.page_tables, (torch.int32,), (call.requests, None), q,
        "one row a request, as many as context_lens has values",
    )  # fmt: skip
    if call.sinks is not None:
        _tensor(op, "sinks", call.sinks, (torch.float32,), (heads,), q, "one sink a query head")
    for name, number in (("softcap", call.softcap), ("scale", call.scale)):
        # Kernels take the maximum of scores before they scale them, which a negative scale would turn around.
        if number is not None and not 0 <= number < math.inf:
            fail(op, name, "a finite number, at least 0", f"{number}", f"pass another {name}")
    if call.schedule is not None:
        _tensor(op, "schedule", call.schedule, (torch.int32,), (None,), q, "pass what paged_schedule returned")


def check_latents(op: str, q: Tensor, latent: Tensor | None, latent_cache: Tensor, value_dim: int) -> None:
    """Raise ValueError where these are no operands of attention over latents."""
    _check_query(op, q)
    _check_latent_cache(op, latent_cache, q, "q")
    width = latent_cache.shape[2]
    if q.shape[2] != width:
        remedy = "project queries into the latent space, rotary elements behind the others"
        fail(op, "q", f"the cache's latent size, {width}", f"{q.shape[2]}", remedy)
    _check_latent_dims(op, width, value_dim, q.is_cuda)
    if latent is not None:
        remedy = "one row for each of q's: the one latent that all heads share"
        _tensor(op, "latent", latent, (q.dtype,), (q.shape[0], width), q, remedy)


def check_latent_store(latent: Tensor, latent_cache: Tensor, slot_mapping: Tensor) -> None:
    """Raise ValueError where a call of ``store_latent_cache`` is not one that every path could do."""
    op = "store_latent_cache"
    if latent.dim() != 2:
        remedy = "pass the one latent of each token, which has no heads"
        fail(op, "latent", "2 dimensions [T, D]", f"shape {list(latent.shape)}", remedy)
    if latent.dtype not in QUERY_DTYPES:
        fail(op, "latent", "float32, float16 or bfloat16", _name(latent.dtype), "cast it")
    _check_latent_cache(op, latent_cache, latent, "latent")
    width = latent_cache.shape[2]
    if latent.shape[1] != width:
        fail(op, "latent", f"the cache's latent size, {width}", f"{latent.shape[1]}", "make a cache for this size")
    least, most = VALUE_DIMS[0] + ROTARY_DIMS[0], VALUE_DIMS[1] + ROTARY_DIMS[1]
    if not least <= width <= most:
        remedy = "a latent holds its value first, then what is rotated"
        fail(op, "latent size", f"{least} to {most}", f"{width}", remedy)
    if latent.is_cuda and width % CUDA_LATENT_STEP != 0:
        expected, remedy = f"a multiple of {CUDA_LATENT_STEP} on CUDA", "pad the projections with zeros, or use a CPU"
        fail(op, "latent size", expected, f"{width}", remedy)
    remedy = "one slot a row of latent, -1 for none"
    _tensor(op, "slot_mapping", slot_mapping, (torch.int64,), (latent.shape[0],), latent, remedy)


def check_store(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    layout: str,
) -> None:
    """Raise ValueError where a call of ``store_kv_cache`` is not one that every path could do."""
    op = "store_kv_cache"
    if k.dim() != 3:
        fail(op, "k", "3 dimensions [T, Hkv, D]", f"shape {list(k.shape)}", "split heads with k.view(T, Hkv, D)")
    if k.dtype not in QUERY_DTYPES:
        fail(op, "k", "float32, float16 or bfloat16", _name(k.dtype), "cast it")
    sizes = check_caches(op, k_cache, v_cache, layout, k)
    check_scales(op, k_cache, k_scale, v_scale)
    shape = (k.shape[0], sizes.kv_heads, sizes.head_dim)
    for name, t in (("k", k), ("v", v)):
        _tensor(op, name, t, (k.dtype,), shape, k, "one head for each of the caches', k and v alike")
    _tensor(op, "slot_mapping", slot_mapping, (torch.int64,), (k.shape[0],), k, "one slot a row of k, -1 for none")


def check_schedule(
    cu_seqlens_q: Tensor,
    context_lens: Tensor,
    valid_lens: Tensor | None,
    request_values: Sequence[Tensor],
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    mode: str,
    block_size: int,
    window: int,
    prefix_hole: bool,
    layout: str,
    impl: str,
    shape_class: str,
    value_dim: int | None,
) -> None:
    """Raise ValueError where a call of ``paged_schedule`` describes no attention that could follow."""
    op = "paged_schedule"
    check_names(op, mode, block_size, window, impl, shape_class)
    _one_of(op, "layout", layout, LAYOUTS)
    check_lengths(op, cu_seqlens_q, context_lens, valid_lens, context_lens)
    check_request_values(op, mode, prefix_hole, request_values, context_lens)
    if num_tokens < 0:
        fail(op, "num_tokens", "at least 0", f"{num_tokens}", "pass the rows of q, padding included")
    _check_sizes(op, CacheSizes(1, page_size, num_kv_heads, head_dim), context_lens.is_cuda, value_dim)
    if num_heads < 1 or num_heads % num_kv_heads != 0:
        remedy = "each KV head serves Hq / Hkv query heads"
        fail(op, "num_heads", f"a multiple of num_kv_heads, {num_kv_heads}", f"{num_heads}", remedy)
    if dtype not in QUERY_DTYPES:
        fail(op, "dtype", "float32, float16 or bfloat16", _name(dtype), "pass q's dtype")
    if value_dim is not None:
        if num_kv_heads != 1:
            fail(op, "num_kv_heads", "1 with a value_dim", f"{num_kv_heads}", "all heads share a latent")
        if layout != "unified":
            fail(op, "layout", "'unified' with a value_dim", repr(layout), "latents lie in one piece each")
        if cache_dtype != dtype:
            remedy = "keep latents in q's dtype"
            fail(op, "cache_dtype", f"{_name(dtype)} with a value_dim", _name(cache_dtype), remedy)
    if cache_dtype not in (dtype, FP8):
        fail(op, "cache_dtype", f"{_name(dtype)} or {_name(FP8)}", _name(cache_dtype), "pass the caches' dtype")


# ---------------------------------------------------------------------- parts


def check_names(op: str, mode: str, block_size: int, window: int, impl: str, shape_class: str) -> None:
    """Names that must be known and the numbers that go with them."""
    _one_of(op, "mode", mode, MODES)
    _one_of(op, "impl", impl, IMPLS)
    _one_of(op, "shape_class", shape_class, SHAPE_CLASSES)
    if block_size < 1:
        fail(op, "block_size", "at least 1", f"{block_size}", "it counts the tokens of a block")
    if window < 0:
        fail(op, "window", "at least 0", f"{window}", "it counts keys, the query's own included; 0 means no window")


def check_caches(
    op: str, k_cache: Tensor, v_cache: Tensor, layout: str, like: Tensor, value_dim: int | None = None
) -> CacheSizes:
    """The sizes of the caches, whose dtype is ``like``'s (q, or k of a store) or fp8.

    ``value_dim``: elements of a value where they are not a key's.
    """
    _one_of(op, "layout", layout, LAYOUTS)
    chosen = LAYOUTS[layout]
    others = [name for name in LAYOUTS if name != layout]
    remedy = f"reshape it, or pass layout={others[0]!r}" if len(others) == 1 else "reshape it, or pass its layout"
    for name, t, dims in (("k_cache", k_cache, chosen.key_dims), ("v_cache", v_cache, chosen.value_dims)):
        rank = dims.count(",") + 1
        if t.dim() != rank:
            fail(op, name, f"{rank} dimensions {dims}", f"shape {list(t.shape)}", remedy)
        if t.dtype not in (like.dtype, FP8):
            expected = f"dtype {_name(like.dtype)}, as q, k and v, or {_name(FP8)}"
            fail(op, name, expected, _name(t.dtype), "allocate the caches in one of these, or cast q, k and v")
        _device(op, name, t, like)
    if k_cache.dtype != v_cache.dtype:
        fail(op, "v_cache", f"k_cache's dtype, {_name(k_cache.dtype)}", _name(v_cache.dtype), "give both one dtype")
    sizes = chosen.sizes(k_cache)
    _check_sizes(op, sizes, like.is_cuda, value_dim)
    of_values = sizes if value_dim is None else sizes._replace(head_dim=value_dim)
    for name, t, shape, dims in (
        ("k_cache", k_cache, chosen.key_shape(sizes, k_cache.dtype), chosen.key_dims),
        ("v_cache", v_cache, chosen.value_shape(of_values), chosen.value_dims),
    ):
        if not _shapes_agree(t, shape):
            fail(op, name, f"shape {list(shape)}", f"{list(t.shape)}", f"{layout} caches are {dims}")
    return sizes


def check_scales(op: str, cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None) -> None:
    """fp32 ``[1]`` each, and only beside fp8 caches: kernels of other dtypes do not read them."""
    for name, t in (("k_scale", k_scale), ("v_scale", v_scale)):
        if t is None:
            continue
        if cache.dtype != FP8:
            fail(op, name, f"None for a {_name(cache.dtype)} cache", "a tensor", f"scales go with {_name(FP8)} caches")
        _tensor(op, name, t, (torch.float32,), (1,), cache, "one scale for a whole cache")


def check_lengths(op: str, cu_seqlens_q: Tensor, context_lens: Tensor, valid_lens: Tensor | None, like: Tensor) -> None:
    """Shapes and dtypes of what says how long requests are; their number is that of ``context_lens``."""
    int32 = (torch.int32,)
    _tensor(op, "context_lens", context_lens, int32, (None,), like, "one length a request")
    requests = context_lens.shape[0]
    remedy = "it holds one value more than context_lens: request r's rows are cu_seqlens_q[r]:cu_seqlens_q[r + 1]"
    _tensor(op, "cu_seqlens_q", cu_seqlens_q, int32, (requests + 1,), like, remedy)
    if valid_lens is not None:
        _tensor(op, "valid_lens", valid_lens, int32, (requests,), like, "one length a request, as context_lens")


def check_request_values(
    op: str, mode: str, prefix_hole: bool, request_values: Sequence[Tensor], context_lens: Tensor
) -> None:
    """What the mode reads besides lengths: how many tensors there are, and each."""
    names = request_operand_names(mode, prefix_hole)
    if len(request_values) != len(names):
        what = f"mode {mode!r}{' with prefix_hole' if prefix_hole else ''} reads {', '.join(names) or 'none'}"
        fail(op, "request_values", f"{len(names)} tensors", f"{len(request_values)}", what)
    for name, t in zip(names, request_values, strict=True):
        shape = (context_lens.shape[0],)
        _tensor(op, f"request_values ({name})", t, (torch.int32,), shape, context_lens, "one value a request")


def _check_query(op: str, q: Tensor) -> None:
    if q.dim() != 3:
        fail(op, "q", "3 dimensions [T, Hq, D]", f"shape {list(q.shape)}", "split heads with q.view(T, Hq, D)")
    if q.dtype not in QUERY_DTYPES:
        fail(op, "q", "float32, float16 or bfloat16", _name(q.dtype), "cast it")


def _check_latent_cache(op: str, latent_cache: Tensor, like: Tensor, like_name: str) -> None:
    name = "latent_cache"
    if latent_cache.dim() != 3:
        remedy = "all heads share one latent a token"
        fail(op, name, "3 dimensions [pages, page_size, D]", f"shape {list(latent_cache.shape)}", remedy)
    if latent_cache.dtype != like.dtype:
        remedy = f"keep latents in {like_name}'s dtype: there are no 8-bit caches of latents"
        fail(op, name, f"dtype {_name(like.dtype)}", _name(latent_cache.dtype), remedy)
    _device(op, name, latent_cache, like)
    _check_page_size(op, latent_cache.shape[1])


def _check_page_size(op: str, page_size: int) -> None:
    if not PAGE_SIZES[0] <= page_size <= PAGE_SIZES[1]:
        fail(op, "page size", f"{PAGE_SIZES[0]} to {PAGE_SIZES[1]}", f"{page_size}", "make the pages smaller")


def _check_sizes(op: str, sizes: CacheSizes, cuda: bool, value_dim: int | None = None) -> None:
    _check_page_size(op, sizes.page_size)
    if sizes.kv_heads < 1:
        fail(op, "KV heads", "at least 1", f"{sizes.kv_heads}", "pass caches of at least one KV head")
    if value_dim is not None:
        _check_latent_dims(op, sizes.head_dim, value_dim, cuda)
        return
    if not HEAD_DIMS[0] <= sizes.head_dim <= HEAD_DIMS[1]:
        fail(op, "head dim", f"{HEAD_DIMS[0]} to {HEAD_DIMS[1]}", f"{sizes.head_dim}", "split or pad the heads")
    if cuda and sizes.head_dim % CUDA_HEAD_DIM_STEP != 0:
        expected = f"a multiple of {CUDA_HEAD_DIM_STEP} on CUDA"
        fail(op, "head dim", expected, f"{sizes.head_dim}", "pad the heads, or use a CPU")


def _check_latent_dims(op: str, latent_dim: int, value_dim: int, cuda: bool) -> None:
    """How many elements a latent has, and how many of them are its value."""
    if not VALUE_DIMS[0] <= value_dim <= VALUE_DIMS[1]:
        remedy = "values are the first elements of latents"
        fail(op, "value_dim", f"{VALUE_DIMS[0]} to {VALUE_DIMS[1]}", f"{value_dim}", remedy)
    rotary = latent_dim - value_dim
    if not ROTARY_DIMS[0] <= rotary <= ROTARY_DIMS[1]:
        expected = f"{value_dim} elements of the value and {ROTARY_DIMS[0]} to {ROTARY_DIMS[1]} rotary ones"
        fail(op, "latent size", expected, f"{latent_dim}", "a latent holds its value first, then what is rotated")
    for name, elements in (("value_dim", value_dim), ("rotary elements", rotary)):
        if cuda and elements % CUDA_LATENT_STEP != 0:
            expected = f"a multiple of {CUDA_LATENT_STEP} on CUDA"
            fail(op, name, expected, f"{elements}", "pad the projections with zeros, or use a CPU")


def _tensor(
    op: str,
    name: str,
    t: Tensor,
    dtypes: Sequence[torch.dtype],
    shape: Sequence[int | None],
    like: Tensor,
    remedy: str,
) -> None:
    """Rank, dtype, shape (None is any size) and device of an operand; ``remedy`` is what helps a wrong shape."""
    if t.dtype not in dtypes:
        expected = " or ".join(map(_name, dtypes))
        fail(op, name, f"dtype {expected}", _name(t.dtype), f"cast it with .to({dtypes[0]})")
    if not _shapes_agree(t, shape):
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        fail(op, name, f"shape [{sizes}]", f"{list(t.shape)}", remedy)
    _device(op, name, t, like)


def _shapes_agree(t: Tensor, shape: Sequence[int | None]) -> bool:
    return t.dim() == len(shape) and all(b is None or a == b for a, b in zip(t.shape, shape, strict=True))


def _device(op: str, name: str, t: Tensor, like: Tensor) -> None:
    if t.device != like.device:
        fail(op, name, f"device {like.device}", f"{t.device}", f"move it with .to({str(like.device)!r})")


def _one_of(op: str, name: str, value: str, known: Any) -> None:
    if value not in known:
        fail(op, name, f"one of {', '.join(map(repr, known))}", repr(value), "pass one of these")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------------- values


def check_values(
    *,
    num_tokens: int,
    num_pages: int,
    page_size: int,
    cu_seqlens_q: Tensor,
    context_lens: Tensor,
    page_tables: Tensor,
    valid_lens: Tensor | None = None,
    slot_mapping: Tensor | None = None,
    direct: bool = True,
    window: int = 0,
) -> None:
    """Raise ValueError naming the first request whose lengths, page ids or slots make no sense. Syncs with the device.

    ``num_tokens``: T, the rows of q; ``num_pages`` and ``page_size``: the cache's. ``direct``: whether new keys come in
    k and v, so that the page table covers cached tokens only. Page ids are looked at within a request's length; those
    behind a ``window`` (0: none), which no new token sees, may be anything. ``slot_mapping`` may hold -1 anywhere, but
    each slot of the cache at most once.
    """
    op = "check_values"
    starts, contexts = cu_seqlens_q.tolist(), context_lens.tolist()
    if starts[0] != 0:
        fail(op, "cu_seqlens_q[0]", "0", f"{starts[0]}", "the first request's rows are the first of q")
    tables = page_tables.cpu()
    valids = [None] * len(contexts) if valid_lens is None else valid_lens.tolist()
    for r, (context, valid) in enumerate(zip(contexts, valids, strict=True)):
        at, new = f"request {r}", starts[r + 1] - starts[r]
        if new < 0:
            expected, got = f"at least {starts[r]}, the value before", f"{starts[r + 1]}"
            fail(op, f"cu_seqlens_q[{r + 1}]", expected, got, f"{at} cannot have {new} new tokens: sum up the lengths")
        if starts[r + 1] > num_tokens:
            remedy = f"{at} ends past q: pad q, or drop the request"
            fail(op, f"cu_seqlens_q[{r + 1}]", f"at most {num_tokens}, the rows of q", f"{starts[r + 1]}", remedy)
        if context < 0:
            fail(op, f"context_lens[{r}]", "at least 0", f"{context}", "it counts the tokens that are cached")
        if valid is not None and not 0 <= valid <= new:
            expected = f"0 to {new}, the new tokens of {at}"
            fail(op, f"valid_lens[{r}]", expected, f"{valid}", "it counts the new tokens that are real")
        stored = context if direct else context + new
        capacity = tables.shape[1] * page_size
        if stored > capacity:
            expected = f"at most {capacity} tokens: {tables.shape[1]} pages of {page_size}"
            fail(op, f"page_tables ({at})", expected, f"{stored}", "give page_tables more columns")
        first = max(0, context - window + 1) if window else 0
        columns = range(first // page_size, -(-stored // page_size))
        ids = tables[r, columns.start : columns.stop]
        bad = ((ids < 0) | (ids >= num_pages)).nonzero()
        if len(bad) and new > 0:
            column = columns.start + int(bad[0])
            expected = f"page ids of 0 to {num_pages - 1} for its {stored} tokens"
            got = f"{int(tables[r, column])} at page_tables[{r}, {column}]"
            fail(op, f"page_tables ({at})", expected, got, "give it a page before its tokens are stored")
    if slot_mapping is not None:
        _check_slots(op, slot_mapping.cpu(), starts, num_pages * page_size)


def _check_slots(op: str, slots: Tensor, starts: list[int], capacity: int) -> None:
    def name(row: int) -> str:
        owner = next((f"request {r}" for r, end in enumerate(starts[1:]) if row < end), "padding")
        return f"slot_mapping[{row}] ({owner})"

    bad = ((slots < -1) | (slots >= capacity)).nonzero()
    if len(bad):
        row = int(bad[0])
        remedy = "a slot is page * page_size + offset"
        fail(op, name(row), f"-1, or 0 to {capacity - 1}", f"{int(slots[row])}", remedy)
    used, order = slots.sort(stable=True)
    twice = ((used[1:] == used[:-1]) & (used[1:] >= 0)).nonzero().flatten()
    if len(twice):
        row = int(order[1:][twice].min())
        earlier = int((slots == slots[row]).nonzero()[0])
        remedy = "two tokens would be stored in one place"
        fail(op, name(row), "a slot that comes once", f"{int(slots[row])}, also at row {earlier}", remedy)
    # Rows past the last request are a bucket's padding: what they hold must not be stored.
    stored = (slots[starts[-1] :] != -1).nonzero()
    if len(stored):
        row = starts[-1] + int(stored[0])
        fail(op, name(row), "-1 past the last request", f"{int(slots[row])}", "padding rows are not stored")
