"""Compiled code around a cache of latents on a real GPU: the fused store, attention's template, CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from custom_ops.paged.call import LatentCall
from inductor_passes import LIBRARY_OPTION, decisions
from lowered_attn.compile import backend
from tests.latent_cases import LatentCase, arguments, latent_case, make
from tests.paged_cases import assert_as_exact_as_the_reference

pytestmark = pytest.mark.gpu

OPS = torch.ops.lowered_attn
VALUE, ROTARY, PAGES, ROWS = 512, 64, 12, 67


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch.compiler.reset()


def compiled(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(fn, backend=backend, fullgraph=True, dynamic=False, **options)


class Store(nn.Module):
    """A latent from a projection, norm beside RoPE or the projection doubled, into a cache full of NaN."""

    def __init__(self, page_size: int, norms: bool, reads: bool) -> None:
        super().__init__()
        width = VALUE + ROTARY
        self.cache = nn.Buffer(torch.full((PAGES, page_size, width), torch.nan, dtype=torch.bfloat16, device="cuda"))
        self.weight = nn.Buffer(1 + 0.1 * torch.randn(VALUE, device="cuda")) if norms else None
        self.reads, self.slots = reads, PAGES * page_size

    def forward(self, projected: Tensor, cos: Tensor, sin: Tensor, slots: Tensor) -> Tensor | None:
        value, rotary = projected.split([VALUE, ROTARY], 1)
        if self.weight is None:
            value, rotary = value * 2, rotary * 4  # exact
        else:
            wide, turned = value.float(), rotary.float()
            value = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * self.weight).to(value.dtype)
            left, right = turned.chunk(2, -1)
            rotary = (turned * cos + torch.cat([-right, left], -1) * sin).to(rotary.dtype)
        latent = torch.cat([value, rotary], 1)
        OPS.store_latent_cache(latent, self.cache, slots)
        return latent if self.reads else None

    def inputs(self) -> tuple[Tensor, ...]:
        """Rows of which some have slots below 0 or past the cache."""
        torch.manual_seed(0)
        projected = 3 * torch.randn(ROWS, VALUE + ROTARY, dtype=torch.bfloat16, device="cuda")
        angles = torch.rand(ROWS, ROTARY, device="cuda") * 6.28
        slots = torch.full((ROWS,), -1, device="cuda")
        kept = min(ROWS, self.slots) // 2
        slots[:kept] = torch.randperm(self.slots, device="cuda")[:kept]
        slots[kept : kept + 4] = torch.tensor([self.slots, 2**40, -(2**40), -self.slots], device="cuda")
        return projected, angles.cos(), angles.sin(), slots[torch.randperm(ROWS, device="cuda")]


def launches(code: str) -> int:
    return code.split("def call(", 1)[1].split("def get_args", 1)[0].count(".run(")


def statements(code: str) -> str:
    """The code without its comments, which name the ops that it was made from."""
    return "\n".join(line for line in code.splitlines() if not line.lstrip().startswith("#"))


@pytest.mark.parametrize("page_size", [1, 16, 24])
@pytest.mark.parametrize("reads", [False, True], ids=["stored", "stored and read"])
def test_the_fused_store_writes_the_bits_of_the_eager_one(page_size: int, reads: bool) -> None:
    """Where values are exact; slots of -1 and past the cache leave every NaN where it was."""
    eager, fused = (Store(page_size, norms=False, reads=reads) for _ in range(2))
    given = eager.inputs()
    with torch.no_grad():
        expected = eager(*given)
        actual, code = run_and_get_code(compiled(fused), *given)
    assert "torch.ops.lowered_attn" not in statements(code[0]) and launches(code[0]) == 1
    assert not reads or torch.equal(actual, expected)
    assert torch.equal(fused.cache.view(torch.int16), eager.cache.view(torch.int16))
    assert fused.cache.isnan().any() and not fused.cache.isnan().all()


@pytest.mark.parametrize("reads", [False, True], ids=["stored", "stored and read"])
def test_norm_rope_and_the_store_are_one_launch_and_right(reads: bool) -> None:
    eager, fused = (Store(16, norms=True, reads=reads) for _ in range(2))
    fused.weight = eager.weight
    given = eager.inputs()
    with torch.no_grad():
        expected = eager(*given)
        actual, code = run_and_get_code(compiled(fused), *given)
    assert launches(code[0]) == 1
    # One unit in the last place of bf16.
    torch.testing.assert_close(fused.cache, eager.cache, rtol=2.0**-7, atol=1e-2, equal_nan=True)
    if reads:
        torch.testing.assert_close(actual, expected, rtol=2.0**-7, atol=1e-2)


def test_cuda_graphs_replay_the_store_with_new_slots() -> None:
    eager, fused = (Store(16, norms=False, reads=True) for _ in range(2))
    projected, cos, sin, slots = eager.inputs()
    counters.clear()
    step = compiled(fused, mode="reduce-overhead")
    with torch.no_grad():
        for shift in range(5):
            moved = torch.where((slots >= 0) & (slots < eager.slots), (slots + shift) % eager.slots, slots)
            torch.compiler.cudagraph_mark_step_begin()
            assert torch.equal(step(projected + shift, cos, sin, moved), eager(projected + shift, cos, sin, moved))
            assert torch.equal(fused.cache.view(torch.int16), eager.cache.view(torch.int16)), shift
    assert counters["inductor"]["cudagraph_skips"] == 0


# ---------------------------------------------------------------------- attention


BF16 = {"dtype": torch.bfloat16, "padding_rows": 5}
DEEPSEEK = {"split": (512, 64), "scale": 192**-0.5, **BF16}
CASES = (
    latent_case(lengths="decode", direct=False, heads=128, page_size=64, **DEEPSEEK),
    latent_case(lengths="mixed", heads=16, **DEEPSEEK),
    latent_case(lengths="ragged", heads=63, **DEEPSEEK),
    latent_case(lengths="long", direct=False, window=64, heads=16, page_size=64, **DEEPSEEK),
    latent_case("block_causal", lengths="long", block_size=32, softcap=20.0, heads=128, **DEEPSEEK),
    latent_case("prefix_full", lengths="ragged", heads=3, split=(64, 16), **BF16),
    latent_case(lengths="chunks", heads=5, split=(32, 0), page_size=8, **BF16),
    latent_case(lengths="mixed", heads=7, split=(48, 16), page_size=3),
    latent_case(lengths="mixed", heads=16, impl="triton", **DEEPSEEK),
    latent_case(lengths="nothing", heads=16, **DEEPSEEK),
)


def attention_of(call: LatentCall) -> tuple[Callable[..., Any], list[Tensor]]:
    """A function of the call's tensors that attends as the call does, and those tensors."""
    fields = arguments(call)
    values = fields.pop("request_values")
    tensors = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
    rest = {name: value for name, value in fields.items() if name not in tensors}

    def attend(gate: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(tensors, given, strict=False))
        out, lse = OPS.paged_latent_attention(**named, **rest, request_values=list(given[len(tensors) :]))
        return out * gate[..., None], lse

    return attend, [*tensors.values(), *values]


def halves(call: LatentCall) -> Tensor:
    """A gate for each head that changes no bit but the exponent's."""
    return torch.full(call.q.shape[:2], 0.5, dtype=call.q.dtype, device="cuda")


@pytest.mark.parametrize("library", [False, True], ids=["portable", "library"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled_attention_is_as_exact_as_the_reference(case: LatentCase, library: bool) -> None:
    call = make(case, "cuda")
    attend, tensors = attention_of(call)
    with torch.no_grad(), decisions.recording() as log:
        step = compiled(attend, options={LIBRARY_OPTION: library, "force_disable_caches": True})
        out, lse = step(halves(call), *tensors)
        again = step(halves(call), *tensors)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])
    assert_as_exact_as_the_reference(2 * out, lse, call)
    (decision,) = [d for d in log.records if d.op == "paged_latent_attention" and d.stage == "lowered"]
    assert library or decision.facts["kernel"] == "triton_paged", decision


def test_a_cuda_graph_serves_other_pages() -> None:
    """One graph, replayed over other tokens, whose latents lie in other pages."""
    counters.clear()
    calls = [make(CASES[1], "cuda", placement=seed) for seed in range(3)]
    attend, _ = attention_of(calls[0])
    step = compiled(attend, mode="reduce-overhead")
    for call in calls * 2:
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            out, lse = step(halves(call), *attention_of(call)[1])
        assert_as_exact_as_the_reference(2 * out, lse.clone(), call)
    assert counters["inductor"]["cudagraph_skips"] == 0
