"""The Hopper kernel over latents against an fp64 oracle, over caches that hold NaN wherever none may look."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from custom_ops.paged.schedule import ScheduleCall
from custom_ops.paged.schedule_layout import MODE
from tests.latent_cases import LatentCase, changed, latent_case, make
from tests.launches import attend_on_hopper as attend
from tests.launches import hopper_config, poison_outputs
from tests.paged_cases import LENGTHS, assert_as_exact_as_the_reference

LENGTHS["latent long"] = ((518, 4, 4), (0, 3, 3), (700, 1, 1), (64, 2, 1), (63, 1, 1), (1111, 1, 1))
LENGTHS["latent even"] = ((300, 2, 2),) * 10
LENGTHS["latent one"] = ((3003, 1, 1),)
LENGTHS["latent chunks"] = ((130, 70, 65), (0, 33, 33), (511, 1, 1))


def deepseek(lengths: str, heads: int, **named: Any) -> LatentCase:
    named = {"dtype": torch.bfloat16, "page_size": 64} | named
    return latent_case(lengths=lengths, heads=heads, split=(512, 64), scale=192**-0.5, **named)


CASES = (
    *(deepseek("latent long", heads, direct=False) for heads in (1, 3, 16, 63, 128)),
    *(deepseek("latent long", heads) for heads in (16, 128)),
    deepseek("decode", 128, page_size=8),
    # Two blocks of 50 heads, padded to 64.
    deepseek("drafts", 100, page_size=16, direct=False),
    # The last of two blocks has a head less.
    deepseek("drafts", 127, page_size=32, dtype=torch.float16),
    deepseek("ragged", 16, mode="block_causal", prefix_hole=True),
    deepseek("ragged", 5, mode="prefix_full", page_size=128, direct=False),
    deepseek("latent long", 8, window=300, softcap=20.0),
    deepseek("latent chunks", 16, page_size=256, block_size=32, mode="block_causal"),
    deepseek("latent chunks", 128, direct=False),
    deepseek("latent one", 16, direct=False),
    deepseek("latent one", 128, mode="cache_only"),
    deepseek("nothing", 16),
    deepseek("nobody", 16),
)


@pytest.fixture
def unwritten_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_outputs(monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_is_what_the_mask_and_the_page_table_say(case: LatentCase, unwritten_is_nan: None) -> None:
    call = make(case, "cuda")
    assert_as_exact_as_the_reference(*attend(call), call)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", (16, 128))
@pytest.mark.parametrize(
    "lengths, programs, tolerance, mode",
    # Dealt; cut into two or three parts; into 47 parts, which are combined in groups.
    (("latent even", 5, 99, 1), ("latent even", 61, 0, 0), ("latent one", 66, 0, 0)),
)
def test_results_repeat_bit_for_bit_however_items_are_dealt_out(
    lengths: str, programs: int, tolerance: int, mode: int, heads: int
) -> None:
    from custom_ops.kernels import paged_launch

    call = make(deepseek(lengths, heads), "cuda")
    config = dataclasses.replace(hopper_config(call), programs=programs, tolerance=tolerance)
    schedule = paged_launch.schedule(ScheduleCall.of(call), config)
    before = schedule.clone()
    assert int(schedule[MODE]) == mode
    scheduled = changed(call, schedule=schedule)
    out, lse = paged_launch.attention(scheduled, config)
    assert_as_exact_as_the_reference(out, lse, call)
    for _ in range(20):
        again = paged_launch.attention(scheduled, config)
        assert torch.equal(out, again[0]) and torch.equal(lse, again[1])
    assert torch.equal(schedule, before), "attention changed the schedule"


@pytest.mark.gpu
def test_heads_do_not_depend_on_their_block() -> None:
    call = make(deepseek("latent long", 128), "cuda")
    out, lse = attend(call)
    for first, heads in ((0, 64), (64, 64)):
        own = changed(call, q=call.q[:, first : first + heads])
        # As many programs, so that items are split at the same keys.
        one, one_lse = attend(own, programs=hopper_config(call).programs)
        assert torch.equal(out[:, first : first + heads], one) and torch.equal(lse[:, first : first + heads], one_lse)


@pytest.mark.gpu
def test_results_do_not_depend_on_where_pages_lie() -> None:
    results = []
    for placement in (0, 1):
        torch.manual_seed(3)
        results.append(attend(make(deepseek("latent long", 16), "cuda", placement)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
def test_any_strides_of_queries_and_new_latents() -> None:
    call = make(deepseek("decode", 16), "cuda")
    assert call.k is not None
    expected = attend(call)
    both = torch.cat([call.q, call.k], 1)
    for q, latent in (
        (both[:, :16], both[:, 16]),
        (call.q.mT.contiguous().mT, call.k[:, 0].mT.contiguous().mT),
    ):
        for one, exact in zip(attend(changed(call, q=q, latent=latent)), expected, strict=True):
            assert torch.equal(one, exact)


@pytest.mark.gpu
def test_a_cache_that_cannot_be_copied_from_is_refused() -> None:
    call = make(deepseek("decode", 16), "cuda")
    cache = call.k_cache.squeeze(2)
    odd = torch.cat([cache, cache], 2)[..., 1 : cache.shape[2] + 1]
    with pytest.raises(ValueError, match="paged_latent_attention: latent_cache.*aligned.*triton_portable"):
        attend(changed(call, latent_cache=odd))
