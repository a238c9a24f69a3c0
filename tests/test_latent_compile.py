"""Compiled ops over a cache of latents on a CPU: caches stay where they are, results are eager ones, one compile."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

import lowered_attn
from inductor_passes import LIBRARY_OPTION, decisions
from inductor_passes.paged_lowering import PreferPortable
from inductor_passes.store_pieces import PIECES, StorePieces
from lowered_attn.compile import backend
from tests.test_op_protocol import check

OPS = torch.ops.lowered_attn
PAGES, PAGE_SIZE, VALUE, ROTARY, HEADS = 8, 4, 32, 16, 3
WIDTH = VALUE + ROTARY
STEPS = (
    # cu_seqlens_q, context_lens
    ((0, 2, 5), (3, 4)),
    ((0, 1, 2), (7, 0)),
    ((0, 4, 4), (0, 9)),
)
PAGE_TABLES = torch.tensor([[0, 1, 7], [2, 5, 3]], dtype=torch.int32)


def step(number: int, rows: int = 5) -> tuple[Tensor, ...]:
    """Queries, projected latents, slots, cu_seqlens_q, context_lens and page_tables of a step, padded to ``rows``."""
    starts, contexts = STEPS[number]
    torch.manual_seed(number)
    slots = torch.full((rows,), -1)
    for r, context in enumerate(contexts):
        for row in range(starts[r], starts[r + 1]):
            position = context + row - starts[r]
            slots[row] = int(PAGE_TABLES[r, position // PAGE_SIZE]) * PAGE_SIZE + position % PAGE_SIZE
    lengths = (torch.tensor(values, dtype=torch.int32) for values in (starts, contexts))
    return torch.randn(rows, HEADS, WIDTH), torch.randn(rows, WIDTH), slots, *lengths, PAGE_TABLES.clone()


class Layer(nn.Module):
    """Joins a latent, stores it, attends, and stores again."""

    def __init__(self, cache: Tensor, direct: bool = False) -> None:
        super().__init__()
        self.cache, self.direct = nn.Buffer(cache), direct

    def forward(self, q: Tensor, projected: Tensor, slots: Tensor, *lengths: Tensor) -> Tensor:
        value, rotary = projected.split([VALUE, ROTARY], 1)
        latent = torch.cat([value * torch.rsqrt(value.square().mean(-1, keepdim=True)), rotary * 2], 1)
        OPS.store_latent_cache(latent, self.cache, slots)
        out, _ = OPS.paged_latent_attention(
            q, latent if self.direct else None, self.cache, *lengths, None, [], value_dim=VALUE, scale=0.3
        )
        OPS.store_latent_cache(latent + 1, self.cache, slots)
        return out + 1


class Layers(nn.Module):
    """Two layers over caches of one allocation, or of one each."""

    def __init__(self, together: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        caches = torch.randn(2, PAGES, PAGE_SIZE, WIDTH).unbind()
        self.layers = nn.ModuleList(Layer(cache if together else cache.clone()) for cache in caches)

    def forward(self, q: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        before = self.layers[0].cache.flatten() + 1  # an old value that is still wanted after the stores
        for layer in self.layers:
            q = nn.functional.pad(layer(q, *rest), (0, ROTARY))
        return q, before, self.layers[0].cache.flatten()[:3] + 1


def assert_same(actual: nn.Module, expected: nn.Module) -> None:
    for one, other in zip(actual.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("direct", [False, True], ids=["through the cache", "direct"])
@pytest.mark.parametrize("rows", [(5, 5, 5), (5, 7, 6)], ids=["one bucket", "any rows"])
def test_steps_of_any_lengths_are_one_compile_without_breaks(direct: bool, rows: tuple[int, ...]) -> None:
    torch.compiler.reset()
    counters.clear()
    count = CompileCounterWithBackend(backend)
    eager, model = (Layer(torch.randn(PAGES, PAGE_SIZE, WIDTH, generator=torch.manual_seed(2)), direct) for _ in "ab")
    compiled = torch.compile(model, backend=count, fullgraph=True, dynamic=len(set(rows)) > 1)
    with torch.no_grad():
        for number in range(len(STEPS)):
            arguments = step(number, rows[number])
            torch.testing.assert_close(compiled(*arguments), eager(*arguments))
            assert_same(model, eager)
    assert count.frame_count == 1 and not counters["graph_break"]


@pytest.mark.parametrize("together", [True, False], ids=["one allocation", "an allocation each"])
def test_caches_are_not_copied(together: bool) -> None:
    torch.compiler.reset()
    eager, model = Layers(together), Layers(together)
    with torch.no_grad(), decisions.recording() as log:
        result, code = run_and_get_code(torch.compile(model, backend=backend, fullgraph=True), *step(0))
        torch.testing.assert_close(result, eager(*step(0)))
    assert_same(model, eager)
    body = code[0].split("def call(", 1)[1].split("def get_args", 1)[0]
    assert body.count("torch.ops.lowered_attn.store_latent_cache.default(") == 4
    assert "copy_" not in body and "clone" not in body
    assert str(2 * PAGES * PAGE_SIZE * WIDTH) not in body, "a buffer as large as the allocation"
    assert [name for name, *_ in log.graphs].count("SeparateCaches") == together


def test_explain_names_the_lowering_of_every_op() -> None:
    with torch.no_grad():
        explanation = lowered_attn.explain(Layer(torch.randn(PAGES, PAGE_SIZE, WIDTH)), *step(0))
    lowered = explanation.of_stage("lowered")
    assert [d.op for d in lowered] == ["store_latent_cache", "paged_latent_attention", "store_latent_cache"]
    assert all("the op itself: " in d.detail for d in lowered)
    assert "paged_latent_attention  node" in str(explanation)


def test_without_library_kernels_calls_are_portable() -> None:
    q, _, _, *lengths = step(0)
    cache = torch.randn(PAGES, PAGE_SIZE, WIDTH)

    def attend(q: Tensor, cache: Tensor, impl: str) -> Tensor:
        names = {"value_dim": VALUE, "scale": 0.3, "impl": impl}
        return OPS.paged_latent_attention(q, None, cache, *lengths, None, [], **names)[0]

    for impl, rewritten in (("triton_grouped", 1), ("triton", 0), ("triton_portable", 0)):
        graph = make_fx(functools.partial(attend, impl=impl))(q, cache)
        prefer = PreferPortable()
        prefer(graph.graph)
        assert prefer.rewritten == rewritten
        assert str(graph.graph).count("triton_portable") == (impl != "triton")
        torch.testing.assert_close(graph(q, cache), attend(q, cache, impl))


def test_library_kernels_do_not_matter_on_a_cpu() -> None:
    torch.compiler.reset()
    eager, model = (Layer(torch.randn(PAGES, PAGE_SIZE, WIDTH, generator=torch.manual_seed(3))) for _ in range(2))
    with torch.no_grad():
        actual = torch.compile(model, backend=backend, options={LIBRARY_OPTION: False})(*step(0))
        torch.testing.assert_close(actual, eager(*step(0)))


# ---------------------------------------------------------------------- stores in pieces


def test_pieces_are_stored_as_their_cat_is() -> None:
    pieces, slots = [torch.randn(5, n) for n in (VALUE, ROTARY)], torch.tensor([3, -1, 9, 31, 32])
    caches = [torch.randn(PAGES, PAGE_SIZE, WIDTH, generator=torch.manual_seed(4)) for _ in range(2)]
    OPS.store_latent_cache(torch.cat(pieces, 1), caches[0], slots)
    latent = OPS.store_latent_pieces(pieces, caches[1], slots)
    assert torch.equal(latent, torch.cat(pieces, 1)) and torch.equal(*caches)
    check(PIECES, (pieces, caches[0], slots))


def test_a_cpu_stores_the_cat() -> None:
    """Its op takes no pieces, and a scatter would not be faster."""
    torch.compiler.reset()
    with torch.no_grad(), decisions.recording() as log:
        torch.compile(Layer(torch.randn(PAGES, PAGE_SIZE, WIDTH)), backend=backend)(*step(0))
    assert StorePieces.__name__ not in [name for name, *_ in log.graphs]


def test_latents_that_do_not_fit_are_refused_while_tracing() -> None:
    def store(latent: Any, cache: Tensor) -> None:
        OPS.store_latent_cache(latent, cache, torch.zeros(5, dtype=torch.int64))

    torch.compiler.reset()
    with pytest.raises(Exception, match="store_latent_cache: latent: expected the cache's latent size, 48, got 47"):
        torch.compile(store, backend=backend)(torch.randn(5, WIDTH - 1), torch.randn(PAGES, PAGE_SIZE, WIDTH))
