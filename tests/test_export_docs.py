"""The Python blocks of docs/export.md run as they stand, and do what the page says."""

from __future__ import annotations

from pathlib import Path

from tests.test_readme import blocks, run

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "export.md").read_text()
(_, PACKAGE), (_, DECISIONS), (_, SERVING) = blocks(PAGE, "python")

CHECK_PACKAGE = """
x = torch.randn(5, 77, 64)
with torch.no_grad():
    torch.testing.assert_close(run(x), model(x))
"""
CHECK_DECISIONS = """
assert [d.op for d in log.records if d.stage == "grouped"] == ["sliding_self", "full_self"]
"""
CHECK_SERVING = """
set_fetch_fn_for_attn_metadata(None)
assert [int(k_cache[page].abs().sum(dim=(1, 2)).count_nonzero()) for page in (7, 3)] == [6, 5]
with torch.no_grad():
    metadata = make_metadata([6], [2], [7])
    x = torch.randn(2, 64)
    model.attention.k_cache, model.attention.v_cache = k_cache.clone(), v_cache.clone()
    torch.testing.assert_close(run(x, metadata), model(x, metadata))
    assert torch.equal(k_cache, model.attention.k_cache)
"""
UNKNOWN = """
import torch

try:
    torch._inductor.aoti_load_package("blocks.pt2")
except RuntimeError as error:
    print(error)
"""


def in_folder(folder: Path, block: str) -> str:
    return run(f"import os, sys\nsys.path.insert(0, os.getcwd())\nos.chdir({str(folder)!r})\n{block}")


def test_package_and_what_was_decided(tmp_path: Path) -> None:
    in_folder(tmp_path, PACKAGE + CHECK_PACKAGE + DECISIONS + CHECK_DECISIONS)
    assert "Could not find schema for lowered_attn::" in in_folder(tmp_path, UNKNOWN)


def test_serving() -> None:
    run(SERVING + CHECK_SERVING)
