"""The Python blocks of docs/mla.md run as they stand, and do what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import torch

import lowered_attn
from lowered_attn import DeepSeekAttention
from tests.test_readme import blocks, run

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = (DOCS / "mla.md").read_text()
(_, MODULE), (_, SERVING) = blocks(PAGE, "python")

ONE_GRAPH = """
from torch._dynamo.utils import counters

assert counters["stats"]["unique_graphs"] == 1, counters["stats"]
assert not counters["graph_break"], counters["graph_break"]
"""


def test_module() -> None:
    run(MODULE)


def test_serving() -> None:
    run(SERVING + ONE_GRAPH)


def test_serving_in_debug_mode() -> None:
    """Its metadata is as metadata must be, and its promise is kept."""
    run(f"import lowered_attn\nlowered_attn.set_debug(True)\n{SERVING}")


def test_numbers() -> None:
    """Of DeepSeek's sizes, in 16-bit dtypes."""
    with torch.device("meta"):
        attention = DeepSeekAttention(64, 128).to(torch.bfloat16)
        cache = attention.make_cache(3, 100)
    key, value, latent = attention.nope_dim + attention.rotary_dim, attention.value_dim, attention.kv_comp_dim
    width = latent + attention.rotary_dim
    assert list(cache.data.shape) == [3, 128, width] and cache.data.dtype == torch.bfloat16
    for number in (
        2 * width,
        2 * 128 * (key + value),
        2 * (key + value),
        2 * (width + latent),
        2 * latent * (attention.nope_dim + value),
        round(attention.break_even),
    ):
        assert f" {number:,} " in PAGE, number


def test_names_and_links_exist() -> None:
    assert {"DeepSeekAttention", "LatentAttention", "LatentCache", "mla"} <= set(lowered_attn.__all__)
    for name in re.findall(r"`mla\.(\w+)\.(\w+)`", PAGE):
        assert hasattr(getattr(lowered_attn.mla, name[0]), name[1])
    for op in ("store_latent_cache", "paged_latent_attention", "paged_schedule"):
        assert f"`{op}(" in PAGE and hasattr(torch.ops.lowered_attn, op)
    for link in re.findall(r"\]\(([\w.]+)\)", PAGE):
        assert (DOCS / link).exists(), link
