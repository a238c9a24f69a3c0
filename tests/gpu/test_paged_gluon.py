"""The Hopper kernel of paged attention against an fp64 oracle, over caches that hold NaN wherever none may look."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from custom_ops.kernels.gluon import unsupported_reasons
from custom_ops.paged.schedule import ScheduleCall
from custom_ops.paged.schedule_layout import MODE
from tests.launches import attend_on_hopper as attend
from tests.launches import hopper_config, poison_outputs
from tests.paged_cases import LENGTHS, PagedCase, assert_as_exact_as_the_reference, changed, make

LENGTHS["long ragged"] = tuple((97 * i * i % 1501, 1 + 41 * i % 130, 1 + 41 * i % 130) for i in range(9))
LENGTHS["long new"] = ((0, 300, 300), (700, 300, 290), (1000, 0, 0), (2000, 260, 260), (128, 1, 1))
LENGTHS["one long"] = ((17011, 1, 1),)
LENGTHS["many"] = tuple((37 * i % 400, 1, 1) for i in range(150))
BASE = PagedCase(dtype=torch.bfloat16, heads=(8, 2), head_dim=128)
CASES = (
    BASE,
    dataclasses.replace(BASE, lengths="decode", heads=(7, 1), page_size=8),
    dataclasses.replace(BASE, lengths="ragged", direct=False, mode="block_causal", sinks=True),
    dataclasses.replace(BASE, lengths="ragged", mode="prefix_full", page_size=32),
    dataclasses.replace(BASE, lengths="ragged", mode="prefix_causal", prefix_hole=True),
    dataclasses.replace(BASE, lengths="long", mode="block_causal", block_size=32, prefix_hole=True, direct=False),
    dataclasses.replace(BASE, lengths="long ragged", window=300, softcap=20.0, sinks=True),
    dataclasses.replace(BASE, lengths="long ragged", mode="block_causal", block_size=32, page_size=64, direct=False),
    dataclasses.replace(BASE, lengths="long ragged", mode="plain", head_dim=64, heads=(4, 4), dtype=torch.float16),
    dataclasses.replace(BASE, lengths="long ragged", head_dim=256, heads=(32, 2), page_size=256),
    dataclasses.replace(BASE, lengths="long ragged", mode="cache_only", page_size=128, heads=(28, 4)),
    # New keys of several tiles; a window leaves some row tiles no cached ones.
    dataclasses.replace(BASE, lengths="long new", softcap=20.0, sinks=True),
    dataclasses.replace(BASE, lengths="long new", window=100, page_size=8),
    dataclasses.replace(BASE, lengths="long new", mode="block_causal", block_size=32, prefix_hole=True),
    dataclasses.replace(BASE, lengths="one long", direct=False, heads=(32, 8)),
    dataclasses.replace(BASE, lengths="one long", head_dim=256, sinks=True),
    dataclasses.replace(BASE, lengths="many", head_dim=64, window=100, sinks=True),
    dataclasses.replace(BASE, lengths="nothing"),
    dataclasses.replace(BASE, lengths="nobody"),
)


@pytest.fixture
def unwritten_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_outputs(monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("shape_class", ("decode", "chunk"))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_is_what_the_mask_and_the_page_table_say(
    case: PagedCase, shape_class: str, unwritten_is_nan: None
) -> None:
    call = changed(make(case, "cuda"), shape_class=shape_class)
    assert_as_exact_as_the_reference(*attend(call), call)


@pytest.mark.gpu
@pytest.mark.parametrize("shape_class", ("decode", "chunk"))
@pytest.mark.parametrize("lengths", ("long ragged", "long new"))
@pytest.mark.parametrize("programs, tolerance, mode", ((5, 99, 1), (61, 0, 0), (132, 0, 0)))
def test_results_repeat_bit_for_bit_however_items_are_dealt_out(
    programs: int, tolerance: int, mode: int, lengths: str, shape_class: str
) -> None:
    from custom_ops.kernels import paged_launch

    call = changed(make(dataclasses.replace(BASE, lengths=lengths), "cuda"), shape_class=shape_class)
    config = dataclasses.replace(hopper_config(call), programs=programs, tolerance=tolerance)
    schedule = paged_launch.schedule(ScheduleCall.of(call), config)
    before = schedule.clone()
    assert int(schedule[MODE]) == mode
    scheduled = changed(call, schedule=schedule)
    out, lse = paged_launch.attention(scheduled, config)
    assert_as_exact_as_the_reference(out, lse, call)
    for _ in range(5):
        again = paged_launch.attention(scheduled, config)
        assert torch.equal(out, again[0]) and torch.equal(lse, again[1])
    assert torch.equal(schedule, before), "attention changed the schedule"


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", ("decode", "long ragged"))
def test_results_do_not_depend_on_where_pages_lie(lengths: str) -> None:
    results = []
    for placement in (0, 1):
        torch.manual_seed(3)
        results.append(attend(make(dataclasses.replace(BASE, lengths=lengths), "cuda", placement)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
def test_any_strides_of_queries_and_new_keys_and_caches_side_by_side() -> None:
    call = make(BASE, "cuda")
    assert call.k is not None and call.v is not None
    expected = attend(call)
    qkv = torch.cat([call.q, call.k, call.v], 1)
    heads, kv_heads = call.q.shape[1], call.k.shape[1]
    both = torch.stack([call.k_cache, call.v_cache], 1)
    views = changed(
        call, q=qkv[:, :heads], k=qkv[:, heads : heads + kv_heads], v=qkv[:, heads + kv_heads :],
        k_cache=both[:, 0], v_cache=both[:, 1], page_tables=call.page_tables.mT.contiguous().mT,
    )  # fmt: skip
    odd = torch.cat([call.q, call.q], 2)[..., 1 : call.q.shape[2] + 1]
    copied = changed(call, q=call.q.mT.contiguous().mT, v=call.v.mT.contiguous().mT)
    for other in (views, copied):
        for one, exact in zip(attend(other), expected, strict=True):
            assert torch.equal(one, exact)
    assert torch.equal(attend(changed(call, q=odd))[1], attend(changed(call, q=odd.contiguous()))[1])


@pytest.mark.gpu
def test_caches_that_cannot_be_copied_from_are_refused() -> None:
    call = make(BASE, "cuda")
    apart = torch.cat([call.k_cache, call.k_cache], 3)[..., : call.k_cache.shape[3]]
    with pytest.raises(ValueError, match="k_cache.*heads without gaps.*triton_portable"):
        attend(changed(call, k_cache=apart))


@pytest.mark.gpu
def test_a_scale_of_zero_averages_what_is_seen() -> None:
    call = changed(make(BASE, "cuda"), scale=0.0)
    assert_as_exact_as_the_reference(*attend(call), call)


@pytest.mark.gpu
def test_a_page_outside_the_cache_is_not_read_and_harms_nobody_else() -> None:
    call = make(dataclasses.replace(BASE, lengths="decode"), "cuda")
    expected = attend(call)
    for wrong in (-1, 2147480000, -2147483648, call.cache_sizes.pages):
        tables = call.page_tables.clone()
        tables[0, 1] = wrong
        found = attend(changed(call, page_tables=tables))
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one[1:], other[1:])
            assert not one[0].isnan().any()
    # A table narrower than a request's length.
    found = attend(changed(call, page_tables=call.page_tables[:, :1].contiguous()))
    assert not found[0].isnan().any()


@pytest.mark.gpu
def test_a_graph_replays_with_other_lengths() -> None:
    call = make(dataclasses.replace(BASE, lengths="long ragged"), "cuda")
    expected = attend(call)
    for _ in range(2):
        attend(call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attend(call)
    lengths = call.context_lens.clone(), call.cu_seqlens_q.clone()
    graph.replay()
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    call.context_lens.zero_()
    call.cu_seqlens_q.zero_()
    graph.replay()
    assert not out.any() and bool((lse == -math.inf).all())
    call.context_lens.copy_(lengths[0])
    call.cu_seqlens_q.copy_(lengths[1])
    graph.replay()
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


def test_unsupported_reasons_name_all_that_is_wrong() -> None:
    fine: dict[str, Any] = {
        "architecture": 90, "impl": "triton_grouped", "dtype": torch.bfloat16, "cache_dtype": torch.bfloat16,
        "group": 4, "head_dim": 128, "page_size": 16, "layout": "unified",
    }  # fmt: skip
    assert unsupported_reasons(**fine) == []
    wrong: dict[str, Any] = {
        "architecture": 100, "impl": "triton", "dtype": torch.float32, "cache_dtype": torch.float16,
        "group": 17, "head_dim": 96, "page_size": 4, "layout": "distinct",
    }  # fmt: skip
    assert len(unsupported_reasons(**wrong)) == len(wrong)
    for name, value in wrong.items():
        assert unsupported_reasons(**{**fine, name: value}), name
