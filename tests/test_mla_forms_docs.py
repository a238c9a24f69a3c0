"""The Python block of docs/mla_forms.md runs as it stands, and does what the page says."""

from __future__ import annotations

from pathlib import Path

from tests.test_readme import blocks, run

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "mla_forms.md").read_text()
((_, EXAMPLE),) = blocks(PAGE, "python")

CHECK = """
from torch._dynamo.utils import counters

torch.testing.assert_close(streamed, full, rtol=1e-4, atol=1e-5)
assert cache.lengths.tolist() == [40, 40]
assert counters["stats"]["unique_graphs"] == 1, counters["stats"]
"""


def test_example() -> None:
    run(EXAMPLE + CHECK)
