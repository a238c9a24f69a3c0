"""`LatentAttention` over a paged cache: sessions against SDPA, every option against attention with keys for values.

The oracle is the readable reference of regular paged attention, in fp64, in which the latent is both key and value:
the first elements of its output are what attention over latents gives.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from custom_ops.paged.masks import MODES
from custom_ops.paged.reference import reference_paged_attention
from lowered_attn import (
    AttnMetaDataBase,
    BlockDiffusionMetaData,
    LatentAttention,
    set_debug,
    set_fetch_fn_for_attn_metadata,
    set_warming_up,
)
from lowered_attn.paged_layer import ATTN_IMPLS
from tests.serving_engine import PAGE, REQUESTS, SESSION, TOKENS, Engine, diffusion_values
from tests.serving_engine import inputs as regular_inputs
from tests.serving_engine import make as make_regular

HEADS, LATENT, ROTARY = 4, 24, 8
WIDTH = LATENT + ROTARY
SCALE = 40**-0.5


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    with torch.no_grad():
        yield
    set_fetch_fn_for_attn_metadata(None)
    set_debug(False)
    set_warming_up(False)


def make(**keywords: Any) -> LatentAttention:
    keywords = {"num_heads": HEADS, "latent_dim": LATENT, "rotary_dim": ROTARY, "scale": SCALE} | keywords
    return LatentAttention(**keywords).eval()


def attach(
    engine: Engine, attention: LatentAttention, garbage: float = float("nan"), dtype: torch.dtype = torch.float32
) -> LatentAttention:
    """Give it a cache that holds `garbage` everywhere: whatever is read before it was stored shows."""
    width = attention.latent_dim + attention.rotary_dim
    attention.latent_cache = torch.full((engine.sizes.pages, PAGE, width), garbage, dtype=dtype)
    return attention


def cache_of(attention: LatentAttention) -> Tensor:
    assert attention.latent_cache is not None
    return attention.latent_cache


def inputs(
    rows: int = TOKENS, dtype: torch.dtype = torch.float32, heads: int = HEADS, width: int = WIDTH
) -> tuple[Tensor, Tensor]:
    """q [T, H, width] and latent [T, width]; rows from `rows` on are padding and hold NaN."""
    q, latent = torch.randn(TOKENS, heads, width, dtype=dtype), torch.randn(TOKENS, width, dtype=dtype)
    q[rows:] = latent[rows:] = float("nan")
    return q, latent


def oracle(attention: LatentAttention, metadata: AttnMetaDataBase, q: Tensor, latent: Tensor) -> Tensor:
    """Out in fp64, from the cache as it is."""
    keys, cache = latent.unsqueeze(1), cache_of(attention).unsqueeze(2)
    out, _ = reference_paged_attention(
        q,
        keys,
        keys,
        cache,
        cache,
        metadata.cu_seqlens_q,
        metadata.context_lens,
        metadata.page_tables,
        metadata.valid_lens,
        metadata.request_values(),
        mode=metadata.mode,
        block_size=metadata.block_size,
        window=attention.sliding_window or 0,
        prefix_hole=metadata.prefix_hole,
        softcap=attention.softcap or 0.0,
        scale=attention.scale,
        dtype=torch.float64,
    )
    return out[..., : attention.latent_dim]


# ---------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("in_cache", [False, True])
@pytest.mark.parametrize("impl", ATTN_IMPLS)
def test_a_session_is_sdpa_over_each_history(impl: str, in_cache: bool) -> None:
    engine = Engine()
    attention = attach(engine, make(attn_impl=impl))
    histories = [torch.empty(0, WIDTH) for _ in range(REQUESTS)]
    for new in SESSION:
        metadata = engine.step(new, new_keys_in_cache=in_cache)
        q, latent = inputs(sum(new))
        out = attention(q, latent)
        assert out.shape == (TOKENS, HEADS, LATENT)
        for r, (begin, end) in enumerate(itertools.pairwise(metadata.cu_seqlens_q.tolist())):
            histories[r] = torch.cat((histories[r], latent[begin:end]))
            keys = histories[r].expand(1, HEADS, -1, -1)
            visible = torch.ones(end - begin, keys.shape[2]).tril(keys.shape[2] - (end - begin)).bool()
            query = q[begin:end].transpose(0, 1)[None]
            exact = F.scaled_dot_product_attention(query, keys, keys[..., :LATENT], visible, scale=SCALE)
            torch.testing.assert_close(out[begin:end], exact[0].transpose(0, 1))
        assert torch.equal(out[sum(new) :], torch.zeros_like(out[sum(new) :]))


@pytest.mark.parametrize("in_cache", [False, True])
@pytest.mark.parametrize("hole", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_block_diffusion_is_the_oracle(mode: str, hole: bool, in_cache: bool) -> None:
    engine = Engine()
    attention = attach(engine, make())
    for new in ([8, 4, 0, 12], [4, 4, 8, 4], [4, 0, 4, 4]):
        metadata = engine.step(
            new,
            BlockDiffusionMetaData,
            mode=mode,
            mask_prefix_hole=hole,
            block_size=4,
            new_keys_in_cache=in_cache,
            **diffusion_values(engine.rng, new, engine.lens),
        )
        q, latent = inputs(sum(new))
        exact = oracle(attention, metadata, q, latent)
        torch.testing.assert_close(attention(q, latent).double(), exact, atol=1e-5, rtol=1e-5)


OPTIONS: dict[str, dict[str, Any]] = {
    "window": {"sliding_window": 3},
    "softcap": {"softcap": 2.0},
    "all": {"scale": 0.5, "sliding_window": 6, "softcap": 3.0},
    "no rotary": {"latent_dim": 16, "rotary_dim": 0},
    "odd sizes": {"num_heads": 5, "latent_dim": 21, "rotary_dim": 10},
    **{f"{heads} heads": {"num_heads": heads} for heads in (1, 3, 16, 63, 128)},
}


@pytest.mark.parametrize("impl", ATTN_IMPLS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_are_the_oracles(options: dict[str, Any], impl: str) -> None:
    engine = Engine()
    attention = attach(engine, make(attn_impl=impl, **options))
    for new in SESSION:
        metadata = engine.step(new)
        q, latent = inputs(sum(new), heads=attention.num_heads, width=attention.latent_dim + attention.rotary_dim)
        exact = oracle(attention, metadata, q, latent)
        torch.testing.assert_close(attention(q, latent).double(), exact, atol=1e-5, rtol=1e-5)


def test_sixteen_bits() -> None:
    engine = Engine()
    attention = attach(engine, make(), dtype=torch.bfloat16)
    for new in SESSION:
        metadata = engine.step(new, new_keys_in_cache=True)
        q, latent = inputs(sum(new), torch.bfloat16)
        out = attention(q, latent)
        assert out.dtype == torch.bfloat16
        # Weights and output are rounded to 8 bits, at values of about 1.
        torch.testing.assert_close(out.double(), oracle(attention, metadata, q, latent), atol=2**-6, rtol=2**-6)


@pytest.mark.parametrize("flat", list(itertools.product([False, True], repeat=2)))
def test_heads_may_be_flat(flat: tuple[bool, bool]) -> None:
    """The output has q's rank. A latent may come with its one head."""
    engine = Engine()
    attention = attach(engine, make())
    engine.step([7, 3])
    q, latent = inputs(10)
    expected = attention(q, latent)
    out = attention(q.flatten(1) if flat[0] else q, latent.unsqueeze(1) if flat[1] else latent)
    assert out.dim() == (2 if flat[0] else 3)
    assert torch.equal(out.view(expected.shape), expected)


# ---------------------------------------------------------------------- the cache


def test_every_row_with_a_slot_is_stored_and_no_other() -> None:
    engine = Engine()
    attention = attach(engine, make(), garbage=7.0)
    metadata = engine.step([5, 3])
    metadata.slot_mapping[2] = metadata.slot_mapping[6] = -1
    expected = cache_of(attention).clone()
    q, latent = inputs(8)
    exact = oracle(attention, metadata, q, latent)
    out = attention(q, latent)
    for row, slot in enumerate(metadata.slot_mapping.tolist()):
        if slot >= 0:
            expected[slot // PAGE, slot % PAGE] = latent[row]
    assert torch.equal(cache_of(attention), expected)
    # Tokens that are not stored are seen all the same: attention takes them from the step.
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)


def test_promised_latents_are_read_where_they_were_stored() -> None:
    """Shown by a promise that is broken: what the slot of the second token held before is NaN."""
    engine = Engine()
    attention = attach(engine, make())
    for promise in (False, True):
        engine.lens = [0] * REQUESTS
        engine.step([3], new_keys_in_cache=promise).slot_mapping[1] = -1
        assert bool(attention(*inputs(3))[1:3].isnan().all()) == promise


def session(engine: Engine, garbage: float, in_cache: bool = False, **options: Any) -> list[Tensor]:
    """Outputs of a session whose inputs are always the same, on that engine's pages."""
    attention = attach(engine, make(**options), garbage)
    torch.manual_seed(3)
    outputs = []
    for new in SESSION:
        engine.step(new, new_keys_in_cache=in_cache)
        outputs.append(attention(*inputs(sum(new))))
    return outputs


@pytest.mark.parametrize("in_cache", [False, True])
def test_neither_pages_nor_what_is_unused_changes_a_bit(in_cache: bool) -> None:
    """Pages in another order, and NaN, infinity or 0 wherever nothing was stored."""
    engine = Engine()
    tables, expected = engine.tables, session(engine, 0.0, in_cache)
    for seed, garbage in ((0, float("nan")), (0, float("inf")), (1, 0.0), (2, float("nan"))):
        engine = Engine(seed=seed)
        assert torch.equal(engine.tables, tables) == (seed == 0)
        for out, other in zip(session(engine, garbage, in_cache), expected, strict=True):
            assert torch.equal(out, other)


def test_a_window_reads_no_page_behind_it() -> None:
    engine = Engine()
    attention = attach(engine, make(sliding_window=3))
    engine.step([9])
    attention(*inputs(9))
    engine.tables[0, 0] = -1  # freed
    q, latent = inputs(1)
    metadata = engine.step([1])
    exact = oracle(attention, metadata, q, latent)
    torch.testing.assert_close(attention(q, latent).double(), exact, atol=1e-5, rtol=1e-5)


def test_a_cache_is_the_engines_memory_and_no_checkpoints() -> None:
    """Parts of a larger allocation get an alias over it, one for each piece of memory."""
    first, second, pool = make(), make(), torch.zeros(2, 6, PAGE, WIDTH)
    first.latent_cache = second.latent_cache = pool[0]
    assert first.latent_cache is second.latent_cache
    assert cache_of(first).untyped_storage().nbytes() == pool[0].nbytes
    pool[0] = 3
    assert (cache_of(first) == 3).all()
    assert not first.state_dict() and [name for name, _ in first.named_buffers()] == ["latent_cache"]


# ---------------------------------------------------------------------- compiled


class Layers(torch.nn.Module):
    """Layers of one model: two over latents, one of them with a window, and one over keys and values."""

    def __init__(self, impl: str) -> None:
        super().__init__()
        self.first = make(attn_impl=impl)
        self.second = make(attn_impl=impl, sliding_window=5)
        self.regular = make_regular(attn_impl=impl)

    def forward(self, q: Tensor, latent: Tensor, heads: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        x = self.first(q, latent)
        x = self.second(q.narrow(2, 0, LATENT).add(x).repeat(1, 1, 2)[..., :WIDTH], latent)
        return torch.cat((x, self.regular(*heads)), -1)


@pytest.mark.parametrize(
    ("backend", "impl", "in_cache"),
    [
        ("aot_eager", "reference", False),
        ("inductor", "triton_grouped", True),
        ("lowered_attn", "triton_grouped", False),
        ("lowered_attn", "triton_grouped", True),
        ("lowered_attn", "triton", False),
    ],
)
def test_warm_up_and_thirty_steps_are_one_graph(backend: str, impl: str, in_cache: bool) -> None:
    """Its layout names that of keys and values, beside which latents have their own."""
    engine = Engine("unified" if in_cache else "distinct")
    model = Layers(impl)
    caches = {(layer, "latent_cache"): cache_of(attach(engine, layer)) for layer in (model.first, model.second)}
    engine.attach(model.regular)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)

    engine.step([3, 1], new_keys_in_cache=in_cache)
    engine.warm_up()
    engine.lens = [0] * REQUESTS
    set_warming_up(True)
    assert not compiled(*inputs(), regular_inputs()).any()
    assert all(cache.isnan().all() for cache in caches.values())
    set_warming_up(False)

    for _ in range(30):
        for r in range(REQUESTS):
            if engine.rng.random() < 0.2 or engine.lens[r] > 20:
                engine.lens[r] = 0
        new = [engine.rng.choice([0, 1, 1, 1, 2, 4, 8]) for _ in range(REQUESTS)]
        engine.step(new, new_keys_in_cache=in_cache)
        arguments = (*inputs(sum(new)), regular_inputs(sum(new)))
        before = {key: cache.clone() for key, cache in caches.items()}
        out = compiled(*arguments)
        after = {key: cache.clone() for key, cache in caches.items()}
        for key, cache in caches.items():
            cache.copy_(before[key])
        torch.testing.assert_close(out, model(*arguments), equal_nan=False)
        for key, cache in caches.items():
            assert torch.equal(cache.nan_to_num(99), after[key].nan_to_num(99))
            assert getattr(*key) is cache
    assert counter.frame_count == 1
    assert not counters["graph_break"]


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 0}, "num_heads: expected an int of at least 1, got 0"),
        ({"latent_dim": 0}, "latent_dim: expected an int of at least 1, got 0"),
        ({"latent_dim": 513}, "latent_dim: expected at most 512, .*got 513"),
        ({"rotary_dim": -2}, "rotary_dim: expected an int of at least 0, got -2"),
        ({"rotary_dim": 130}, "rotary_dim: expected at most 128, .*got 130"),
        ({"scale": None}, "scale: expected a finite number of at least 0, got None; pass 1 / sqrt"),
        ({"scale": float("inf")}, "scale: expected a finite number of at least 0, got inf"),
        ({"attn_impl": "flash"}, "attn_impl: expected one of 'reference', 'triton', 'triton_grouped', got 'flash'"),
        ({"sliding_window": 0}, "sliding_window: expected an int of at least 1, got 0"),
        ({"softcap": -1.0}, "softcap: expected None or a finite number above 0, got -1.0"),
    ],
)
def test_what_cannot_be_built_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"LatentAttention: {message}"):
        make(**change)


def test_a_scale_must_be_given() -> None:
    with pytest.raises(TypeError, match="scale"):
        LatentAttention(4)  # type: ignore[call-arg]


def test_calls_that_do_not_fit_are_named() -> None:
    engine = Engine()
    attention = make()
    metadata = engine.step([3])
    q, latent = inputs()
    with pytest.raises(RuntimeError, match=r"latent_cache: expected a cache, .*assign attention.latent_cache"):
        attention(q, latent)
    attach(engine, attention)
    with pytest.raises(ValueError, match=r"q: expected shape \[32, 128\] or \[32, 4, 32\], got shape \[31, 4, 32\]"):
        attention(q[:-1], latent)
    with pytest.raises(ValueError, match=r"latent: expected shape \[32, 32\] .*, got shape \[32, 24\]"):
        attention(q, latent[:, :LATENT])
    metadata.page_size = 8
    with pytest.raises(ValueError, match="latent_cache: expected pages of 8 tokens, the page_size of CausalMetaData"):
        attention(q, latent)
    metadata.page_size = PAGE
    for shape in ((5, PAGE, 1, WIDTH), (5, PAGE, LATENT)):
        attention.latent_cache = torch.zeros(shape)
        with pytest.raises(ValueError, match=r"latent_cache: expected \[pages, page_size, 32\], latent_dim \+ rotary"):
            attention(q, latent)
    attention.latent_cache = torch.zeros(5, PAGE, WIDTH, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="latent_cache: expected dtype float32, got bfloat16"):
        attention(q, latent)
    metadata.new_keys_in_cache = True
    with pytest.raises(ValueError, match="latent_cache: expected dtype float32, got bfloat16"):
        attention(q, latent)
    set_fetch_fn_for_attn_metadata(None)
    with pytest.raises(RuntimeError, match="set_fetch_fn_for_attn_metadata"):
        attention(q, latent)


def test_debug_mode_looks_into_the_cache() -> None:
    engine = Engine()
    attention = attach(engine, make())
    set_debug(True)
    engine.step([5, 1])
    attention(*inputs(6))
    engine.tables[0, 0] = 1000
    engine.step([1, 1])
    with pytest.raises(ValueError, match=r"page_tables .request 0.: expected page ids of 0 to 34 .*got 1000"):
        attention(*inputs(2))


def test_gradients_are_refused() -> None:
    engine = Engine()
    attention = attach(engine, make())
    engine.step([3])
    q, latent = inputs()
    with torch.enable_grad(), pytest.raises(RuntimeError, match="torch.no_grad"):
        attention(q.requires_grad_(), latent).sum().backward()
