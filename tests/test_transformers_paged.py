"""``"paged|lowered_attn"``: continuous batching generates what ``generate`` does, one prompt at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

pytest.importorskip("transformers", reason="the extra 'transformers' is not installed")

import transformers
from transformers import CompileConfig, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

import lowered_attn.integrations.transformers as integration
from tests.transformers_models import VOCABULARY, make, switched

NEW_TOKENS = 12
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [3, 4], list(range(20, 41)), [5, 6, 7, 8, 9, 10, 12]]
"""The third is longer than a step and than the window, twice; the last may share the first one's pages."""


def generation(**more: Any) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0, **more)


def one_by_one(model: Any) -> list[list[int]]:
    found = []
    for prompt in PROMPTS:
        out = model.generate(torch.tensor([prompt]), generation_config=generation())
        found.append(out[0, len(prompt) :].tolist())
    return found


def batched(model: Any, **more: Any) -> list[list[int]]:
    settings = ContinuousBatchingConfig(block_size=4, num_blocks=64, max_batch_tokens=8, **more)
    results = model.generate_batch(
        PROMPTS, generation_config=generation(), continuous_batching_config=settings, progress_bar=False
    )
    by_prompt = {tuple(result.prompt_ids): result for result in results.values()}
    assert [by_prompt[tuple(prompt)].error for prompt in PROMPTS] == [None] * len(PROMPTS)
    return [by_prompt[tuple(prompt)].generated_tokens for prompt in PROMPTS]


def sinking() -> Any:
    """A model with attention sinks and alternating windows."""
    config = transformers.GptOssConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_local_experts=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=VOCABULARY, pad_token_id=0, sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = transformers.GptOssForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or name.endswith("sinks"):
                parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("implementation", [integration.NAME, integration.PAGED_NAME])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3", "gpt_oss"])
def test_continuous_batching(name: str, implementation: str) -> None:
    """Chunked prefill and decode mixed; full layers, windows whose slots are a ring, soft-cap, sinks."""
    model = sinking() if name == "gpt_oss" else make(name)
    assert batched(switched(model, implementation)) == one_by_one(model)


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_compiled_continuous_batching(name: str) -> None:
    """One graph serves every step: lengths, slots and page tables are its inputs."""
    model = make(name)
    torch._dynamo.reset()
    counters.clear()
    settings = CompileConfig(backend="lowered_attn", mode=None, fullgraph=True, dynamic=True)
    assert batched(switched(model), varlen_compile_config=settings) == one_by_one(model)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1


def test_a_forward_without_a_paged_cache_is_refused() -> None:
    with torch.no_grad(), pytest.raises(ValueError, match=r"cache: expected a paged cache and its indices, got none"):
        switched(make("llama"), integration.PAGED_NAME)(torch.tensor([[1, 2, 3]]))


def test_blocks_larger_than_a_page_are_refused() -> None:
    model = switched(make("llama"))
    settings = ContinuousBatchingConfig(block_size=512, num_blocks=2, max_batch_tokens=8)
    results = model.generate_batch(
        PROMPTS[:1], generation_config=generation(), continuous_batching_config=settings, progress_bar=False
    )
    (result,) = results.values()
    assert "block_size: expected at most 256, got 512; set it in ContinuousBatchingConfig" in str(result.error)
