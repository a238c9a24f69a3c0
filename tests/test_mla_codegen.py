"""The GPU code that torch.compile generates for the mla forms, without a GPU: whole passes, and steps of a stream."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="Triton compiles the generated code")

from inductor_passes import decisions
from inductor_passes.pretend_gpu import Generated, generate, pretend_gpu
from lowered_attn import mla
from lowered_attn.compile import backend

BATCH, LENGTH, HEADS, WIDTH, LATENT, RETR = 2, 1024, 8, 512, 256, 64
"""LENGTH is the cache's capacity too. A copy of the latents a head is BATCH * HEADS * LENGTH * LATENT elements."""
SIZES = {"kv_comp_dim": LATENT, "q_comp_dim": 384, "retr_dim": RETR, "head_dim": 64}
FORMS = ("full_self", "sliding_self", "segment_cross")


@pytest.fixture(autouse=True)
def modules_are_bfloat16() -> Iterator[None]:
    """Fake parameters cannot be cast afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(before)


class Whole(nn.Module):
    """One pass over all tokens."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        build = {
            "full_self": lambda: mla.full_self.FullSelf(WIDTH, HEADS, 2, **SIZES),
            "sliding_self": lambda: mla.sliding_self.SlidingSelf(WIDTH, HEADS, 128, 2, **SIZES),
            "segment_cross": lambda: mla.segment_cross.SegmentCross(WIDTH, WIDTH, HEADS * 64, HEADS, 2, **SIZES),
        }[form]
        with torch.device("cuda"):
            self.module = build().eval()

    def inputs(self, tokens: int = LENGTH) -> list[Tensor]:
        x, kv = torch.empty(2, BATCH, tokens, WIDTH, device="cuda", dtype=torch.bfloat16)
        if self.form != "segment_cross":
            return [x]
        return [x, kv, torch.empty(BATCH, tokens, device="cuda", dtype=torch.int64)]

    def forward(self, x: Tensor, kv: Tensor | None = None, segments: Tensor | None = None, **options: Any) -> Tensor:
        return self.module(x) if kv is None else self.module(x, kv, query_segments=segments)


class Step(Whole):
    """The next token of a stream; absorbed, as it is served."""

    def __init__(self, form: str) -> None:
        super().__init__(form)
        self.module = self.module.absorb()
        self.cache = self.module.make_cache(BATCH, LENGTH)

    def inputs(self, tokens: int = 1) -> list[Tensor]:
        return super().inputs(tokens)

    def forward(self, x: Tensor, kv: Tensor | None = None, segments: Tensor | None = None, **options: Any) -> Tensor:
        if kv is None:
            return self.module(x, cache=self.cache)
        return self.module(x, kv, query_segments=segments, cache=self.cache)


def compiled(model: type[Whole], form: str, arch: str = "sm_90") -> tuple[Generated, decisions.Decision]:
    """What is generated, and the decision about its attention."""
    with pretend_gpu(arch) as gpu, torch.no_grad():
        with gpu.fake_tensors():
            made = model(form)
            arguments = made.inputs()
        with decisions.recording() as log:
            generated = generate(made, *arguments, backend=backend)
    (decision,) = [d for d in log.records if d.op == form and d.stage == "lowered"]
    return generated, decision


def allocated(generated: Generated) -> list[int]:
    """Elements of every buffer that the wrapper allocates."""
    shapes = re.findall(r"empty_strided_cuda\(\(([\d, ]+)\)", generated.wrapper)
    return [math.prod(int(size) for size in shape.split(",") if size.strip()) for shape in shapes]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("model", [Whole, Step])
@pytest.mark.parametrize("form", FORMS)
def test_attention_is_a_kernel_over_the_latents_themselves(form: str, model: type[Whole], arch: str) -> None:
    generated, decision = compiled(model, form, arch)
    assert decision.facts["kernel"] == "triton_grouped", decision
    sizes = allocated(generated)
    # A pass writes an output of all heads, which is as large: exactly one such buffer. A step's output is small.
    copies = BATCH * HEADS * LENGTH * LATENT
    assert [size for size in sizes if size >= copies] == ([copies] if model is Whole else [])
    if model is Step:
        assert BATCH * LENGTH * LATENT not in sizes  # nor a copy of the cache
        keys = BATCH * LENGTH * HEADS * RETR
        assert (keys in sizes) == (form != "segment_cross")  # without RoPE, absorbed keys are the latents


@pytest.mark.parametrize("form", FORMS)
def test_cuda_graphs_take_a_step(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor skips CUDA graphs where a graph writes an input that may move; buffers of a cache are static."""
    from torch._inductor.output_code import CompiledFxGraph

    seen: list[CompiledFxGraph] = []
    post_compile = CompiledFxGraph.post_compile

    def keep(self: CompiledFxGraph, *arguments: Any) -> None:
        seen.append(self)
        post_compile(self, *arguments)

    monkeypatch.setattr(CompiledFxGraph, "post_compile", keep)
    compiled(Step, form)
    (graph,) = seen
    mutated, static = set(graph.mutated_input_idxs), set(graph.fx_kwargs["static_input_idxs"])
    assert len(mutated) == 3 and mutated <= static  # data, lengths, hidden
    assert graph.disabled_cudagraphs_reason is None
