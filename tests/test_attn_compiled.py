"""`Attention` compiled: one graph for all steps of a bucket, caches that are never copied."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from custom_ops.paged.layout import FP8
from lowered_attn import (
    set_debug,
    set_fetch_fn_for_attn_metadata,
    set_warming_up,
)
from tests.serving_engine import HEAD_DIM, HEADS, KV_HEADS, PAGE, REQUESTS, SESSION, Engine, inputs, make, oracle


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    with torch.no_grad():
        yield
    set_fetch_fn_for_attn_metadata(None)
    set_debug(False)
    set_warming_up(False)


def random_step(engine: Engine, in_cache: bool = False) -> int:
    """Random new lengths, requests that end and start again; the number of real rows."""
    for r in range(REQUESTS):
        if engine.rng.random() < 0.2 or engine.lens[r] > 20:
            engine.lens[r] = 0
    new = [engine.rng.choice([0, 1, 1, 1, 4, 8]) for _ in range(REQUESTS)]
    engine.step(new, new_keys_in_cache=in_cache)
    return sum(new)


class TwoLayers(torch.nn.Module):
    """Enough of a model for two layers to share a graph."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first = make(**options)
        self.second = make(**options, sliding_window=5)
        self.register_buffer("mix", torch.randn(HEAD_DIM, HEAD_DIM))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = self.first(q, k, v)
        return self.second(x.view(-1, HEADS, HEAD_DIM) @ self.mix, k, v)


@pytest.mark.parametrize("in_cache", [False, True])
@pytest.mark.parametrize("impl", ["reference", "triton_grouped"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor", "lowered_attn"])
def test_warm_up_and_twenty_steps_are_one_graph(backend: str, impl: str, in_cache: bool) -> None:
    engine = Engine()
    model = TwoLayers(attn_impl=impl)
    layers = [model.first, model.second]
    for layer in layers:
        engine.attach(layer)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)

    random_step(engine, in_cache)
    engine.warm_up()
    engine.lens = [0] * REQUESTS
    set_warming_up(True)
    q, k, v = (t.flatten(1) for t in inputs())
    assert not compiled(q, k, v).any()
    assert all(layer.k_cache.isnan().all() for layer in layers)  # type: ignore[union-attr]
    set_warming_up(False)

    addresses = [layer.k_cache.data_ptr() for layer in layers]  # type: ignore[union-attr]
    for _ in range(20):
        rows = random_step(engine, in_cache)
        q, k, v = (t.flatten(1) for t in inputs(rows))
        before = [(layer.k_cache.clone(), layer.v_cache.clone()) for layer in layers]  # type: ignore[union-attr]
        out = compiled(q, k, v)
        after = [(layer.k_cache, layer.v_cache) for layer in layers]
        for layer, caches in zip(layers, before, strict=True):
            layer.k_cache, layer.v_cache = caches
        torch.testing.assert_close(out, model(q, k, v), equal_nan=False)
        for layer, caches in zip(layers, after, strict=True):
            for mine, other in zip(caches, (layer.k_cache, layer.v_cache), strict=True):
                torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)
            layer.k_cache, layer.v_cache = caches
    assert counter.frame_count == 1
    assert not counters["graph_break"]
    assert [layer.k_cache.data_ptr() for layer in layers] == addresses  # type: ignore[union-attr]


@pytest.mark.parametrize(("dynamic", "compilations"), [(False, 4), (None, 3), (True, 2)])
def test_buckets(dynamic: bool | None, compilations: int) -> None:
    """Static: once each. Dynamic: once for decode shapes and once for chunks, after the first that was static."""
    engine = Engine()
    attention = engine.attach(make())
    counter = CompileCounterWithBackend("lowered_attn")
    compiled = torch.compile(attention, backend=counter, fullgraph=True, dynamic=dynamic)
    for engine.tokens in (20, 40, 20, 72, 24, 40, 72, 20, 24):
        engine.lens = [0] * REQUESTS
        engine.step([3, 1, 5])
        q, k, v = inputs(9, tokens=engine.tokens)
        torch.testing.assert_close(compiled(q, k, v), attention(q, k, v))
    assert counter.frame_count <= compilations


def test_caches_that_are_replaced_after_compiling() -> None:
    """The engine may replace caches: the same shape recompiles nothing, another number of pages does."""
    engine = Engine()
    attention = engine.attach(make())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention, backend=counter, fullgraph=True)
    for pages in (35, 35, 35, 50):
        engine.sizes = engine.sizes._replace(pages=pages)
        engine.attach(attention)
        engine.lens = [0] * REQUESTS
        for new in SESSION:
            metadata = engine.step(new)
            q, k, v = inputs(sum(new))
            exact, _ = oracle(attention, metadata, q, k, v)
            torch.testing.assert_close(compiled(q, k, v).double(), exact, atol=1e-5, rtol=1e-5)
        if pages == 35:
            assert counter.frame_count == 1


def test_caches_have_static_addresses() -> None:
    """As Dynamo marks them: a mutated input that is not static would skip CUDA graphs."""
    engine = Engine()
    attention = engine.attach(make())
    engine.step([3, 1, 5])
    static: list[int] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable:
        caches = (attention.k_cache, attention.v_cache)
        named = [n for n in gm.graph.find_nodes(op="placeholder") if "cache" in n.name]
        static.extend("tensor_dict" in n.meta and "_dynamo_static_input_type" in n.meta["tensor_dict"] for n in named)
        assert all(hasattr(c, "_dynamo_static_input_type") for c in caches)
        return gm.forward

    torch.compile(attention, backend=backend, fullgraph=True)(*inputs(9))
    assert static == [True, True]


@pytest.mark.parametrize("dtype", [torch.float32, FP8])
@pytest.mark.parametrize("backend", ["lowered_attn", "inductor"])
def test_views_of_one_pool_are_not_copied(backend: str, dtype: torch.dtype) -> None:
    """All caches of a model as views of one allocation, as engines often have them: mutation stays in place."""
    engine = Engine(dtype=dtype)
    model, eager = TwoLayers(), TwoLayers()
    eager.load_state_dict(model.state_dict())
    pool = torch.zeros(2, 2, *engine.sizes).to(dtype)
    for i, (layer, other) in enumerate(zip((model.first, model.second), (eager.first, eager.second), strict=True)):
        layer.k_cache, layer.v_cache = pool[i]
        engine.attach(other, garbage=0.0)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    engine.step([1])
    engine.lens = [0] * REQUESTS
    # The cached code of caches with storages of their own would be taken for these too.
    with torch._inductor.config.patch(force_disable_caches=True):
        _, (code,) = run_and_get_code(compiled, *inputs(1))
    assert "store_kv_cache" in code
    body = code[code.index("def call(") : code.index("def benchmark")]
    assert not re.search(rf"clone|copy_|as_strided|empty_strided\w*\(\({engine.sizes.pages},", body)
    for new in SESSION:
        engine.step(new)
        q, k, v = inputs(sum(new))
        torch.testing.assert_close(compiled(q, k, v), eager(q, k, v))
    for cache, (layer, name) in zip(
        pool.flatten(0, 1), itertools.product((eager.first, eager.second), ("k_cache", "v_cache")), strict=True
    ):
        torch.testing.assert_close(cache.float(), getattr(layer, name).float(), rtol=0, atol=0)


def test_a_cache_is_the_engines_memory() -> None:
    """Whole tensors are kept; parts of one get an alias, one for each piece of memory, which keeps it alive."""
    sizes = (6, PAGE, KV_HEADS, HEAD_DIM)
    first, second, whole, pool = make(), make(), torch.zeros(sizes), torch.zeros(2, *sizes)
    first.k_cache = second.k_cache = whole
    assert first.k_cache is second.k_cache is whole
    first.k_cache, second.k_cache, first.v_cache = pool[0], pool[0], pool[1]
    assert first.k_cache is second.k_cache
    assert first.k_cache.untyped_storage().data_ptr() == pool.data_ptr()
    pool[1] = 3
    assert (first.v_cache == 3).all()
    del pool
    assert (first.v_cache == 3).all()
    strided = torch.arange(6 * 2 * PAGE * KV_HEADS * HEAD_DIM).float().view(6, 2, PAGE, KV_HEADS, HEAD_DIM)
    first.k_cache = strided[:, 1]
    assert first.k_cache.stride() == strided[:, 1].stride() and torch.equal(first.k_cache, strided[:, 1])
    first.k_cache = None
    first.k_cache = torch.zeros(2, *sizes, device="meta")[1]
    assert first.k_cache.is_meta


def test_changing_the_warm_up_switch_recompiles_nothing() -> None:
    engine = Engine()
    attention = engine.attach(make())
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attention, backend=counter, fullgraph=True)
    for value in (True, False, True, False):
        set_warming_up(value)
        engine.step([1, 2])
        compiled(*inputs(3))
    assert counter.frame_count == 1
