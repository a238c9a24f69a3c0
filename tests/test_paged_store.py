"""``store_kv_cache`` on a CPU: every element where its layout says, nothing else touched, fp8 by its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from custom_ops.paged.layout import FP8, LAYOUTS, CacheSizes, empty_caches
from tests.helpers import pairwise
from tests.paged_cases import PagedCase, attend, changed, make
from tests.test_op_protocol import check, compiled

OPS = torch.ops.lowered_attn
on_layouts = pytest.mark.parametrize("layout", tuple(LAYOUTS))
FACTORS = {
    "layout": tuple(LAYOUTS),
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "cache": ("same", "fp8", "scaled fp8"),
    "page_size": (1, 3, 16, 256),
    "kv_heads": (1, 2, 7),
    "head_dim": (16, 64, 112),
    "rows": (0, 1, 11),
}


def random_bits(t: Tensor) -> Tensor:
    """``t`` with random bytes in it, NaN among them."""
    t.view(torch.uint8).random_(0, 256)
    return t


def some_slots(rows: int, capacity: int) -> Tensor:
    """int64 ``[rows]``, no slot twice; every third is none of the cache's: -1, one past it, far past it, far below."""
    slots = torch.randperm(capacity + rows)[:rows]
    for i, outside in zip(range(0, rows, 3), (-1, capacity, 2**40, -(2**40)), strict=False):
        slots[i] = outside
    return slots


def by_definition(new: Tensor, cache: Tensor, slots: Tensor, layout: str, keys: bool, scale: Tensor | None) -> Tensor:
    """What a cache holds after a store, element by element."""
    distinct = layout == "distinct"
    page_size = cache.shape[(3 if distinct else 1)]
    x = 16 // cache.dtype.itemsize
    expected = cache.clone()
    if cache.dtype == FP8:
        new = (new.float() if scale is None else new.float() / scale).clamp(-448, 448).to(FP8)
    # Compared and copied as bytes: NaN is not NaN, and torch indexes no fp8.
    width = cache.dtype.itemsize
    to, source = (t.view(torch.uint8).unflatten(-1, (-1, width)) for t in (expected, new.contiguous()))
    for row, slot in enumerate(slots.tolist()):
        if not 0 <= slot < cache.shape[0] * page_size:
            continue
        page, offset = divmod(slot, page_size)
        for d in range(new.shape[2]):
            if not distinct:
                to[page, offset, :, d] = source[row, :, d]
            elif keys:
                to[page, :, d // x, offset, d % x] = source[row, :, d]
            else:
                to[page, :, d, offset] = source[row, :, d]
    return expected


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype and a.shape == b.shape
    assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("row", pairwise(FACTORS), ids=lambda row: "-".join(str(v) for v in row.values()))
def test_every_element_lies_where_its_layout_says_and_no_other_changes(row: dict) -> None:
    sizes = CacheSizes(5, row["page_size"], row["kv_heads"], row["head_dim"])
    dtype = row["dtype"] if row["cache"] == "same" else FP8
    k_cache, v_cache = (random_bits(t) for t in empty_caches(row["layout"], sizes, dtype))
    rows = min(row["rows"], 5 * row["page_size"])
    k, v = (torch.randn(rows, row["kv_heads"], row["head_dim"]).to(row["dtype"]) for _ in range(2))
    if rows:
        k[-1, 0, :3] = torch.tensor([math.nan, math.inf, -0.0])
    slots = some_slots(rows, 5 * row["page_size"])
    k_scale, v_scale = (torch.tensor([s]) if row["cache"] == "scaled fp8" else None for s in (0.3, 7.0))
    expected = (
        by_definition(k, k_cache, slots, row["layout"], True, k_scale),
        by_definition(v, v_cache, slots, row["layout"], False, v_scale),
    )
    given = [t.clone() for t in (k, v, slots)]
    OPS.store_kv_cache(k, v, k_cache, v_cache, slots, k_scale, v_scale, layout=row["layout"])
    for cache, wanted in zip((k_cache, v_cache), expected, strict=True):
        assert_same_bits(cache, wanted)
    for t, before in zip((k, v, slots), given, strict=True):
        assert_same_bits(t, before)


def test_fp8_rounds_to_nearest_even_and_saturates() -> None:
    # e4m3 keeps 3 bits of mantissa: between 16 and 18 lies a tie. The least positive value is 2**-9.
    given = [16.9, 17.0, 17.1, 19.0, 448.0, 464.0, 1e6, -math.inf, 2.0**-9, 2.0**-10, 3 * 2.0**-10, -0.0]
    stored = [16.0, 16.0, 18.0, 20.0, 448.0, 448.0, 448.0, -448.0, 2.0**-9, 0.0, 2.0**-8, -0.0]
    caches = empty_caches("unified", CacheSizes(1, 1, 1, len(given)), FP8)
    for scale in (None, torch.tensor([1.0]), torch.tensor([4.0])):
        new = torch.tensor(given)[None, None] * (1 if scale is None else scale)
        OPS.store_kv_cache(new, new, *caches, torch.tensor([0]), scale, scale)
        for cache in caches:
            assert cache.float().flatten().tolist() == stored
    new = torch.full((1, 1, len(given)), math.nan)
    OPS.store_kv_cache(new, new, *caches, torch.tensor([0]))
    assert all(cache.float().isnan().all() for cache in caches)


@on_layouts
def test_strided_keys_and_caches(layout: str) -> None:
    fused = torch.randn(6, 4 * 2 * 32)  # q, k and v of one projection
    _, k, v = (t.unflatten(1, (-1, 32)) for t in fused.split([4 * 32, 2 * 32, 2 * 32], 1))
    sizes = CacheSizes(4, 3, 2, 32)
    both = [t.new_zeros(2, *t.shape) for t in empty_caches(layout, sizes, torch.float32)]
    slots = torch.tensor([3, -1, 11, 0, 7, 5])
    views = [t[1] for t in both]
    OPS.store_kv_cache(k, v, *views, slots, layout=layout)
    for view, new, keys in zip(views, (k, v), (True, False), strict=True):
        assert_same_bits(view, by_definition(new, torch.zeros_like(view), slots, layout, keys, None))
    assert all(torch.count_nonzero(t[0]) == 0 for t in both)


@pytest.mark.parametrize("fp8", [False, True], ids=["same", "fp8"])
@on_layouts
def test_stored_keys_are_the_keys_that_attention_reads(layout: str, fp8: bool) -> None:
    """New keys stored, then read through the page table, give what they give when read directly."""
    call = make(PagedCase("block_causal", fp8=fp8, layout=layout, page_size=3, lengths="mixed", head_dim=32))
    if fp8:  # what an fp8 cache can hold
        rounded = [(t / s).to(FP8).float() * s for t, s in ((call.k, call.k_scale), (call.v, call.v_scale))]
        call = changed(call, k=rounded[0], v=rounded[1])
    direct = attend(call)
    # More pages, of which each request gets two for its new tokens.
    wide = [torch.cat([t, random_bits(torch.empty_like(t))]) for t in (call.k_cache, call.v_cache)]
    tables, slots = call.page_tables.clone(), torch.full((call.q.shape[0],), -1)
    tables = torch.cat([tables, torch.full((call.requests, 6), -1, dtype=torch.int32)], 1)
    free = iter(range(call.cache_sizes.pages, wide[0].shape[0]))
    for r in range(call.requests):
        start, stop = call.cu_seqlens_q[r : r + 2].tolist()
        context = int(call.context_lens[r])
        for column in range(-(-context // 3), -(-(context + stop - start) // 3)):
            tables[r, column] = next(free)
        for row in range(start, stop):
            column, offset = divmod(context + row - start, 3)
            slots[row] = int(tables[r, column]) * 3 + offset
    OPS.store_kv_cache(call.k, call.v, *wide, slots, call.k_scale, call.v_scale, layout=layout)
    cached = attend(changed(call, k=None, v=None, k_cache=wide[0], v_cache=wide[1], page_tables=tables))
    for a, b in zip(cached, direct, strict=True):
        assert torch.equal(a, b)


@on_layouts
def test_opcheck(layout: str) -> None:
    caches = [t.zero_() for t in empty_caches(layout, CacheSizes(4, 3, 2, 32), torch.bfloat16)]
    k, v = (torch.randn(5, 2, 32).bfloat16() for _ in range(2))
    for rows in (5, 0):
        slots = torch.tensor([3, -1, 11, 0, 7])[:rows]
        check(OPS.store_kv_cache.default, (k[:rows], v[:rows], *caches, slots), {"layout": layout})
    k.requires_grad_()
    check(OPS.store_kv_cache.default, (k, v, *caches, torch.arange(5)), {"layout": layout})


@pytest.mark.parametrize("fp8", [False, True], ids=["same", "fp8"])
def test_a_traced_step_stores_and_reads_what_it_stored(fp8: bool) -> None:
    call = make(PagedCase("causal", fp8=fp8, direct=False, lengths="mixed", head_dim=32))
    k, v = (torch.randn(call.q.shape[0], 2, 32) for _ in range(2))
    slots = torch.randperm(call.cache_sizes.pages * 16)[: len(k)]
    rest = {n: t for n, t in vars(call).items() if n not in ("q", "k", "v", "k_cache", "v_cache")}

    def step(q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        OPS.store_kv_cache(k * 2, v, k_cache, v_cache, slots, call.k_scale, call.v_scale)
        return OPS.paged_attention(q, None, None, k_cache, v_cache, **rest)[0] + 1

    eager_caches, traced_caches = ([call.k_cache.clone(), call.v_cache.clone()] for _ in range(2))
    expected = step(call.q, k, v, *eager_caches)
    assert torch.equal(compiled(step, backend="aot_eager")(call.q, k, v, *traced_caches), expected)
    for a, b in zip(traced_caches, eager_caches, strict=True):
        assert_same_bits(a, b)


def test_no_gradient_passes_through_a_cache() -> None:
    caches = empty_caches("unified", CacheSizes(2, 4, 1, 8), torch.float32)
    k, v = (torch.randn(3, 1, 8, requires_grad=True) for _ in range(2))
    OPS.store_kv_cache(k, v, *caches, torch.arange(3))
    assert not any(t.requires_grad for t in caches)
    assert torch.equal(caches[0].view(-1, 1, 8)[:3], k)
