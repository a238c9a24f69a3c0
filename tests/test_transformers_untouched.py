"""Hugging Face models that know nothing of this package: the compiler finds the form of every layer, and proves it.

With Transformers' own ``attn_implementation="sdpa"`` and its own mask tensors, dynamic and static caches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

pytest.importorskip("transformers", reason="the extra 'transformers' is not installed")

from transformers import DynamicCache, StaticCache

from inductor_passes.compile import recognise_in
from inductor_passes.decisions import Log, recording
from inductor_passes.recognise import Recognise
from tests.transformers_models import MODELS, WINDOW, assert_as_exact, layers, make, padding, switched, tokens

LENGTH = 13
FIRST = 8
"""Tokens before decoding: more than the window, whose layers then roll."""
KEYS = LENGTH + 3
"""Length of static caches."""
POSITIONS = torch.arange(LENGTH)[None]
"""Padding does not move them, so that one pass has the same ones as steps."""
PACKED = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0]])


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


class Compiled:
    """A model whose graphs are recognised, then run op by op: what Inductor makes of them is tested elsewhere."""

    def __init__(self, model: Any, backend: Any = None, **keywords: Any) -> None:
        self.model, self.graphs = model, 0
        self._run = torch.compile(model, backend=backend or self._recognise, fullgraph=True, **keywords)

    def _recognise(self, gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs += 1
        recognise_in(gm, Recognise())
        gm.graph.lint()
        return gm.forward

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._run(*arguments, **keywords)

    def assert_recognised(self, log: Log, *forms: str) -> None:
        """Every layer of every graph, as one of ``forms`` at most, and no graph break."""
        assert not [d for d in log.records if d.stage == "refused"], log.records
        found = Counter(d.op for d in log.records if d.stage == "recognised")
        assert found.total() == layers(self.model) * self.graphs and self.graphs, found
        assert found.keys() <= set(forms), found
        assert not counters["graph_break"]


def exactly(model: Any) -> Any:
    """The model in fp64."""
    other = switched(model, "sdpa").double()
    other.set_experts_implementation("eager")  # grouped products do not take fp64
    return other


def of_layers(model: Any) -> Counter[str]:
    """The forms of a model's layers where there are as many keys as queries."""
    kinds = getattr(model.config, "layer_types", None)
    sliding = kinds.count("sliding_attention") if kinds else layers(model) * (model.config.model_type == "mistral")
    return +Counter({"sliding_self": sliding, "full_self": layers(model) - sliding})


def cache_of(kind: str, model: Any) -> Any:
    """A cache; a static one has its tensors, as after ``generate``'s first step."""
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    cache = StaticCache(model.config, max_cache_len=KEYS)
    model(tokens(length=1), past_key_values=cache)
    cache.reset()
    return cache


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("cached", [None, "dynamic", "static"])
@pytest.mark.parametrize("name", MODELS)
def test_prefill(name: str, cached: str | None, side: str) -> None:
    """Without a cache and without padding, Transformers builds the mask for packed sequences: there is one."""
    model, ids = switched(make(name), "sdpa"), tokens()
    mask = padding(ids, side)
    real = slice(None) if mask is None else mask.bool()
    run = Compiled(model)

    def logits(m: Any, cache_for: Any = None) -> Tensor:
        keywords = {"use_cache": False} if cached is None else {"past_key_values": cache_of(cached, cache_for or m)}
        return m(ids, attention_mask=mask, **keywords).logits[real]

    with torch.no_grad(), recording() as log:
        actual = logits(run, model)
    with torch.no_grad():
        assert_as_exact(actual, logits(model), logits(exactly(model)))
    run.assert_recognised(log, *of_layers(model))
    assert Counter(d.op for d in log.records if d.stage == "recognised") == of_layers(model)


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("cached", ["dynamic", "static"])
@pytest.mark.parametrize("name", MODELS)
def test_decode(name: str, cached: str, side: str) -> None:
    """A static cache counts its tokens in place between the mask and attention."""
    model, ids = switched(make(name), "sdpa"), tokens(length=LENGTH)
    mask = padding(ids, side)
    real = slice(None) if mask is None else mask.bool()
    run = Compiled(model)

    def steps(whole: Any, step: Any) -> Tensor:
        cache, parts = cache_of(cached, whole), []
        for begin, end in [(0, FIRST), *((i, i + 1) for i in range(FIRST, LENGTH))]:
            seen = None if mask is None else mask[:, :end]
            keywords = {"attention_mask": seen, "position_ids": POSITIONS[:, begin:end], "past_key_values": cache}
            parts.append((step if begin else whole)(ids[:, begin:end], **keywords).logits)
        return torch.cat(parts, dim=1)[real]

    with torch.no_grad(), recording() as log:
        actual = steps(model, run)
    with torch.no_grad():
        other = exactly(model)
        assert_as_exact(actual, steps(model, model), steps(other, other))
    # A rolling cache holds the window's keys alone: all of them are seen.
    run.assert_recognised(log, "full_self", "sliding_self")


@pytest.mark.parametrize("name", MODELS)
def test_a_static_cache_that_is_not_full(name: str) -> None:
    """Steps before the window is full, from the first token on."""
    model, ids = switched(make(name), "sdpa"), tokens(length=WINDOW)
    run = Compiled(model)

    def steps(step: Any) -> Tensor:
        cache = cache_of("static", model)
        return torch.cat([step(ids[:, i : i + 1], past_key_values=cache).logits for i in range(WINDOW)], dim=1)

    with torch.no_grad(), recording() as log:
        actual = steps(run)
    with torch.no_grad():
        assert_as_exact(actual, steps(model), exactly(model)(ids).logits)
    run.assert_recognised(log, "full_self", "sliding_self")


@pytest.mark.parametrize("name", MODELS)
def test_generate(name: str) -> None:
    """``generate`` makes the masks of a static cache outside of the graph. For one query they hide keys, no more."""
    model, ids = switched(make(name), "sdpa"), tokens(length=FIRST)
    asked = {"attention_mask": padding(ids, "left"), "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, cache_implementation="static", **asked)
    whole, run = model.forward, Compiled(model.forward)
    run.model = model

    def forward(input_ids: Tensor, **keywords: Any) -> Any:
        return (run if input_ids.shape[1] == 1 else whole)(input_ids, **keywords)

    model.forward = forward
    with recording() as log:
        actual = model.generate(ids, cache_implementation="static", **asked)
    assert torch.equal(actual, expected)
    run.assert_recognised(log, "bidirectional", "full_self", "sliding_self")


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_training_step(name: str) -> None:
    model, ids = switched(make(name), "sdpa").train(), tokens()
    run = Compiled(model)

    def gradients(m: Any, call: Any) -> Tensor:
        m.zero_grad()
        call(ids, labels=ids, use_cache=False).loss.backward()
        return torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None])

    with recording() as log:
        actual = gradients(model, run)
    other = exactly(model)
    assert_as_exact(actual, gradients(model, model), gradients(other, other))
    run.assert_recognised(log, *of_layers(model))


@pytest.mark.parametrize(
    ("name", "cached"),
    [("qwen3", None), ("mistral", None), ("llama", "static"), ("gemma3", "static"), ("deepseek_v3", "static")],
)
def test_through_inductor(name: str, cached: str | None) -> None:
    """The whole backend, prefill or one step of decoding; every layer calls a form."""
    model, ids = switched(make(name), "sdpa"), tokens(length=LENGTH)
    run = Compiled(model, backend="lowered_attn")
    run.graphs = 1
    with torch.no_grad(), recording() as log:
        if cached is None:
            actual, begin = run(ids, use_cache=False).logits, 0
        else:
            cache, begin = cache_of(cached, model), LENGTH - 1
            model(ids[:, :begin], past_key_values=cache)
            actual = run(ids[:, begin:], past_key_values=cache).logits
    with torch.no_grad():
        assert_as_exact(actual, *(m(ids).logits[:, begin:] for m in (model, exactly(model))))
    run.assert_recognised(log, "full_self", "sliding_self")


def test_packed_sequences() -> None:
    """Positions that are an input may start again: queries see the keys from their sequence's start."""
    model, ids = switched(make("gemma3"), "sdpa"), tokens(length=LENGTH)
    run = Compiled(model)
    with torch.no_grad(), recording() as log:
        actual = run(ids, position_ids=PACKED, use_cache=False).logits
    with torch.no_grad():
        assert_as_exact(
            actual, *(m(ids, position_ids=PACKED, use_cache=False).logits for m in (model, exactly(model)))
        )
    run.assert_recognised(log, "causal_from")
