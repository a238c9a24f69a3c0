"""Compiled paged ops on a CPU: caches stay where they are, passes change what they say, results are eager ones."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

import lowered_attn
from custom_ops.paged import LAYOUTS, CacheSizes, empty_caches
from inductor_passes import LIBRARY_OPTION, decisions
from inductor_passes.paged_lowering import PreferPortable
from lowered_attn.compile import backend

OPS = torch.ops.lowered_attn
SIZES = CacheSizes(pages=6, page_size=4, kv_heads=2, head_dim=64)
CU_SEQLENS, CONTEXT = torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([3, 4], dtype=torch.int32)
PAGES = torch.tensor([[0, 1], [2, 5]], dtype=torch.int32)
SLOTS = torch.tensor([3, -1, 9, 23, 24])
FP8 = torch.float8_e4m3fn


class Layer(nn.Module):
    """Stores twice and attends in between, through caches that lie where ``k_cache`` and ``v_cache`` do."""

    def __init__(self, k_cache: Tensor, v_cache: Tensor, layout: str = "unified") -> None:
        super().__init__()
        self.k_cache, self.v_cache, self.layout = nn.Buffer(k_cache), nn.Buffer(v_cache), layout

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        caches = self.k_cache, self.v_cache
        OPS.store_kv_cache(2 * k, v, *caches, SLOTS, layout=self.layout)
        out, _ = OPS.paged_attention(q, None, None, *caches, CU_SEQLENS, CONTEXT, PAGES, None, [], layout=self.layout)
        OPS.store_kv_cache(3 * k, v, *caches, SLOTS, layout=self.layout)
        return out + 1


class Apart(nn.Module):
    """Two layers over caches of one allocation, ``[layers, 2, pages, page_size, Hkv, D]``, or of one each."""

    def __init__(self, together: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        everything = torch.randn(2, 2, *SIZES)
        parts = [[part if together else part.clone() for part in layer] for layer in everything]
        self.layers = nn.ModuleList(Layer(*layer) for layer in parts)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        before = self.layers[0].k_cache.flatten() + 1  # an old value that is still wanted after the stores
        for layer in self.layers:
            q = layer(q, k, v)
        return q, before, self.layers[0].k_cache.flatten()[:3] + 1


def inputs() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(5, heads, SIZES.head_dim) for heads in (4, 2, 2))


def compiled(model: nn.Module, *arguments: Tensor) -> tuple[Any, str]:
    """What the compiled model returns, and the code that it calls."""
    torch.compiler.reset()
    with torch.no_grad():
        result, code = run_and_get_code(torch.compile(model, backend=backend, fullgraph=True), *arguments)
    return result, code[0].split("def call(", 1)[1].split("def get_args", 1)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, FP8], ids=["fp32", "fp8"])
def test_the_op_is_called_on_the_caches_themselves(layout: str, dtype: torch.dtype) -> None:
    caches = [cache.zero_() for cache in empty_caches(layout, SIZES, dtype)]
    eager, model = (Layer(*(cache.clone() for cache in caches), layout=layout) for _ in range(2))
    result, code = compiled(model, *inputs())
    torch.testing.assert_close(result, eager(*inputs()))
    for one, other in zip(model.buffers(), eager.buffers(), strict=True):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    assert code.count("torch.ops.lowered_attn.store_kv_cache.default(") == 2
    assert "copy_" not in code and "clone" not in code


@pytest.mark.parametrize("together", [True, False], ids=["one allocation", "an allocation each"])
def test_caches_of_one_allocation_are_not_copied(together: bool) -> None:
    eager, model = Apart(together), Apart(together)
    with decisions.recording() as log:
        result, code = compiled(model, *inputs())
    torch.testing.assert_close(result, eager(*inputs()))
    for one, other in zip(model.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(one, other)
    elements = torch.Size(SIZES).numel()
    assert str(2 * 2 * elements) not in code, "a buffer as large as the allocation"
    assert code.count("empty_strided_cpu((6, 4, 2, 64)") == 0, "a buffer as large as a cache"
    assert [name for name, *_ in log.graphs].count("SeparateCaches") == together


def test_without_library_kernels_grouped_calls_are_portable() -> None:
    def two(q: Tensor, cache: Tensor, **names: Any) -> Tensor:
        plain = OPS.paged_attention(q, None, None, cache, cache, CU_SEQLENS, CONTEXT, PAGES, None, [])[0]
        return (
            plain + OPS.paged_attention(q, None, None, cache, cache, CU_SEQLENS, CONTEXT, PAGES, None, [], **names)[0]
        )

    q, cache = inputs()[0], torch.randn(SIZES)
    for names, rewritten in (
        ({"impl": "triton_grouped"}, 2),
        ({"impl": "triton"}, 1),
        ({"impl": "triton_portable"}, 1),
    ):
        graph = make_fx(functools.partial(two, **names))(q, cache)
        prefer = PreferPortable()
        prefer(graph.graph)
        assert prefer.rewritten == rewritten
        torch.testing.assert_close(graph(q, cache), two(q, cache, **names))
        assert str(graph.graph).count("triton_portable") == 2 - (names["impl"] == "triton")


def test_library_kernels_do_not_matter_on_a_cpu() -> None:
    model = Layer(torch.randn(SIZES), torch.randn(SIZES))
    with torch.no_grad():
        expected = model(*inputs())
        torch.compiler.reset()
        actual = torch.compile(model, backend=backend, options={LIBRARY_OPTION: False})(*inputs())
    torch.testing.assert_close(actual, expected)


def test_explain_lists_paged_ops() -> None:
    with torch.no_grad():
        explanation = lowered_attn.explain(Layer(torch.randn(SIZES), torch.randn(SIZES)), *inputs())
    assert [d.op for d in explanation.of_stage("lowered")] == ["store_kv_cache", "paged_attention", "store_kv_cache"]
    assert "paged_attention  node" in str(explanation)
