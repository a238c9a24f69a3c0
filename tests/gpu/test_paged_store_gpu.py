"""Compiled code around a paged cache on a real GPU: the fused store, attention's template, CUDA graphs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from custom_ops.paged import LAYOUTS, CacheSizes, empty_caches
from custom_ops.paged.call import PagedCall
from inductor_passes import LIBRARY_OPTION, decisions
from lowered_attn.compile import backend
from tests.paged_cases import PagedCase, assert_as_exact_as_the_reference, make

pytestmark = pytest.mark.gpu

OPS = torch.ops.lowered_attn
FP8 = torch.float8_e4m3fn
HEADS, KV_HEADS, DIM, PAGES = 8, 2, 128, 12
on_layouts = pytest.mark.parametrize("layout", LAYOUTS)
on_caches = pytest.mark.parametrize("cache_dtype", [torch.bfloat16, FP8], ids=["bf16", "fp8"])
on_page_sizes = pytest.mark.parametrize("page_size", [1, 16, 24])


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch.compiler.reset()


def compiled(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(fn, backend=backend, fullgraph=True, dynamic=False, **options)


def norm_and_rope(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * weight
    left, right = wide.chunk(2, -1)
    return (wide * cos + torch.cat([-right, left], -1) * sin).to(x.dtype)


class Store(nn.Module):
    """Norm and RoPE of q and k where there are weights, and the stores, into caches full of NaN."""

    def __init__(self, layout: str, cache_dtype: torch.dtype, page_size: int, norms: bool) -> None:
        super().__init__()
        caches = empty_caches(layout, CacheSizes(PAGES, page_size, KV_HEADS, DIM), cache_dtype, "cuda")
        self.k_cache, self.v_cache = (nn.Buffer(c.copy_(torch.full(c.shape, torch.nan))) for c in caches)
        self.scale = nn.Buffer(torch.tensor([0.37], device="cuda")) if cache_dtype == FP8 else None
        self.weight = nn.Buffer(1 + 0.1 * torch.randn(DIM, device="cuda")) if norms else None
        self.layout, self.slots = layout, PAGES * page_size

    def forward(self, projected: Tensor, cos: Tensor, sin: Tensor, slots: Tensor) -> Tensor:
        q, k, v = projected.unflatten(-1, (-1, DIM)).split([HEADS, KV_HEADS, KV_HEADS], 1)
        if self.weight is None:
            q, k = q * 2, k * 2  # exact
        else:
            q, k = (norm_and_rope(x, self.weight, cos, sin) for x in (q, k))
        OPS.store_kv_cache(k, v, self.k_cache, self.v_cache, slots, self.scale, self.scale, layout=self.layout)
        return q

    def inputs(self, rows: int = 67) -> tuple[Tensor, ...]:
        """Rows of which some have slots below 0 or past the cache, values beyond fp8's range among them."""
        torch.manual_seed(0)
        projected = 3 * torch.randn(rows, (HEADS + 2 * KV_HEADS) * DIM, dtype=torch.bfloat16, device="cuda")
        projected[::5] *= 100
        angles = torch.rand(rows, 1, DIM, device="cuda") * 6.28
        slots = torch.full((rows,), -1, device="cuda")
        kept = min(rows, self.slots) // 2
        slots[:kept] = torch.randperm(self.slots, device="cuda")[:kept]
        slots[kept : kept + 4] = torch.tensor([self.slots, 2**40, -(2**40), -self.slots], device="cuda")
        slots = slots[torch.randperm(rows, device="cuda")]
        return projected, angles.cos(), angles.sin(), slots

    def caches(self) -> tuple[Tensor, Tensor]:
        return self.k_cache, self.v_cache


def bits(t: Tensor) -> Tensor:
    return t.view(torch.int16 if t.element_size() == 2 else torch.int8)


@on_layouts
@on_caches
@on_page_sizes
def test_the_fused_store_writes_the_bits_of_the_eager_one(
    layout: str, cache_dtype: torch.dtype, page_size: int
) -> None:
    """Where k and v are exact; slots of -1 and past the cache leave every NaN where it was."""
    eager, fused = (Store(layout, cache_dtype, page_size, norms=False) for _ in range(2))
    arguments = eager.inputs()
    with torch.no_grad():
        expected = eager(*arguments)
        actual, code = run_and_get_code(compiled(fused), *arguments)
    assert "torch.ops.lowered_attn" not in code[0]
    assert torch.equal(actual, expected)
    for one, other in zip(fused.caches(), eager.caches(), strict=True):
        assert torch.equal(bits(one), bits(other))
        assert one.float().isnan().any() and not one.float().isnan().all()


@on_layouts
@on_caches
def test_norm_rope_and_stores_are_one_launch_and_right(layout: str, cache_dtype: torch.dtype) -> None:
    eager, fused = (Store(layout, cache_dtype, 16, norms=True) for _ in range(2))
    fused.weight = eager.weight
    arguments = eager.inputs()
    with torch.no_grad():
        expected = eager(*arguments)
        actual, code = run_and_get_code(compiled(fused), *arguments)
    assert code[0].split("def call(", 1)[1].split("def get_args", 1)[0].count(".run(") == 1
    torch.testing.assert_close(actual, expected, rtol=1.6e-2, atol=1e-3)
    step = 2.0**-3 if cache_dtype == FP8 else 2.0**-7  # one unit in the last place
    for one, other in zip(fused.caches(), eager.caches(), strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=step, atol=1e-2, equal_nan=True)


@on_layouts
def test_cuda_graphs_replay_the_store_with_new_slots(layout: str) -> None:
    eager, fused = (Store(layout, torch.bfloat16, 16, norms=False) for _ in range(2))
    projected, cos, sin, slots = eager.inputs()
    counters.clear()
    step = compiled(fused, mode="reduce-overhead")
    with torch.no_grad():
        for shift in range(5):
            moved = torch.where((slots >= 0) & (slots < eager.slots), (slots + shift) % eager.slots, slots)
            torch.compiler.cudagraph_mark_step_begin()
            assert torch.equal(step(projected + shift, cos, sin, moved), eager(projected + shift, cos, sin, moved))
            for one, other in zip(fused.caches(), eager.caches(), strict=True):
                assert torch.equal(bits(one), bits(other)), shift
    assert counters["inductor"]["cudagraph_skips"] == 0


# ---------------------------------------------------------------------- attention


BF16 = {"dtype": torch.bfloat16, "head_dim": 128, "heads": (8, 2), "padding_rows": 5}
CASES = (
    PagedCase(lengths="decode", direct=False, **BF16),
    PagedCase(lengths="mixed", **BF16),
    PagedCase(lengths="ragged", layout="distinct", **BF16),
    PagedCase(lengths="long", direct=False, window=64, **BF16),
    PagedCase(lengths="long", mode="block_causal", block_size=32, sinks=True, softcap=20.0, **BF16),
    PagedCase(lengths="ragged", mode="prefix_full", fp8=True, **BF16),
    PagedCase(lengths="chunks", fp8=True, layout="distinct", direct=False, page_size=8, **BF16),
    PagedCase(lengths="mixed", dtype=torch.float32, heads=(7, 1), head_dim=80, page_size=3),
    PagedCase(lengths="mixed", impl="triton", layout="distinct", **BF16),
    PagedCase(lengths="nothing", **BF16),
)


def attention_of(call: PagedCall) -> tuple[Callable[..., Any], list[Tensor | None]]:
    """A function of the call's tensors that attends as the call does, and those tensors."""
    fields = {f.name: getattr(call, f.name) for f in dataclasses.fields(call)}
    tensors = {n: v for n, v in fields.items() if isinstance(v, Tensor)}
    rest = {n: v for n, v in fields.items() if n not in tensors}
    values = rest.pop("request_values")

    def attend(gate: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(tensors, given, strict=False))
        out, lse = OPS.paged_attention(**named, **rest, request_values=list(given[len(tensors) :]))
        return out.flatten(1) * gate, lse

    return attend, [*tensors.values(), *values]


@pytest.mark.parametrize("library", [False, True], ids=["portable", "library"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled_attention_is_as_exact_as_the_reference(case: PagedCase, library: bool) -> None:
    call = make(case, "cuda")
    attend, tensors = attention_of(call)
    gate = torch.full((call.q.shape[0], call.q[0].numel()), 0.5, dtype=call.q.dtype, device="cuda")
    with torch.no_grad(), decisions.recording() as log:
        step = compiled(attend, options={LIBRARY_OPTION: library, "force_disable_caches": True})
        out, lse = step(gate, *tensors)
        again = step(gate, *tensors)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])
    assert_as_exact_as_the_reference(2 * out.view_as(call.q), lse, call)  # halving is exact
    (decision,) = [d for d in log.records if d.op == "paged_attention" and d.stage == "lowered"]
    assert library or decision.facts["kernel"] == "triton_paged", decision


def test_a_cuda_graph_serves_other_pages() -> None:
    """One graph, replayed over other tokens, whose keys lie in other pages."""
    case = CASES[1]
    counters.clear()
    calls = [make(case, "cuda", placement=seed) for seed in range(3)]
    attend, _ = attention_of(calls[0])
    step = compiled(attend, mode="reduce-overhead")
    for call in calls * 2:
        _, tensors = attention_of(call)
        gate = torch.full((call.q.shape[0], call.q[0].numel()), 0.5, dtype=call.q.dtype, device="cuda")
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            out, lse = step(gate, *tensors)
        assert_as_exact_as_the_reference(2 * out.view_as(call.q), lse.clone(), call)
    assert counters["inductor"]["cudagraph_skips"] == 0
