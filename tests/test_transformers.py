"""``attn_implementation="lowered_attn"``: Hugging Face models give what they give with eager attention."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers", reason="the extra 'transformers' is not installed")

import transformers
from transformers import DynamicCache, StaticCache, masking_utils

import lowered_attn.integrations.transformers as integration
from custom_ops.form import NAMESPACE
from custom_ops.forms import FORMS
from custom_ops.reference import query_positions
from lowered_attn.compile import backend
from lowered_attn.integrations.transformers_masks import FormMask
from tests.transformers_models import (
    MODELS,
    VOCABULARY,
    WINDOW,
    assert_as_exact,
    exact,
    layers,
    make,
    padding,
    switched,
    tokens,
)

LENGTH = 13
PIECES = (6, 3, 1, 1, 1, 1)
"""A prompt, a second one behind it, and steps of decoding: the cache passes the window inside a piece."""


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


# ---------------------------------------------------------------------- logits


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_prefill(name: str, side: str) -> None:
    model, ids = make(name), tokens()
    mask = padding(ids, side)
    real = slice(None) if mask is None else mask.bool()
    with torch.no_grad():
        actual, eager, true = (
            m(ids, attention_mask=mask).logits[real] for m in (switched(model), model, exact(model))
        )
    assert_as_exact(actual, eager, true)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prefill_in_half_precision(dtype: torch.dtype) -> None:
    model, ids = make("gemma3").to(dtype), tokens()
    with torch.no_grad():
        actual, eager, true = (m(ids).logits for m in (switched(model), model, exact(model)))
    assert_as_exact(actual, eager, true)


def make_cache(kind: str, model: Any) -> Any:
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(model.config, max_cache_len=LENGTH + 3)


def in_pieces(run: Callable[..., Any], ids: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
    """Logits [B, LENGTH, vocabulary] of ``PIECES`` of ids, one after another through ``cache``."""
    parts, begin = [], 0
    for length in PIECES:
        end = begin + length
        seen = None if mask is None else mask[:, :end]
        positions = torch.arange(begin, end)[None]  # padding does not move them, so that one pass has the same ones
        parts.append(run(ids[:, begin:end], attention_mask=seen, position_ids=positions, past_key_values=cache).logits)
        begin = end
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("name", MODELS)
def test_cached_pieces_are_one_pass(name: str, kind: str, side: str) -> None:
    """Chunked prefill and decode, past the sliding window's length, give the logits of one pass without a cache."""
    model, ids = make(name), tokens(length=LENGTH)
    mask = padding(ids, side)
    real = slice(None) if mask is None else mask.bool()
    positions = torch.arange(LENGTH)[None]
    with torch.no_grad():
        actual = in_pieces(switched(model), ids, mask, make_cache(kind, model))[real]
        eager, true = (
            m(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[real]
            for m in (model, exact(model))
        )
    assert_as_exact(actual, eager, true)


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("name", MODELS)
def test_generate(name: str, kind: str) -> None:
    model, ids = make(name), tokens()
    asked = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": kind}
    actual, eager = (m.generate(ids, attention_mask=padding(ids, "left"), **asked) for m in (switched(model), model))
    assert torch.equal(actual, eager)


@pytest.mark.parametrize("name", MODELS)
def test_training_step(name: str) -> None:
    """Gradients of all parameters, with padding; dropout is 0."""
    model, ids = make(name).train(), tokens()
    mask = padding(ids, "right")
    labels = ids.masked_fill(mask == 0, -100)

    def gradients(m: Any) -> Tensor:
        m(ids, attention_mask=mask, labels=labels).loss.backward()
        return torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None])

    actual, true = gradients(switched(model)), gradients(exact(model))
    assert_as_exact(actual, gradients(model), true)


# ---------------------------------------------------------------------- compiled


class Counting:
    """The compiler, counting the form ops of each graph that Dynamo hands it."""

    def __init__(self) -> None:
        self.graphs: list[Counter[str]] = []

    def __call__(self, gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        names = (str(node.target) for node in gm.graph.nodes if node.op == "call_function")
        self.graphs.append(Counter(n.split(".")[1] for n in names if n.startswith(f"{NAMESPACE}.")))
        return backend(gm, inputs)

    def assert_graphs(self, model: Any, count: int = 1) -> None:
        """That many graphs, each with one form op a layer, and nothing left outside."""
        assert not counters["graph_break"], counters["graph_break"]
        assert [graph.total() for graph in self.graphs] == [layers(model)] * count, self.graphs


@pytest.mark.parametrize("name", MODELS)
def test_compiled_prefill(name: str) -> None:
    model, ids, compiler = make(name), tokens(), Counting()
    mask = padding(ids, "left")
    with torch.no_grad():
        run = torch.compile(switched(model), backend=compiler, fullgraph=True)
        actual, eager, true = (
            m(ids, attention_mask=mask).logits[mask.bool()] for m in (run, model, exact(model))
        )
    assert_as_exact(actual, eager, true)
    compiler.assert_graphs(model)


@pytest.mark.parametrize("name", ["llama", "gemma2", "deepseek_v3"])
def test_compiled_decode(name: str) -> None:
    """Steps through a static cache: one compilation serves every position.

    Transformers counts the tokens of a sliding layer in a Python int as well, which Dynamo compiles once more as a
    symbol.
    """
    model, ids, compiler = make(name), tokens(length=LENGTH), Counting()
    first = 8  # longer than the window, whose layers then roll
    with torch.no_grad():
        changed, cache = switched(model), make_cache("static", model)
        parts = [changed(ids[:, :first], past_key_values=cache).logits]
        step = torch.compile(changed, backend=compiler, fullgraph=True)
        parts += [step(ids[:, i : i + 1], past_key_values=cache).logits for i in range(first, LENGTH)]
        eager, true = (m(ids).logits for m in (model, exact(model)))
    assert_as_exact(torch.cat(parts, dim=1), eager, true)
    compiler.assert_graphs(model, count=2 if name == "gemma2" else 1)


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_generate_with_a_compiled_forward(name: str) -> None:
    """generate() makes the masks of a static cache outside the graph: they are its inputs."""
    model, ids, compiler = make(name), tokens(length=8), Counting()
    asked = {"attention_mask": padding(ids, "left"), "max_new_tokens": 8, "do_sample": False}
    changed = switched(model)
    eager = model.generate(ids, cache_implementation="static", **asked)
    whole = changed.forward

    def forward(input_ids: Tensor, **keywords: Any) -> Any:
        run = step if input_ids.shape[1] == 1 else whole
        return run(input_ids, **keywords)

    step = torch.compile(whole, backend=compiler, fullgraph=True)
    changed.forward = forward
    assert torch.equal(changed.generate(ids, cache_implementation="static", **asked), eager)
    compiler.assert_graphs(model, count=2 if name == "gemma3" else 1)


# ---------------------------------------------------------------------- packed sequences

PACKED = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0]])
"""Positions of sequences side by side, as a collator without padding makes them."""


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_packed_sequences(name: str, compiled: bool) -> None:
    """position_ids that start again keep sequences apart, in full and in sliding layers."""
    model, ids, compiler = make(name), tokens(length=PACKED.shape[1]), Counting()
    changed = switched(model)
    run = torch.compile(changed, backend=compiler, fullgraph=True) if compiled else changed
    with torch.no_grad():
        actual, eager, true = (
            m(ids, position_ids=PACKED, use_cache=False).logits for m in (run, model, exact(model))
        )
        alone = switched(model)(ids[:1, 7:10], use_cache=False).logits
    assert_as_exact(actual, eager, true)
    torch.testing.assert_close(actual[:1, 7:10], alone)
    if compiled:
        compiler.assert_graphs(model)
        assert compiler.graphs[0] == {"causal_from": layers(model)}


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_compiled_training_step(name: str) -> None:
    """Without a cache and without padding, Transformers compiles for packed sequences whatever the positions are."""
    model, ids, compiler = make(name).train(), tokens(), Counting()

    def gradients(m: Any, run: Any) -> Tensor:
        run(ids, labels=ids, use_cache=False).loss.backward()
        return torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None])

    changed, other = switched(model), exact(model)
    actual = gradients(changed, torch.compile(changed, backend=compiler, fullgraph=True))
    assert_as_exact(actual, gradients(model, model), gradients(other, other))
    compiler.assert_graphs(model)


# ---------------------------------------------------------------------- encoders


def encoder(name: str) -> tuple[Any, dict[str, Tensor]]:
    """A tiny encoder and its inputs, padding included where it takes any."""
    sizes = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
        "attn_implementation": "eager",
    }  # fmt: skip
    if name == "bert":
        ids = tokens()
        model = transformers.BertModel(transformers.BertConfig(vocab_size=VOCABULARY, **sizes))
        return model.eval(), {"input_ids": ids, "attention_mask": padding(ids, "right")}
    model = transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=4, **sizes))
    return model.eval(), {"pixel_values": torch.randn(2, 3, 16, 16)}


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_encoders_are_bidirectional(name: str) -> None:
    model, inputs = encoder(name)
    compiler = Counting()
    run = torch.compile(switched(model), backend=compiler, fullgraph=True)
    real = inputs["attention_mask"].bool() if name == "bert" else slice(None)
    with torch.no_grad():
        actual, eager = (m(**inputs).last_hidden_state[real] for m in (run, model))
        inputs = {key: t.double() if t.is_floating_point() else t for key, t in inputs.items()}
        true = switched(model, "sdpa").double()(**inputs).last_hidden_state[real]
    assert_as_exact(actual, eager, true)
    compiler.assert_graphs(model)
    assert compiler.graphs[0] == {"bidirectional": 2}


# ---------------------------------------------------------------------- masks


class Sizes(TorchDispatchMode):
    """Remembers the most elements that a tensor had."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.largest = max(self.largest, out.numel())
        return out


class Seen:
    """A cache, as mask functions see it."""

    is_compileable = False

    def __init__(self, offset: int | Tensor, sizes: tuple[int, int]) -> None:
        self.offset, self.sizes = offset, sizes

    def get_query_offset(self, layer: int) -> int | Tensor:
        return self.offset

    def get_mask_sizes(self, length: int, layer: int) -> tuple[int, int]:
        return self.sizes


CREATORS = ("create_causal_mask", "create_sliding_window_causal_mask", "create_bidirectional_mask")
CACHES: dict[str, Seen | None] = {
    "none": None,
    "prompt-behind-cached": Seen(7, (7 + 9, 0)),
    "static": Seen(torch.tensor(7), (24, 0)),
    "rolling": Seen(11, (WINDOW - 1 + 9, 11 - WINDOW + 1)),
}


def config_for(implementation: str, **attributes: Any) -> Any:
    config = transformers.LlamaConfig(num_hidden_layers=1)
    config._attn_implementation = implementation
    for name, value in {"sliding_window": WINDOW, **attributes}.items():
        setattr(config, name, value)
    return config


def dense(mask: FormMask, query_len: int, key_len: int) -> Tensor:
    """bool [B, 1, Lq, Lk] of a mask for 2 requests."""
    form = FORMS[mask.form]
    operands = {name: getattr(mask, name) for name in form.operand_names}
    positions = query_positions(torch.empty(2, 1, query_len, 1), operands)
    operands.pop("q_start", None)
    kept = {name: value for name, value in operands.items() if value is not None}
    return form.mask.specialise(list(kept)).dense(positions, torch.arange(key_len), kept)[:, None].expand(2, -1, -1, -1)


@pytest.mark.parametrize("cached", CACHES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("creator", CREATORS)
def test_masks_say_what_transformers_says(creator: str, padded: bool, cached: str) -> None:
    cache, length = CACHES[cached], 9
    seen = length if cache is None else int(cache.offset) + length
    mask = (torch.rand(2, seen) < 0.7).long() if padded else None
    embeds = torch.empty(2, length, 0)
    ours, theirs = (
        getattr(masking_utils, creator)(config_for(name), embeds, mask, past_key_values=cache)
        for name in ("lowered_attn", "exact")
    )
    if theirs is None:  # encoders without padding
        theirs = torch.ones(2, 1, length, length if cache is None else cache.sizes[0], dtype=torch.bool)
    assert torch.equal(dense(ours, length, theirs.shape[3]), theirs)


@pytest.mark.parametrize("window", [1, 2, WINDOW, 40])
@pytest.mark.parametrize("creator", CREATORS[:2])
def test_masks_of_packed_sequences_say_what_transformers_says(creator: str, window: int) -> None:
    length = PACKED.shape[1]
    ours, theirs = (
        getattr(masking_utils, creator)(
            config_for(name, sliding_window=window), torch.empty(2, length, 0), None, None, position_ids=PACKED
        )
        for name in ("lowered_attn", "exact")
    )
    assert ours.form == "causal_from"
    assert torch.equal(dense(ours, length, length), theirs)


def test_a_mask_that_hides_nothing_is_no_operand() -> None:
    config, embeds = config_for("lowered_attn"), torch.empty(2, 9, 0)
    ours = masking_utils.create_causal_mask(config, embeds, torch.ones(2, 9), None)
    assert ours == FormMask("full_self")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("creator", CREATORS[:2])
def test_no_mask_tensor_is_made(creator: str, packed: bool) -> None:
    length = 512
    mask = None if packed else torch.ones(2, length).tril(10)
    positions = torch.arange(length)[None] % 100 if packed else None
    with Sizes() as sizes:
        getattr(masking_utils, creator)(
            config_for("lowered_attn"), torch.empty(2, length, 0), mask, None, position_ids=positions
        )
    assert 0 < sizes.largest <= 4 * length


def half(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return j < 3


REFUSED_MASKS: dict[str, tuple[str, dict[str, Any], str]] = {
    "or": ("create_causal_mask", {"or_mask_function": half}, "a mask function that the model adds"),
    "and": ("create_sliding_window_causal_mask", {"and_mask_function": half}, "a mask function that the model adds"),
    "blocks": ("create_causal_mask", {"block_sequence_ids": torch.zeros(2, 9, dtype=torch.int64)}, "blocks"),
    "chunks": ("create_chunked_causal_mask", {}, "chunks"),
    "packed-chunks": ("create_chunked_causal_mask", {"position_ids": torch.arange(9)[None] % 4}, "chunks"),
    "two-sided": ("create_bidirectional_sliding_window_mask", {}, "two-sided"),
}


@pytest.mark.parametrize("case", REFUSED_MASKS)
def test_masks_that_no_form_says_are_refused(case: str) -> None:
    creator, extra, message = REFUSED_MASKS[case]
    config = config_for("lowered_attn", attention_chunk_size=4 if "chunk" in case else None)
    with pytest.raises(ValueError, match=rf"lowered_attn'.*got .*{message}.*use attn_implementation='sdpa'"):
        getattr(masking_utils, creator)(config, torch.empty(2, 9, 0), None, past_key_values=None, **extra)


# ---------------------------------------------------------------------- refusals


def test_dropout_in_training_is_refused() -> None:
    model = make("llama", attention_dropout=0.1)
    changed = switched(model)
    with torch.no_grad():
        changed(tokens())  # in eval mode it is off
    with pytest.raises(ValueError, match=r"dropout: expected 0, got 0\.1; set attention_dropout=0"):
        changed.train()(tokens())


REFUSED_CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "sinks": ({"s_aux": torch.zeros(4)}, "s_aux: expected no attention sinks"),
    "bias": ({"position_bias": torch.zeros(1, 4, 6, 6)}, r"position_bias: expected None, got shape \[1, 4, 6, 6\]"),
    "weights": ({"output_attentions": True}, "output_attentions: expected False"),
    "dense-mask": ({"attention_mask": torch.ones(2, 1, 6, 6)}, r"attention_mask: .*a tensor of shape \[2, 1, 6, 6\]"),
    "no-mask": ({"attention_mask": None}, "attention_mask: .*None in a causal layer"),
}


@pytest.mark.parametrize("case", REFUSED_CALLS)
def test_calls_that_no_form_answers_are_refused(case: str) -> None:
    extra, message = REFUSED_CALLS[case]
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    arguments = {"attention_mask": FormMask("full_self"), **extra}
    with pytest.raises(ValueError, match=rf"lowered_attn': {message}"):
        integration.attention(torch.nn.Module(), q, k, k, **arguments)


def test_sinks_of_a_model_are_refused() -> None:
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "num_local_experts": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": VOCABULARY}
    config = transformers.GptOssConfig(**sizes, **heads, pad_token_id=0, attn_implementation="eager")
    model = transformers.GptOssForCausalLM(config)
    model.set_attn_implementation("lowered_attn")
    with pytest.raises(ValueError, match="no attention sinks"):
        model(tokens())


@pytest.mark.parametrize("version", ["5.9.1", "5.23.0"])
def test_another_transformers_is_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(transformers, "__version__", version)
    with pytest.raises(ImportError, match=rf"expected transformers 5\.17, got {re.escape(version)}; pip install"):
        integration.register()


def test_importing_the_package_does_not_import_transformers() -> None:
    code = "import sys, lowered_attn, lowered_attn.compile; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
