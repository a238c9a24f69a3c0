"""`Attention` over a paged cache: a serving session against SDPA, every option against the reference, its messages."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

import lowered_attn
from custom_ops.paged.layout import FP8, LAYOUTS
from custom_ops.paged.masks import MODES
from lowered_attn import (
    BlockDiffusionMetaData,
    reference_torch_attention,
    set_debug,
    set_fetch_fn_for_attn_metadata,
    set_warming_up,
    triton_attention,
    triton_grouped_attention,
)
from tests.serving_engine import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    PAGE,
    REQUESTS,
    SESSION,
    TOKENS,
    Engine,
    diffusion_values,
    inputs,
    make,
    oracle,
)

IMPLS = {
    "reference": reference_torch_attention,
    "triton": triton_attention,
    "triton_grouped": triton_grouped_attention,
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    with torch.no_grad():
        yield
    set_fetch_fn_for_attn_metadata(None)
    set_debug(False)
    set_warming_up(False)


# ---------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("in_cache", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_session_is_sdpa_over_each_history(impl: str, layout: str, in_cache: bool) -> None:
    engine = Engine(layout)
    attention = engine.attach(make(attn_impl=impl))
    histories: list[list[Tensor]] = [[] for _ in range(REQUESTS)]
    for new in SESSION:
        metadata = engine.step(new, new_keys_in_cache=in_cache)
        q, k, v = inputs(sum(new))
        out = attention(q, k, v)
        assert out.shape == q.shape
        for r, (begin, end) in enumerate(itertools.pairwise(metadata.cu_seqlens_q.tolist())):
            histories[r].append(torch.stack((k[begin:end], v[begin:end])))
            keys, values = torch.cat(histories[r], 1).transpose(1, 2)
            visible = torch.ones(end - begin, keys.shape[1]).tril(keys.shape[1] - (end - begin)).bool()
            exact = F.scaled_dot_product_attention(
                q[begin:end].transpose(0, 1)[None], keys[None], values[None], visible, enable_gqa=True
            )
            torch.testing.assert_close(out[begin:end], exact[0].transpose(0, 1))
        assert torch.equal(out[sum(new) :], torch.zeros_like(out[sum(new) :]))


@pytest.mark.parametrize("flat", list(itertools.product([False, True], repeat=3)))
def test_heads_may_be_flat(flat: tuple[bool, bool, bool]) -> None:
    """Each of q, k and v on its own; the output has q's rank. Slices of one projection are not copied first."""
    engine = Engine()
    attention = engine.attach(make())
    engine.step([7, 3])
    sizes = [heads * HEAD_DIM for heads in (HEADS, KV_HEADS, KV_HEADS)]
    parts = torch.randn(TOKENS, sum(sizes)).split(sizes, 1)
    whole = [t.unflatten(1, (-1, HEAD_DIM)) for t in parts]
    expected = attention(*whole)
    out = attention(*(a if f else b for f, a, b in zip(flat, parts, whole, strict=True)))
    assert out.dim() == (2 if flat[0] else 3)
    assert torch.equal(out.view(expected.shape), expected)


@pytest.mark.parametrize("in_cache", [False, True])
@pytest.mark.parametrize("hole", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_block_diffusion_is_the_reference(mode: str, hole: bool, in_cache: bool) -> None:
    engine, rng = Engine(), random.Random(7)
    attention = engine.attach(make())
    for new in ([8, 4, 0, 12], [4, 4, 8, 4], [4, 0, 4, 4]):
        values = diffusion_values(rng, new, engine.lens)
        metadata = engine.step(
            new,
            BlockDiffusionMetaData,
            mode=mode,
            mask_prefix_hole=hole,
            block_size=4,
            new_keys_in_cache=in_cache,
            **values,
        )
        q, k, v = inputs(sum(new))
        exact, _ = oracle(attention, metadata, q, k, v)
        torch.testing.assert_close(attention(q, k, v).double(), exact, atol=1e-5, rtol=1e-5)


OPTIONS: dict[str, dict[str, Any]] = {
    "scale": {"scale": 0.3},
    "window": {"sliding_window": 3},
    "softcap": {"softcap": 2.0},
    "sinks": {"use_sinks": True},
    "all": {"scale": 0.5, "sliding_window": 6, "softcap": 3.0, "use_sinks": True},
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_are_the_references(options: dict[str, Any], impl: str) -> None:
    engine = Engine()
    attention = engine.attach(make(attn_impl=impl, **options))
    if attention.sinks is not None:
        attention.sinks.normal_()
    for new in SESSION:
        metadata = engine.step(new)
        q, k, v = inputs(sum(new))
        exact, _ = oracle(attention, metadata, q, k, v)
        torch.testing.assert_close(attention(q, k, v).double(), exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scales", [None, (0.5, 2.0)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fp8_caches(layout: str, scales: tuple[float, float] | None) -> None:
    """Cached keys are rounded, those of the step are not; the reference reads the same bits."""
    engine = Engine(layout, FP8)
    attention = engine.attach(make())
    if scales is not None:
        attention.k_scale, attention.v_scale = (torch.tensor([s]) for s in scales)
    unrounded = Engine(layout).attach(make())
    for new in SESSION:
        metadata = engine.step(new)
        set_fetch_fn_for_attn_metadata(lambda: engine.metadata)
        q, k, v = inputs(sum(new))
        exact, _ = oracle(attention, metadata, q, k, v)
        out = attention(q, k, v)
        torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)
        # 3 bits of mantissa: a value is off by at most 1/16 of itself.
        torch.testing.assert_close(out, unrounded(q, k, v), atol=0.3, rtol=0.3)


def test_sixteen_bits() -> None:
    engine = Engine(dtype=torch.bfloat16)
    attention = engine.attach(make(use_sinks=True)).to(torch.bfloat16)
    assert attention.sinks is not None and attention.sinks.dtype == torch.bfloat16
    for new in SESSION:
        metadata = engine.step(new, new_keys_in_cache=True)
        q, k, v = inputs(sum(new), torch.bfloat16)
        out = attention(q, k, v)
        attention.sinks = torch.nn.Parameter(attention.sinks.float())
        exact, _ = oracle(attention, metadata, q, k, v)
        attention.sinks = torch.nn.Parameter(attention.sinks.bfloat16())
        assert out.dtype == torch.bfloat16
        # Weights and output are rounded to 8 bits, at values of about 1.
        torch.testing.assert_close(out.double(), exact, atol=2**-6, rtol=2**-6)


def test_functions_attend_and_store_nothing() -> None:
    engine = Engine()
    attention = engine.attach(make(), garbage=0.0)
    engine.step([9, 4, 6])
    attention(*inputs(19))
    metadata = engine.step([1, 1, 4, 3])
    q, k, v = inputs(9)
    k_cache, v_cache = attention.k_cache, attention.v_cache
    assert k_cache is not None and v_cache is not None
    before = k_cache.clone(), v_cache.clone()
    exact, exact_lse = oracle(attention, metadata, q, k, v)
    for function in IMPLS.values():
        out = function(q, k, v, k_cache, v_cache, metadata)
        assert isinstance(out, Tensor)
        again, lse = function(q, k, v, k_cache, v_cache, metadata, return_lse=True)
        assert torch.equal(out, again)
        torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse.double(), exact_lse, atol=1e-5, rtol=1e-5)
        assert torch.isneginf(lse[9:]).all()
    assert torch.equal(before[0], k_cache) and torch.equal(before[1], v_cache)
    expected = attention(q, k, v)
    promise = dataclasses.replace(metadata, new_keys_in_cache=True)
    torch.testing.assert_close(triton_attention(q, None, None, k_cache, v_cache, promise), expected)


# ---------------------------------------------------------------------- the module


def test_checkpoints_hold_no_cache() -> None:
    engine = Engine()
    attention = engine.attach(make(use_sinks=True))
    attention.k_scale = torch.ones(1)
    assert list(attention.state_dict()) == ["sinks"]
    assert dict(attention.named_buffers()).keys() == {"k_cache", "v_cache", "k_scale"}
    make(use_sinks=True).load_state_dict(attention.state_dict())
    assert not make().state_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 0}, "num_heads: expected an int of at least 1, got 0"),
        ({"head_dim": 512}, "head_dim: expected at most 256, got 512"),
        ({"num_kv_heads": 3}, "num_kv_heads: expected a divisor of num_heads = 4, got 3"),
        ({"attn_impl": "flash"}, "attn_impl: expected one of 'reference', 'triton', 'triton_grouped', got 'flash'"),
        ({"sliding_window": 0}, "sliding_window: expected an int of at least 1, got 0"),
        ({"sliding_window": (4, 4)}, "sliding_window: expected an int"),
        ({"scale": -1.0}, "scale: expected None or a finite number of at least 0, got -1.0"),
        ({"softcap": 0.0}, "softcap: expected None or a finite number above 0, got 0.0"),
    ],
)
def test_what_cannot_be_built_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Attention: {message}"):
        make(**change)


def test_without_caches_the_message_says_what_to_assign() -> None:
    engine = Engine()
    engine.step([1])
    attention = make()
    with pytest.raises(RuntimeError, match="k_cache: expected a cache, got none; assign attention.k_cache"):
        attention(*inputs())
    attention.k_cache, _ = engine.caches()
    with pytest.raises(RuntimeError, match="v_cache: expected a cache, got none"):
        attention(*inputs())
    with pytest.raises(TypeError, match="k_cache"):
        attention.k_cache = [torch.zeros(1)]  # type: ignore[assignment]


def test_calls_that_do_not_fit_are_named() -> None:
    engine = Engine()
    attention = engine.attach(make())
    q, k, v = inputs()
    with pytest.raises(RuntimeError, match="set_fetch_fn_for_attn_metadata"):
        set_fetch_fn_for_attn_metadata(None)
        attention(q, k, v)
    set_fetch_fn_for_attn_metadata(lambda: engine.metadata)
    engine.step([3])
    with pytest.raises(ValueError, match=r"q: expected shape \[32, 64\] or \[32, 4, 16\], got shape \[31, 4, 16\]"):
        attention(q[:-1], k, v)
    with pytest.raises(ValueError, match=r"v: expected shape \[32, 32\] or \[32, 2, 16\], got shape \[32, 48\]"):
        attention(q, k, torch.randn(TOKENS, 48))
    assert engine.metadata is not None
    engine.metadata.page_size = 8
    with pytest.raises(ValueError, match="k_cache: expected pages of 8 tokens, the page_size of CausalMetaData, got"):
        attention(q, k, v)
    engine.metadata.page_size, engine.metadata.kv_cache_layout = PAGE, "distinct"
    with pytest.raises(ValueError, match="k_cache: expected .*'distinct'"):
        attention(q, k, v)
    engine = Engine(dtype=FP8)
    engine.attach(attention)
    metadata = engine.step([3], new_keys_in_cache=True)
    with pytest.raises(ValueError, match="new_keys_in_cache: expected False where storing rounds, got True"):
        attention(q, k, v)
    assert attention.k_cache is not None and attention.v_cache is not None
    metadata.new_keys_in_cache = False
    with pytest.raises(ValueError, match="k: expected the new keys and values"):
        triton_attention(q, None, None, attention.k_cache, attention.v_cache, metadata)
    with pytest.raises(ValueError, match="reference_torch_attention: softcap"):
        reference_torch_attention(q, k, v, attention.k_cache, attention.v_cache, metadata, softcap=-1.0)


def test_debug_mode_looks_into_the_caches() -> None:
    engine = Engine()
    attention = engine.attach(make())
    set_debug(True)
    attention(*inputs(sum(engine.step([5, 1]).new_lens.tolist())))
    engine.tables[0, 0] = 1000
    metadata = engine.step([1, 1])
    with pytest.raises(ValueError, match=r"page_tables .request 0.: expected page ids of 0 to 34 .*got 1000"):
        attention(*inputs(2))
    metadata.page_tables[0, 0], metadata.slot_mapping[0] = 0, 4000
    with pytest.raises(ValueError, match=r"slot_mapping.0. .request 0.: expected -1, or 0 to 139, got 4000"):
        attention(*inputs(2))
    windowed = engine.attach(make(sliding_window=2))
    engine.lens[0] = 10
    engine.tables[0, 0] = -1
    engine.step([1])
    windowed(*inputs(1))  # its first page is behind the window


def test_gradients_are_refused() -> None:
    engine = Engine()
    attention = engine.attach(make())
    engine.step([3])
    q, k, v = inputs()
    with torch.enable_grad(), pytest.raises(RuntimeError, match="torch.no_grad"):
        attention(q.requires_grad_(), k, v).sum().backward()


def test_names_that_users_type() -> None:
    names = {
        "Attention", "AttnMetaDataBase", "BlockDiffusionMetaData", "CausalMetaData", "fetch_attn_metadata",
        "is_warming_up", "reference_torch_attention", "reset_warming_up", "set_debug", "set_fetch_fn_for_attn_metadata",
        "set_warming_up", "triton_attention", "triton_grouped_attention",
    }  # fmt: skip
    assert names <= set(lowered_attn.__all__)
    assert all(hasattr(lowered_attn, name) for name in names)
