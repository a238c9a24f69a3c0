"""Paged masks' device functions, in Triton's interpreter, against the definition in plain Python."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from custom_ops.kernels.mask_functions import decorated_range_source, paged_functions
from custom_ops.paged.masks import paged_mask
from tests.paged_mask_cases import MODES, Request, Settings, random_requests

ROWS, KEYS = 16, 64


@triton.jit
def describe_requests(
    RANGE_OUT, ENDS_OUT, VISIBLE_OUT, REQUESTS,
    RANGE: tl.constexpr, VISIBLE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A program a request: of each row the range and what it sees; of all rows, as one tile, the range by its ends."""
    request = tl.program_id(0)
    base = REQUESTS + request * 6
    requests = (
        tl.load(base), tl.load(base + 1), tl.load(base + 2), tl.load(base + 3), tl.load(base + 4), tl.load(base + 5)
    )  # fmt: skip
    row, key = tl.arange(0, ROWS), tl.arange(0, KEYS)
    lower, upper = RANGE(requests[0] + row, requests)
    at = (request * ROWS + row) * 2
    tl.store(RANGE_OUT + at, lower)
    tl.store(RANGE_OUT + at + 1, upper)
    lower_first, _ = RANGE(requests[0], requests)
    _, upper_last = RANGE(requests[0] + ROWS - 1, requests)
    tl.store(ENDS_OUT + request * 2, lower_first)
    tl.store(ENDS_OUT + request * 2 + 1, upper_last)
    visible = VISIBLE((requests[0] + row)[:, None], key[None, :], requests)
    to = (request * ROWS + row)[:, None] * KEYS + key[None, :]
    tl.store(VISIBLE_OUT + to, tl.where(visible, 1, 0))


SETTINGS = [
    *(Settings(mode) for mode in MODES),
    *(Settings(mode, 4, 5) for mode in MODES),
    *(Settings(mode, 3, None, True) for mode in MODES),
]


@pytest.mark.parametrize("s", SETTINGS, ids=lambda s: f"{s.mode}-{s.id}")
def test_device_functions_agree_with_the_definition(s: Settings) -> None:
    requests = [*random_requests(24, seed=5), Request(0, 0, 0)]
    functions = paged_functions(s.mask)
    values = torch.tensor([r.slots(s.mask) for r in requests], dtype=torch.int32)
    ranges, ends = (torch.full((len(requests), n, 2), -9, dtype=torch.int32) for n in (ROWS, 1))
    visible = torch.full((len(requests), ROWS, KEYS), -9, dtype=torch.int32)
    describe_requests[(len(requests),)](
        ranges, ends, visible, values, RANGE=functions.range, VISIBLE=functions.visible, ROWS=ROWS, KEYS=KEYS
    )
    expected = np.stack([r.brute_force(s, ROWS, KEYS) for r in requests])
    np.testing.assert_array_equal(visible.numpy(), expected)
    key = np.arange(KEYS)
    inside = (ranges[..., :1].numpy() <= key) & (key < ranges[..., 1:].numpy())
    assert not (expected & ~inside).any()
    assert s.hole or (inside == expected).all()
    assert ends[:, 0, 0].tolist() == ranges[:, 0, 0].tolist()
    assert ends[:, 0, 1].tolist() == ranges[:, -1, 1].tolist()


def test_device_functions_are_made_once_and_can_be_read() -> None:
    mask = paged_mask("block_causal", block_size=8)
    assert paged_functions(mask) is paged_functions(mask)
    assert paged_functions(mask) is not paged_functions(paged_mask("block_causal", block_size=16))
    assert decorated_range_source(mask).count("@triton.jit\ndef paged_block_causal_block8_") == 2
    assert decorated_range_source(mask, gluon=True).count("@gluon.jit\ndef paged_block_causal_block8_") == 2
    assert "tl." not in decorated_range_source(mask, gluon=True)
