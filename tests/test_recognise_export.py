"""Exported programs are recognised as Dynamo's graphs are: the same spellings, and the same near-misses left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import recognising
from tests import test_recognise_hand_written as hand_written
from tests import test_recognise_masks as masks
from tests import test_recognise_sdpa as sdpa
from tests.test_recognise_sdpa_near_misses import NEAR_MISSES


@pytest.fixture(autouse=True)
def in_exported_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (recognising, hand_written, masks):
        monkeypatch.setattr(module, "recognised", recognising.recognised_in_export)


@pytest.mark.parametrize("spelling", sdpa.CAUSAL)
def test_causal_attention(spelling: str) -> None:
    recognising.check_recognised(sdpa.CAUSAL[spelling], *recognising.qkv())


@pytest.mark.parametrize("repeated", sdpa.REPEATED)
def test_repeated_heads_are_read_once(repeated: str) -> None:
    repeat = sdpa.REPEATED[repeated]
    causal = lambda q, k, v: sdpa.SDPA(q, repeat(k), repeat(v), is_causal=True)  # noqa: E731
    outcome = recognising.check_recognised(causal, *recognising.qkv())
    assert [t.shape[1] for t in outcome.calls[0].tensors] == [4, 2, 2]


@pytest.mark.parametrize(("triangle", "window", "padding", "written", "length"), masks.random_spellings(27))
def test_a_composed_mask_is_its_form(triangle: str, window: Any, padding: Any, written: str, length: int) -> None:
    masks.test_a_composed_mask_is_its_form(triangle, window, padding, written, length)


@pytest.mark.parametrize("function", hand_written.SPELLINGS, ids=lambda f: f.__name__)
def test_attention_written_out(function: Callable[..., Tensor]) -> None:
    outcome = hand_written.check_recognised(function, *hand_written.qkv())
    assert torch.equal(outcome.calls[0].dense()[0], hand_written.triangle())


@pytest.mark.parametrize("name", NEAR_MISSES)
@pytest.mark.filterwarnings("ignore:.*batching rule")
def test_near_misses_are_left_alone(name: str) -> None:
    make, _ = NEAR_MISSES[name]
    function, inputs = make()
    recognising.check_left_alone(function, *inputs, reason="")


@pytest.mark.parametrize("name", hand_written.NEAR_MISSES)
def test_near_misses_written_out_are_left_alone(name: str) -> None:
    function, reason = hand_written.NEAR_MISSES[name]
    hand_written.check_left_alone(function, *hand_written.qkv(), reason=None if reason is None else "")
