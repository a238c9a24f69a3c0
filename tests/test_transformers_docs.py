"""The Python blocks of docs/transformers.md run as they stand, and do what the page says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.test_readme import blocks, run

pytest.importorskip("transformers", reason="the extra 'transformers' is not installed")

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "transformers.md").read_text()
(_, MODEL), (_, BATCHING), (_, UNTOUCHED) = blocks(PAGE, "python")

CHECK = """
from torch._dynamo.utils import counters

assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"], counters
model.set_attn_implementation("eager")
torch.testing.assert_close(logits[padding.bool()], model(prompts, attention_mask=padding).logits[padding.bool()])
assert torch.equal(model.generate(prompts, attention_mask=padding, max_new_tokens=8, do_sample=False), generated)
"""

CHECK_BATCHING = """
model.set_attn_implementation("eager")
config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
for request, result in zip(requests, results.values(), strict=True):
    assert result.error is None, result.error
    alone = model.generate(torch.tensor([request]), generation_config=config)
    assert alone[0, len(request):].tolist() == result.generated_tokens
assert len(tokens) == 2
"""

CHECK_UNTOUCHED = """
import sys
from torch._dynamo.utils import counters

assert "lowered_attn.integrations.transformers" not in sys.modules
assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"], counters
with torch.no_grad():
    expected = model.generate(prompts, max_new_tokens=9, do_sample=False)
assert torch.equal(token, expected[:, -1:])
"""


def test_model() -> None:
    run(MODEL + CHECK)


def test_continuous_batching() -> None:
    run(MODEL + BATCHING + CHECK_BATCHING)


def test_untouched_model() -> None:
    run(UNTOUCHED + CHECK_UNTOUCHED)
