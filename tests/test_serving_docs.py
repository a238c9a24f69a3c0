"""The Python blocks of docs/serving.md run as they stand, and do what the page says."""

from __future__ import annotations

import re
from pathlib import Path

import lowered_attn
from tests.test_readme import blocks, run

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "serving.md").read_text()
(_, ENGINE), (_, STRATEGY), (_, USE) = blocks(PAGE, "python")

ONE_GRAPH = """
from torch._dynamo.utils import counters

assert counters["stats"]["unique_graphs"] == 1, counters["stats"]
assert not counters["graph_break"], counters["graph_break"]
"""
# Appended to the strategy and its use: the last step, as SDPA with that mask; the class as a pytree.
CHECK_STRATEGY = """
for r, (begin, end) in enumerate(((0, 5), (5, 8))):
    positions = torch.arange(end - begin)
    visible = positions <= positions[:, None] + lookahead[r]
    heads = (t[begin:end].transpose(0, 1)[None] for t in (q, k, v))
    exact = torch.nn.functional.scaled_dot_product_attention(*heads, visible, enable_gqa=True)
    torch.testing.assert_close(out[begin:end], exact[0].transpose(0, 1))

leaves = torch.utils._pytree.tree_leaves(metadata)
assert len(leaves) == 5 and leaves[-1] is metadata.lookahead
"""


def test_engine() -> None:
    run(ENGINE + ONE_GRAPH)


def test_engine_in_debug_mode() -> None:
    """Its metadata is as the page says that metadata must be, and its promise is kept."""
    run(f"import lowered_attn\nlowered_attn.set_debug(True)\n{ENGINE}")


def test_strategy_in_its_own_file() -> None:
    run(STRATEGY + USE + ONE_GRAPH + CHECK_STRATEGY)


def test_names_exist() -> None:
    """Every name of the page's first table is exported."""
    table = PAGE[PAGE.index("| `Attention`") : PAGE.index("## An engine")]
    named = set(re.findall(r"`(\w+)", table))
    assert len(named) > 8
    assert named - {"Attention", "AttnMetaDataBase"} <= set(lowered_attn.__all__)
