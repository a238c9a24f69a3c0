"""Debug mode: values that make no sense are found and named."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lowered_attn import BlockDiffusionMetaData, CausalMetaData, set_debug
from lowered_attn.metadata import is_debug
from tests.test_metadata import PAGES, REQUESTS, fields, int32


@pytest.fixture(autouse=True)
def debug_mode_ends() -> Iterator[None]:
    yield
    set_debug(False)


def test_debug_mode_is_a_switch() -> None:
    broken = fields() | {"cu_seqlens_q": int32(0, 5, 3, 6)}
    assert not is_debug()
    metadata = CausalMetaData(**broken)
    with pytest.raises(ValueError, match=r"cu_seqlens_q\[2\]: expected at least 5"):
        metadata.validate()
    set_debug(True)
    assert is_debug()
    with pytest.raises(ValueError, match=r"cu_seqlens_q\[2\]: expected at least 5"):
        CausalMetaData(**broken)
    CausalMetaData(**fields()).without_tokens()


def test_debug_mode_is_the_environments_too() -> None:
    code = "import lowered_attn.metadata as m; print(m.is_debug())"
    for value, expected in (("1", "True"), ("0", "False"), ("", "False")):
        environment = os.environ | {"LOWERED_ATTN_DEBUG": value}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context_lens": int32(0, -1, 7)}, r"context_lens\[1\]: expected at least 0, got -1"),
        ({"context_lens": int32(0, 60, 7)}, "page_tables .request 1.: expected at most 32 tokens"),
        ({"valid_lens": int32(6, 0, 1)}, r"valid_lens\[0\]: expected 0 to 5"),
        ({"slot_mapping": torch.tensor([3, 1, 2, 3, 4, 71] + [-1] * 18)}, r"slot_mapping\[3\].* also at row 0"),
        ({"slot_mapping": torch.tensor([0, 1, 2, 3, 4, 71] + [5] * 18)}, r"slot_mapping\[\d+\] .padding.*got 5"),
        ({"status": int32(0, 2, 1)}, r"status\[1\]: expected 0 to 1, got 2; 0 = prefilling"),
        ({"prefix_lens": int32(0, 0, 5)}, r"prefix_lens\[2\]: expected 0 to 4, got 5"),
        ({"new_keys_in_cache": True, "slot_mapping": torch.tensor([0, 1, 2, 4, 3, 71] + [-1] * 18)},
         r"slot_mapping\[3\]: expected 3, where new_keys_in_cache promises that token 3 of request 0 is, got 4"),
        ({"new_keys_in_cache": True, "slot_mapping": torch.tensor([0, 1, 2, 3, 4, -1] + [-1] * 18)},
         r"slot_mapping\[5\]: expected 71, .* token 7 of request 2 is, got -1"),
    ],
)  # fmt: skip
def test_values_that_make_no_sense_are_named(change: dict[str, Any], message: str) -> None:
    values = {"valid_lens": int32(5, 0, 1), "status": int32(0, 0, 1)}
    values |= {"prefix_lens": int32(0, 1, 2), "padded_prefix_lens": int32(4, 4, 4)}
    sound = BlockDiffusionMetaData(**fields(), **values, mode="prefix_full", mask_prefix_hole=True)
    sound.validate(num_pages=REQUESTS * PAGES)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(sound, **change).validate(num_pages=REQUESTS * PAGES)


def test_the_promise_is_about_tokens_that_are_seen() -> None:
    """Not about those past valid_lens, and about none where nobody sees new keys."""
    values = fields() | {"slot_mapping": torch.tensor([0, 1, 2, -1, -1, 71] + [-1] * 18), "new_keys_in_cache": True}
    BlockDiffusionMetaData(**values, valid_lens=int32(3, 0, 1)).validate()
    with pytest.raises(ValueError, match="promises that token 3 of request 0"):
        BlockDiffusionMetaData(**values).validate()
    BlockDiffusionMetaData(**values, mode="cache_only").validate()
