"""``store_latent_cache`` on a CPU: every element where it belongs, nothing else touched, read back by attention."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import pairwise
from tests.latent_cases import arguments, attend, changed, latent_case, make
from tests.test_op_protocol import check, compiled
from tests.test_paged_store import assert_same_bits, random_bits, some_slots

OPS = torch.ops.lowered_attn
FACTORS = {
    "dtype": (torch.float32, torch.bfloat16, torch.float16),
    "page_size": (1, 3, 16, 256),
    "width": (1, 48, 576, 640),
    "rows": (0, 1, 11),
}


def by_definition(latent: Tensor, latent_cache: Tensor, slots: Tensor) -> Tensor:
    """What a cache holds after a store, row by row."""
    pages, page_size, _ = latent_cache.shape
    expected = latent_cache.clone()
    for row, slot in enumerate(slots.tolist()):
        if 0 <= slot < pages * page_size:
            expected[slot // page_size, slot % page_size] = latent[row]
    return expected


@pytest.mark.parametrize("row", pairwise(FACTORS), ids=lambda row: "-".join(str(v) for v in row.values()))
def test_every_latent_lies_in_its_slot_and_nothing_else_changes(row: dict[str, Any]) -> None:
    latent_cache = random_bits(torch.empty(5, row["page_size"], row["width"], dtype=row["dtype"]))
    rows = min(row["rows"], 5 * row["page_size"])
    latent = torch.randn(rows, row["width"]).to(row["dtype"])
    if rows:
        latent[-1, :3] = torch.tensor([math.nan, math.inf, -0.0])[: row["width"]]
    slots = some_slots(rows, 5 * row["page_size"])
    expected, given = by_definition(latent, latent_cache, slots), [latent.clone(), slots.clone()]
    assert OPS.store_latent_cache(latent, latent_cache, slots) is None
    assert_same_bits(latent_cache, expected)
    for t, before in zip((latent, slots), given, strict=True):
        assert_same_bits(t, before)


def test_strided_latents_and_caches() -> None:
    fused = torch.randn(6, 96 + 48)  # the query's and the latent's share of one projection
    wide = torch.zeros(4, 3, 2, 48)
    slots = torch.tensor([3, -1, 11, 0, 7, 5])
    OPS.store_latent_cache(fused[:, 96:], wide[:, :, 1], slots)
    assert_same_bits(wide[:, :, 1], by_definition(fused[:, 96:], torch.zeros(4, 3, 48), slots))
    assert torch.count_nonzero(wide[:, :, 0]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stored_latents_are_the_latents_that_attention_reads(dtype: torch.dtype) -> None:
    """New latents stored, then read through the page table, give what they give when read directly."""
    call = make(latent_case("block_causal", dtype, page_size=3, lengths="drafts"))
    given = arguments(call)
    # More pages, of which each request gets two for its new tokens.
    wide = torch.cat([given["latent_cache"], random_bits(torch.empty_like(given["latent_cache"]))])
    tables, slots = call.page_tables.clone(), torch.full((call.q.shape[0],), -1)
    tables = torch.cat([tables, torch.full((call.requests, 6), -1, dtype=torch.int32)], 1)
    free = iter(range(call.cache_sizes.pages, len(wide)))
    for r in range(call.requests):
        start, stop = call.cu_seqlens_q[r : r + 2].tolist()
        context = int(call.context_lens[r])
        for column in range(-(-context // 3), -(-(context + stop - start) // 3)):
            tables[r, column] = next(free)
        for row in range(start, stop):
            column, offset = divmod(context + row - start, 3)
            slots[row] = int(tables[r, column]) * 3 + offset
    OPS.store_latent_cache(given["latent"], wide, slots)
    cached = attend(changed(call, latent=None, latent_cache=wide, page_tables=tables))
    for a, b in zip(cached, attend(call), strict=True):
        assert torch.equal(a, b)


def test_opcheck() -> None:
    latent_cache, latent = torch.zeros(4, 3, 48).bfloat16(), torch.randn(5, 48).bfloat16()
    for rows in (5, 0):
        check(OPS.store_latent_cache.default, (latent[:rows], latent_cache, torch.tensor([3, -1, 11, 0, 7])[:rows]))
    check(OPS.store_latent_cache.default, (latent.requires_grad_(), latent_cache, torch.arange(5)))


def test_a_traced_step_stores_and_reads_what_it_stored() -> None:
    call = make(latent_case(direct=False))
    latent = torch.randn(call.q.shape[0], 48)
    slots = torch.randperm(call.cache_sizes.pages * 16)[: len(latent)]
    rest = {n: t for n, t in arguments(call).items() if n not in ("q", "latent", "latent_cache")}

    def step(q: Tensor, latent: Tensor, latent_cache: Tensor) -> Tensor:
        OPS.store_latent_cache(latent * 2, latent_cache, slots)
        return OPS.paged_latent_attention(q, None, latent_cache, **rest)[0] + 1

    before = arguments(call)["latent_cache"]
    eager, traced = before.clone(), before.clone()
    expected = step(call.q, latent, eager)
    assert torch.equal(compiled(step, backend="aot_eager")(call.q, latent, traced), expected)
    assert_same_bits(traced, eager)
    assert not torch.equal(eager.nan_to_num(), before.nan_to_num())


def test_no_gradient_passes_through_a_cache() -> None:
    latent_cache, latent = torch.zeros(2, 4, 24), torch.randn(3, 24, requires_grad=True)
    OPS.store_latent_cache(latent, latent_cache, torch.arange(3))
    assert not latent_cache.requires_grad
    assert torch.equal(latent_cache.view(-1, 24)[:3], latent)
