"""The portable paged kernels, launched as eager CUDA calls launch them, in Triton's interpreter.

In fp32 only: the interpreter's bf16 products are wrong. The oracle here shares nothing with ``custom_ops/paged`` but
the mask's expression. ``tests.paged_cases.make`` puts NaN, or page ids out of range, wherever nothing must be read.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from custom_ops.kernels import paged_launch
from custom_ops.kernels.paged_config import INTERPRETED_PROGRAMS, PagedConfig
from custom_ops.paged.call import PagedCall
from custom_ops.paged.layout import FP8, CacheSizes, empty_caches
from custom_ops.paged.masks import paged_mask
from custom_ops.paged.schedule import ScheduleCall
from custom_ops.paged.schedule_layout import (
    ENTRY_FIELDS,
    OF_REQUEST,
    PROGRAM_FIELDS,
    REQUEST,
    ScheduleLayout,
)
from tests.helpers import pairwise
from tests.launches import interpreted_config as config_of
from tests.launches import poison_outputs
from tests.paged_cases import PagedCase, changed, floors, lay_out_keys, lay_out_values, make

pytestmark = [
    # Triton 3.6's interpreter makes scalars in a way that numpy deprecates.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.runtime.interpreter"),
    # Rows that see nothing subtract -inf from -inf before that is replaced.
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
]

MODES = ("causal", "plain", "block_causal", "prefix_full", "prefix_causal", "cache_only")


@pytest.fixture(autouse=True)
def unwritten_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_outputs(monkeypatch)


def oracle(call: PagedCall) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` in fp64 from one dense matrix a request."""
    rows, heads, head_dim = call.q.shape
    out, lse = torch.zeros(rows, heads, head_dim, dtype=torch.float64), torch.full((rows, heads), -math.inf).double()
    if call.layout == "unified":
        pages = [call.k_cache.double(), call.v_cache.double()]
    else:
        pages = [call.k_cache.double().permute(0, 3, 1, 2, 4).flatten(3), call.v_cache.double().permute(0, 3, 1, 2)]
    for cache, factor in zip(pages, (call.k_scale, call.v_scale), strict=True):
        cache *= 1.0 if factor is None else factor.double()
    page_size, kv_heads = pages[0].shape[1:3]
    mask = paged_mask(call.mode, block_size=call.block_size, window=call.window or None, prefix_hole=call.prefix_hole)
    bounds = call.cu_seqlens_q.tolist()
    for r, context in enumerate(call.context_lens.tolist()):
        start, new = bounds[r], bounds[r + 1] - bounds[r]
        valid = new if call.valid_lens is None else int(call.valid_lens[r])
        if valid == 0:
            continue
        values = [torch.tensor([value]) for value in (context, valid, *(int(t[r]) for t in call.request_values))]
        named = {o.name: value for o, value in zip(mask.operands, values, strict=True)}
        position = torch.arange(context + new)
        visible = mask.dense(position[context : context + valid], position, named)[0]
        key, value = torch.zeros(2, context + new, kv_heads, head_dim, dtype=torch.float64)
        for b in visible.any(0).nonzero().flatten().tolist():
            if call.k is not None and call.v is not None and b >= context:
                key[b], value[b] = call.k[start + b - context], call.v[start + b - context]
            else:
                page = int(call.page_tables[r, b // page_size])
                key[b], value[b] = pages[0][page, b % page_size], pages[1][page, b % page_size]
        key, value = (t.repeat_interleave(heads // kv_heads, 1) for t in (key, value))
        scores = torch.einsum("qhd,khd->qhk", call.q[start : start + valid].double(), key) * call.score_scale
        if call.softcap:
            scores = call.softcap * (scores / call.softcap).tanh()
        scores = scores.masked_fill(~visible[:, None], -math.inf)
        total = scores.logsumexp(-1)
        if call.sinks is not None:
            total = torch.logaddexp(total, call.sinks.double()).masked_fill(total == -math.inf, -math.inf)
        weights = (scores - total.masked_fill(total == -math.inf, 0.0)[..., None]).exp()
        out[start : start + valid] = torch.einsum("qhk,khd->qhd", weights, value)
        lse[start : start + valid] = total
    return out, lse


def assert_right(results: tuple[Tensor, Tensor], call: PagedCall) -> None:
    exact = oracle(call)
    for actual, expected, floor in zip(results, exact, floors(call, exact), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2 * floor)


def cases() -> list[Any]:
    """Every two settings together at least once."""
    factors = {
        "lengths": ("ragged", "mixed", "decode"),
        "mode": MODES,
        "direct": (True, False),
        "layout": ("unified", "distinct"),
        "page_size": (16, 3, 1, 64),
        "heads": ((4, 1), (6, 2), (7, 1), (2, 2)),
        "head_dim": (16, 24),
        "impl": ("triton_grouped", "triton"),
        "window": (0, 6),
        "prefix_hole": (False, True),
        "softcap": (0.0, 4.0),
        "sinks": (False, True),
        "fp8": (False, True),
        "block_size": (4, 3),
        "tiling": ((16, 16, 5), (32, 16, 40), (16, 32, 3), (16, 16, 1)),
        "tolerance": (10, 0, 60),
    }
    params = []
    for row in pairwise(factors):
        tiling, tolerance = row.pop("tiling"), row.pop("tolerance")
        if row["fp8"] and row["layout"] == "distinct":
            row["head_dim"] = 16
        case = PagedCase(**row)
        changes = dict(zip(("block_m", "block_n", "programs"), tiling, strict=True), tolerance=tolerance)
        params.append(pytest.param(case, changes, id=f"{case}-m{tiling[0]}n{tiling[1]}p{tiling[2]}-{tolerance}%"))
    return params


@pytest.mark.parametrize("case, changes", cases())
def test_attention_is_what_the_mask_and_the_page_table_say(case: PagedCase, changes: dict[str, int]) -> None:
    call = make(case)
    assert_right(paged_launch.attention(call, config_of(call, **changes)), call)


@pytest.mark.parametrize("direct", (True, False))
@pytest.mark.parametrize(
    "head_dim, page_size, layout", ((64, 16, "unified"), (80, 3, "distinct"), (128, 64, "unified"))
)
def test_head_dims_of_models(head_dim: int, page_size: int, layout: str, direct: bool) -> None:
    call = make(PagedCase(head_dim=head_dim, page_size=page_size, layout=layout, direct=direct, heads=(8, 2)))
    assert_right(paged_launch.attention(call, config_of(call)), call)


@pytest.mark.parametrize("lengths", ("nothing", "nobody"))
@pytest.mark.parametrize("padding_rows", (0, 40))
def test_rows_of_nobody_are_zero(lengths: str, padding_rows: int) -> None:
    call = make(PagedCase(lengths=lengths, padding_rows=padding_rows, sinks=True))
    out, lse = paged_launch.attention(call, config_of(call))
    assert out.shape == call.q.shape and torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -math.inf))


# ---------------------------------------------------------------------- split items


def sections(made: Tensor, config: PagedConfig, call: ScheduleCall) -> tuple[ScheduleLayout, list[list[int]], list]:
    layout = config.schedule_layout(call.requests, call.num_tokens)
    assert made.shape == (layout.size,) and made.dtype == torch.int32
    entries = made[layout.entries_at : layout.programs_at].view(-1, ENTRY_FIELDS).tolist()
    return layout, entries, made[layout.programs_at : layout.counters_at].view(-1, PROGRAM_FIELDS).tolist()


@pytest.mark.parametrize(
    "case", (PagedCase(lengths="ragged"), PagedCase(lengths="mixed", direct=False, sinks=True)), ids=str
)
def test_split_items_are_whole_ones_bit_for_bit_each_time(case: PagedCase) -> None:
    call = make(case)
    whole = paged_launch.attention(call, config_of(call, programs=1))
    config = config_of(call, programs=61, tolerance=0)
    schedule_call = ScheduleCall.of(call)
    made = paged_launch.schedule(schedule_call, config)
    layout, _, programs = sections(made, config, schedule_call)
    assert any(first != program for program, (*_, first, _, _, _, _) in enumerate(programs)), "nothing was split"
    scheduled, before = changed(call, schedule=made), made.clone()
    split = [paged_launch.attention(scheduled, config) for _ in range(2)]
    assert torch.equal(made, before), "attention changed the schedule"
    assert not made[layout.counters_at :].any()
    for once, again, unsplit, floor in zip(*split, whole, floors(call, whole), strict=True):
        assert torch.equal(once, again)
        torch.testing.assert_close(once, unsplit, rtol=0, atol=2 * floor)


def test_results_do_not_depend_on_where_pages_lie() -> None:
    results = []
    for placement in (0, 1):
        torch.manual_seed(3)
        call = make(PagedCase(lengths="ragged", page_size=3), placement=placement)
        results.append(paged_launch.attention(call, config_of(call)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_any_strides() -> None:
    call = make(PagedCase(lengths="mixed", page_size=3))
    assert call.k is not None and call.v is not None
    heads, kv_heads = call.q.shape[1], call.k.shape[1]
    qkv = torch.cat([call.q, call.k, call.v], 1)
    both = torch.stack([call.k_cache, call.v_cache], 1)
    views = changed(
        call, q=qkv[:, :heads], k=qkv[:, heads : heads + kv_heads], v=qkv[:, heads + kv_heads :],
        k_cache=both[:, 0], v_cache=both[:, 1], page_tables=call.page_tables.mT.contiguous().mT,
    )  # fmt: skip
    apart = changed(
        call, q=call.q.mT.contiguous().mT, v=torch.cat([call.v, call.v], 2)[..., : call.v.shape[2]],
        v_cache=torch.cat([call.v_cache, call.v_cache], 2)[:, :, :kv_heads],
    )  # fmt: skip
    for other in (views, apart):
        assert_right(paged_launch.attention(other, config_of(other)), call)


def test_a_page_outside_the_cache_is_not_read_and_harms_nobody_else() -> None:
    call = make(PagedCase(lengths="decode", heads=(4, 2)))
    expected = paged_launch.attention(call, config_of(call))
    for wrong in (-1, 2147480000, call.cache_sizes.pages):
        tables = call.page_tables.clone()
        tables[0, 1] = wrong
        found = paged_launch.attention(changed(call, page_tables=tables), config_of(call))
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one[1:], other[1:])
            assert not one[0].isnan().any()
    # A table narrower than a request's length.
    found = paged_launch.attention(changed(call, page_tables=call.page_tables[:, :1].contiguous()), config_of(call))
    assert not found[0].isnan().any()


# ---------------------------------------------------------------------- the schedule


@pytest.mark.parametrize("seed", range(24))
def test_schedule_covers_all_units_once_in_fair_shares(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=g))

    requests, most_new = number(0, 70), (1, 5, 90)[seed % 3]
    new = torch.randint(0, most_new + 1, (requests,), generator=g)
    context = torch.randint(0, (400, 5000)[seed % 2], (requests,), generator=g)
    valid = (torch.rand(requests, generator=g) * (new + 1)).long()
    tokens = int(new.sum()) + number(1, 40)
    heads, direct, tolerance = number(1, 4), seed % 2 == 0, (0, 10, 60)[number(0, 2)]
    config = PagedConfig(
        ("triton", "gluon")[seed // 3 % 2], block_m=16, block_n=16, padded_group=(1, 4, 16)[number(0, 2)],
        items_per_entry=heads, programs=number(1, 90), tolerance=tolerance, num_warps=4, num_stages=1,
        counters_per_program=1 + seed % 2,
    )  # fmt: skip
    starts = torch.cat([torch.zeros(1, dtype=torch.long), new.cumsum(0)])
    call = ScheduleCall(
        starts.int(), context.int(), valid.int(), [], num_tokens=tokens, num_heads=heads, num_kv_heads=heads,
        head_dim=64, page_size=16, dtype=torch.float32, cache_dtype=torch.float32, direct=direct, window=seed % 4 * 50,
    )  # fmt: skip
    made = paged_launch.schedule(call, config)
    layout, entries, programs = sections(made, config, call)
    units, quantum, mode, used = made[:4].tolist()
    assert mode in ((0, 1) if config.kernel == "gluon" else (0,)) and not made[layout.counters_at :].any()

    lengths = [(int(s), int(n), int(c), int(r)) for s, n, c, r in zip(starts, new, context, valid, strict=False)]
    lengths.append((int(starts[-1]), tokens - int(starts[-1]), 0, 0))
    for entry in entries[:used]:
        assert entry[OF_REQUEST : OF_REQUEST + 8] == [*lengths[entry[REQUEST]], 0, 0, 0, 0]
    entries = [entry[:OF_REQUEST] for entry in entries]

    # Entries: every row tile of every request, in an order of its kernel's, with as many key tiles as its rows see.
    order = list(range(requests + 1))
    if config.kernel == "gluon":
        order[:requests] = sorted(range(requests), key=lambda r: -((lengths[r][2] + lengths[r][3]) // 16))
    rows = [(r, t) for r in order for t in range(-(-lengths[r][1] // config.tile_tokens))]
    assert [(request, row_tile) for _, _, request, row_tile in entries[:used]] == rows
    before = 0
    for at, key_tiles, request, row_tile in entries[:used]:
        assert at == before
        assert key_tiles == max(1, expected_tiles(lengths[request], row_tile, config, direct, call.window))
        before += heads * key_tiles
    assert before == units and quantum == max(1, -(-units // config.programs))

    if mode == 1:
        # Dealt whole, in snake order.
        shares = [0] * config.programs
        for i, key_tiles in enumerate(n for _, n, _, _ in entries[:used] for _ in range(heads)):
            turn, place = divmod(i, config.programs)
            shares[place if turn % 2 == 0 else config.programs - 1 - place] += key_tiles
        assert max(shares[0], shares[-1]) * 100 <= quantum * (100 + tolerance)
        return
    # Programs: ranges one after the other, none much above an even share; the record says who shares an item.
    items = [at + head * n for at, n, _, _ in entries[:used] for head in range(heads)]
    ends = [*items[1:], units]
    assert programs[0][0] == 0 and programs[-1][1] == units
    for p, (first, end, entry, first_program, last_program, last_of_end, _, _) in enumerate(programs):
        assert p == 0 or first == programs[p - 1][1]
        assert first <= end and (end - first) * 100 <= quantum * (100 + tolerance)
        if first == end:
            assert end == units
            continue
        assert entries[entry][0] <= first < entries[entry][0] + heads * entries[entry][1]
        item, end_item = (max(i for i, at in enumerate(items) if at <= unit) for unit in (first, end - 1))
        holders = [c for c, (x, y, *_) in enumerate(programs) if max(x, items[item]) < min(y, ends[item])]
        assert (first_program, last_program) == (holders[0], holders[-1]) and p in holders
        holders = [c for c, (x, y, *_) in enumerate(programs) if max(x, items[end_item]) < min(y, ends[end_item])]
        assert last_of_end == holders[-1] and holders == list(range(holders[0], holders[-1] + 1))


def expected_tiles(
    lengths: tuple[int, int, int, int], row_tile: int, config: PagedConfig, direct: bool, window: int
) -> int:
    """Key tiles that the rows of a causal row tile need, by listing the keys that they see."""
    _, new, context, valid = lengths
    first = row_tile * config.tile_tokens
    last = min(first + config.tile_tokens, valid) - 1
    if last < first:
        return 0
    keys = range(max(0, context + first - window + 1) if window else 0, context + last + 1)
    if direct:
        tiles = {("cached", b // config.block_n) for b in keys if b < context}
        tiles |= {("new", (b - context) // config.block_n) for b in keys if b >= context}
    else:
        tiles = {("cached", b // config.block_n) for b in keys}
    return len(tiles)


def test_whole_items_are_not_split_where_that_costs_little() -> None:
    lengths = torch.full((8,), 63, dtype=torch.int32)
    call = ScheduleCall(
        torch.arange(9, dtype=torch.int32), lengths, None, [], num_tokens=8, num_heads=4, num_kv_heads=4, head_dim=64,
        page_size=16, dtype=torch.float32, cache_dtype=torch.float32, direct=False,
    )  # fmt: skip
    # 32 items of 4 tiles for 20 programs, so even shares of 7 tiles: two whole items are 14.3% more.
    for tolerance, is_split in ((15, False), (14, True)):
        config = PagedConfig("triton", 16, 16, 1, 4, 20, tolerance, 4, 1)
        _, _, programs = sections(paged_launch.schedule(call, config), config, call)
        assert any(first % 4 for first, *_ in programs) == is_split


# ---------------------------------------------------------------------- the store


@pytest.mark.parametrize("layout", ("unified", "distinct"))
@pytest.mark.parametrize("fp8", (False, True))
@pytest.mark.parametrize("page_size, heads, head_dim", ((16, 3, 24), (3, 2, 80), (1, 9, 16)))
def test_store_writes_the_slots_and_nothing_else(
    layout: str, fp8: bool, page_size: int, heads: int, head_dim: int
) -> None:
    tokens, pages = 7, 6
    if fp8 and layout == "distinct":
        head_dim = 16
    dtype = FP8 if fp8 else torch.float32
    slots = torch.randperm(pages * page_size)[:tokens]
    slots = torch.cat([slots, slots.new_tensor([-1, pages * page_size, 2**40, -(2**40)])])
    # Values that fp8 has and scales that round nothing, and some past its end: the interpreter has its own rounding.
    k, v = torch.randn(2, len(slots), heads, 2 * head_dim).mul(100).to(FP8).float()[..., :head_dim]
    k, v = (torch.where(t.abs() < 1, 1.0, t) for t in (k, v))
    k[0, 0, :3] = torch.tensor([1e5, -1e5, math.inf])
    v[-4:] = math.nan
    scales = (torch.tensor([0.25]), torch.tensor([2.0])) if fp8 else (None, None)
    caches = empty_caches(layout, CacheSizes(pages, page_size, heads, head_dim), dtype)
    expected = torch.zeros(2, pages, page_size, heads, head_dim)
    for cache in caches:
        cache.view(torch.uint8).zero_()
    for t, slot in enumerate(slots.tolist()):
        if 0 <= slot < pages * page_size:
            for which, (x, scale) in enumerate(zip((k, v), scales, strict=True)):
                stored = x[t] if scale is None else (x[t] / scale).clamp(-448, 448)
                expected[which, slot // page_size, slot % page_size] = stored
    paged_launch.store(
        k=k, v=v, k_cache=caches[0], v_cache=caches[1], slot_mapping=slots, k_scale=scales[0], v_scale=scales[1],
        layout=layout,
    )  # fmt: skip
    for cache, pages_of, lay_out in zip(caches, expected, (lay_out_keys, lay_out_values), strict=True):
        assert torch.equal(cache.view(torch.uint8), lay_out(pages_of, layout, dtype).contiguous().view(torch.uint8))


def test_interpreted_programs_are_few() -> None:
    assert config_of(make(PagedCase())).programs == INTERPRETED_PROGRAMS
