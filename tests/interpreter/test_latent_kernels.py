"""The portable paged kernels over a cache of latents, launched as eager CUDA calls launch them, interpreted.

In fp32 only, as in ``test_paged_kernels.py``. Held against the reference in fp64; ``tests.latent_cases.make`` puts NaN,
or page ids out of range, wherever nothing must be read.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from custom_ops.kernels import paged_launch
from custom_ops.paged.schedule import ScheduleCall
from custom_ops.paged.schedule_layout import PROGRAM_FIELDS
from tests.helpers import pairwise
from tests.latent_cases import SPLITS, LatentCase, arguments, changed, latent_case, make
from tests.launches import interpreted_config as config_of
from tests.launches import poison_outputs
from tests.paged_cases import PagedCase, assert_as_exact_as_the_reference, floors
from tests.paged_cases import make as make_paged

pytestmark = [
    # Triton 3.6's interpreter makes scalars in a way that numpy deprecates.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.runtime.interpreter"),
    # Rows that see nothing subtract -inf from -inf before that is replaced.
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
]


@pytest.fixture(autouse=True)
def unwritten_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    poison_outputs(monkeypatch)


def cases() -> list[Any]:
    """Every two settings together at least once."""
    factors = {
        "lengths": ("drafts", "mixed", "ragged", "decode"),
        "mode": ("causal", "block_causal", "plain", "prefix_full", "prefix_causal", "cache_only"),
        "direct": (True, False),
        "page_size": (16, 3, 1, 64),
        "heads": (1, 3, 16, 63),
        "split": SPLITS[1:],
        "impl": ("triton_grouped", "triton"),
        "window": (0, 6),
        "prefix_hole": (False, True),
        "softcap": (0.0, 4.0),
        "block_size": (4, 3),
        "tiling": ((16, 16, 5), (32, 16, 40), (16, 32, 3), (16, 16, 1)),
        "tolerance": (10, 0, 60),
    }
    params = []
    for row in pairwise(factors):
        tiling, tolerance = row.pop("tiling"), row.pop("tolerance")
        if row["impl"] == "triton":
            # The interpreter runs one program after the other, here one a head.
            row["heads"] = min(row["heads"], 5)
        case = latent_case(**row)
        changes = dict(zip(("block_m", "block_n", "programs"), tiling, strict=True), tolerance=tolerance)
        name = f"{case}-{case.paged.impl}-m{tiling[0]}n{tiling[1]}p{tiling[2]}-{tolerance}%"
        params.append(pytest.param(case, changes, id=name))
    return params


@pytest.mark.parametrize("case, changes", cases())
def test_attention_is_that_of_keys_whose_first_elements_are_values(case: LatentCase, changes: dict[str, int]) -> None:
    call = make(case)
    assert_as_exact_as_the_reference(*paged_launch.attention(call, config_of(call, **changes)), call)


@pytest.mark.parametrize("direct", (True, False))
def test_deepseeks_latents(direct: bool) -> None:
    sizes = {"heads": 16, "split": (512, 64), "scale": 192**-0.5, "page_size": 64}
    call = make(latent_case(**sizes, direct=direct, lengths="drafts"))
    assert_as_exact_as_the_reference(*paged_launch.attention(call, config_of(call, programs=7, tolerance=0)), call)


# ---------------------------------------------------------------------- blocks of heads


@pytest.mark.parametrize("heads, head_blocks", ((3, 2), (63, 2), (63, 4), (16, 1), (5, 4), (128, 2)))
@pytest.mark.parametrize("programs", (1, 13))
def test_heads_are_cut_into_blocks_evenly_or_not(heads: int, head_blocks: int, programs: int) -> None:
    call = make(latent_case(heads=heads, lengths="drafts", split=(32, 16)))
    config = config_of(call, head_blocks, programs=programs, tolerance=0)
    assert_as_exact_as_the_reference(*paged_launch.attention(call, config), call)


@pytest.mark.parametrize("heads, impl, head_blocks", (((48, 2), "triton_grouped", 2), ((6, 2), "triton", 3)))
@pytest.mark.parametrize("sinks", (False, True))
def test_blocks_of_heads_serve_keys_and_values_too(
    heads: tuple[int, int], impl: str, head_blocks: int, sinks: bool
) -> None:
    call = make_paged(PagedCase(heads=heads, lengths="decode", impl=impl, sinks=sinks))
    config = config_of(call, programs=9, tolerance=0)
    assert config.head_blocks == head_blocks
    assert_as_exact_as_the_reference(*paged_launch.attention(call, config), call)


# ---------------------------------------------------------------------- split items


@pytest.mark.parametrize(
    "heads, split, block_m",
    # Parts are combined a token at a time, all at once, and in place where two tiles do not fit in registers.
    ((16, (48, 16), 16), (3, (32, 0), 16), (20, (48, 16), 64), (20, (512, 64), 32)),
)
def test_split_items_are_whole_ones_bit_for_bit_each_time(heads: int, split: tuple[int, int], block_m: int) -> None:
    call = make(latent_case(heads=heads, split=split, scale=192**-0.5, lengths="drafts"))
    changes = {"head_blocks": 2, "block_m": block_m, "tolerance": 0}
    whole = paged_launch.attention(call, config_of(call, programs=1, **changes))
    assert_as_exact_as_the_reference(*whole, call)
    config = config_of(call, programs=19, **changes)
    made = paged_launch.schedule(ScheduleCall.of(call), config)
    layout = config.schedule_layout(call.requests, call.q.shape[0])
    counters = made[layout.counters_at :]
    assert len(counters) >= 2 * config.programs and not counters.any()
    programs = made[layout.programs_at : layout.counters_at].view(-1, PROGRAM_FIELDS)
    assert (programs[:, 3] != torch.arange(config.programs)).any(), "nothing was split"
    scheduled, before = changed(call, schedule=made), made.clone()
    split_up = [paged_launch.attention(scheduled, config) for _ in range(2)]
    assert torch.equal(made, before), "attention changed the schedule"
    for once, again, unsplit, floor in zip(*split_up, whole, floors(call, whole), strict=True):
        assert torch.equal(once, again)
        torch.testing.assert_close(once, unsplit, rtol=0, atol=2 * floor)


# ---------------------------------------------------------------------- what is not read


@pytest.mark.parametrize("lengths", ("nothing", "nobody"))
def test_rows_of_nobody_are_zero(lengths: str) -> None:
    call = make(latent_case(lengths=lengths, padding_rows=20))
    out, lse = paged_launch.attention(call, config_of(call))
    assert out.shape == (*call.q.shape[:2], call.out_dim) and torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -math.inf))


def test_a_page_outside_the_cache_is_not_read_and_harms_nobody_else() -> None:
    call = make(latent_case(lengths="decode", heads=20))
    expected = paged_launch.attention(call, config_of(call))
    for wrong in (-1, 2147480000, call.cache_sizes.pages):
        tables = call.page_tables.clone()
        tables[0, 1] = wrong
        found = paged_launch.attention(changed(call, page_tables=tables), config_of(call))
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one[1:], other[1:])
            assert not one[0].isnan().any()


def test_any_strides() -> None:
    call = make(latent_case(lengths="mixed", page_size=3))
    given = arguments(call)
    q, latent, cache = given["q"], given["latent"], given["latent_cache"]
    together = torch.cat([q.flatten(1), latent], 1)
    width = q[0].numel()
    views = changed(
        call, q=together[:, :width].view(q.shape), latent=together[:, width:],
        latent_cache=torch.cat([cache, cache.roll(1)], 2)[..., : cache.shape[2]],
        page_tables=call.page_tables.mT.contiguous().mT,
    )  # fmt: skip
    apart = changed(call, q=q.mT.contiguous().mT, latent=latent.mT.contiguous().mT)
    for other in (views, apart):
        assert_as_exact_as_the_reference(*paged_launch.attention(other, config_of(other)), call)


# ---------------------------------------------------------------------- the store


@pytest.mark.parametrize("page_size, dim", ((16, 576), (3, 48), (1, 80)))
def test_store_writes_the_slots_and_nothing_else(page_size: int, dim: int) -> None:
    tokens, pages = 7, 6
    slots = torch.randperm(pages * page_size)[: min(tokens, pages * page_size)]
    stored = len(slots)
    slots = torch.cat([slots, slots.new_tensor([-1, pages * page_size, 2**40, -(2**40)])])
    latent = torch.randn(len(slots), dim + 5)[:, :dim]
    latent[stored:] = math.nan
    cache = torch.zeros(pages, page_size, dim)
    expected = cache.clone()
    expected.view(-1, dim)[slots[:stored]] = latent[:stored]
    paged_launch.store_latent(latent=latent, latent_cache=cache, slot_mapping=slots)
    assert torch.equal(cache, expected)
    # A slice of a pool of layers, and columns apart.
    pool = torch.zeros(2, pages, page_size, dim)
    paged_launch.store_latent(latent=latent.mT.contiguous().mT, latent_cache=pool[1], slot_mapping=slots)
    assert torch.equal(pool[1], expected) and not pool[0].any()


def test_no_tokens_store_nothing() -> None:
    cache = torch.zeros(2, 4, 32)
    slots = torch.empty(0, dtype=torch.int64)
    paged_launch.store_latent(latent=torch.empty(0, 32), latent_cache=cache, slot_mapping=slots)
    assert not cache.any()
