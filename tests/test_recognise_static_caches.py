"""Steps with a static cache: what their masks read is written to before attention, and is read as it was then."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.recognising import Function, Outcome, check_left_alone, check_recognised, qkv, recognised, repeat_kv

SDPA = F.scaled_dot_product_attention
KEYS = 16
"""Length of the caches."""


def check_step(function: Function, *inputs: Any, forms: tuple[str, ...] = ("full_self",), **keywords: Any) -> Outcome:
    """Every call is recognised, and what it returns and leaves in its inputs is the user's."""
    theirs, ours = copy.deepcopy(inputs), copy.deepcopy(inputs)
    expected = function(*theirs)
    outcome = recognised(function, *ours, **keywords)
    assert not outcome.of_stage("refused"), outcome.decisions
    assert tuple(d.op for d in outcome.of_stage("recognised")) == forms
    torch.testing.assert_close(outcome.result, expected, rtol=1e-4, atol=1e-5)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    return outcome


def caches(layers: int = 1, batch: int = 2) -> list[Tensor]:
    return [torch.randn(batch, 2, KEYS, 8) for _ in range(2 * layers)]


def mask_of(seen: Tensor, new: int, window: int | None = None) -> Tensor:
    """As Transformers makes it: the queries come after ``seen`` cached tokens, which may be one number or [B, 1]."""
    rows, columns = (torch.arange(new) + seen)[..., :, None], torch.arange(KEYS)
    mask = columns <= rows
    return mask if window is None else mask & (columns > rows - window)


def stored(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """As ``StaticLayer.update`` of Transformers has it: the number of cached tokens grows in place."""
    at = torch.arange(k.shape[2]) + seen
    seen.add_(k.shape[2])
    keys.index_copy_(2, at, k)
    values.index_copy_(2, at, v)
    return keys, values


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("window", [None, 4])
def test_a_step_that_counts_its_tokens(new: int, window: int | None) -> None:
    def step(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
        mask = mask_of(seen, new, window)
        keys, values = stored(keys, values, k, v, seen)
        return SDPA(q, repeat_kv(keys, 2), repeat_kv(values, 2), attn_mask=mask)

    form = "full_self" if window is None else "sliding_self"
    outcome = check_step(step, *qkv(lengths=(new, new)), *caches(), torch.tensor(5), forms=(form,))
    (call,) = outcome.calls
    assert torch.equal(call.keywords["q_start"], torch.tensor([5, 5], dtype=torch.int32))
    assert call.tensors[1].shape[1] == 2


def test_layers_share_one_copy_of_the_first_ones_count() -> None:
    """Transformers makes one mask for all layers, from the number of the first; each layer has a number of its own."""

    def step(q: Tensor, k: Tensor, v: Tensor, *given: Tensor) -> Tensor:
        (*cached, first, second), out = given, q
        mask = mask_of(first, 1)
        for layer, seen in enumerate((first, second)):
            keys, values = stored(*cached[2 * layer : 2 * layer + 2], k, v, seen)
            out = SDPA(out, keys, values, attn_mask=mask, enable_gqa=True)
        return out

    numbers = (torch.tensor(5), torch.tensor(5))
    outcome = check_step(step, *qkv(lengths=(1, 1)), *caches(layers=2), *numbers, forms=("full_self",) * 2)
    assert outcome.count("clone") == 1 and outcome.count("clamp") == 1  # and one start for both
    assert [call.keywords["q_start"].tolist() for call in outcome.calls] == [[5, 5], [5, 5]]


def test_numbers_of_each_request_grow_after_the_mask() -> None:
    def step(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
        mask = mask_of(seen[:, None], 1)[:, None]
        seen += 1
        seen += 1
        return SDPA(q, keys, values, attn_mask=mask, enable_gqa=True)

    outcome = check_step(step, *qkv(lengths=(1, 1)), *caches(), torch.tensor([3, 9]))
    assert outcome.calls[0].keywords["q_start"].tolist() == [3, 9]


def test_padding_that_is_cleared_after_the_mask() -> None:
    def step(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        mask = (torch.arange(6)[:, None] >= torch.arange(6)) & keep[:, None, None]
        keep.logical_not_()
        return SDPA(q, k, v, attn_mask=mask)

    keep = torch.ones(2, 6, dtype=torch.bool)
    keep[1, 4:] = False
    outcome = check_step(step, *qkv(heads=(4, 4)), keep)
    assert torch.equal(outcome.calls[0].keywords["key_padding"], ~keep)


@pytest.mark.parametrize("negated", [False, True])
def test_padding_that_is_cleared_between_two_layers(negated: bool) -> None:
    """Both read the padding as it was when their masks were made, though the first could read the tensor itself."""

    def step(q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
        keep = ~given if negated else given
        first = SDPA(q, k, v, attn_mask=(torch.arange(6)[:, None] >= torch.arange(6)) & keep[:, None, None])
        second = (torch.arange(6)[:, None] >= torch.arange(6)) & keep[:, None, None]
        given.logical_not_()
        return SDPA(first, k, v, attn_mask=second)

    keep = torch.ones(2, 6, dtype=torch.bool)
    keep[1, 4:] = False
    check_step(step, *qkv(heads=(4, 4)), ~keep if negated else keep, forms=("full_self",) * 2)


def test_masks_before_and_after_a_write() -> None:
    """Of one tensor at two times, the later mask reads what it computed itself: a number a request."""

    def step(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        first = SDPA(q, k, v, attn_mask=mask_of(seen, 1), enable_gqa=True)
        seen.add_(2)
        return SDPA(first, k, v, attn_mask=mask_of(seen, 1), enable_gqa=True)

    outcome = check_step(step, *qkv(lengths=(1, KEYS)), torch.tensor(5), forms=("full_self",) * 2)
    assert [call.keywords["q_start"].tolist() for call in outcome.calls] == [[5, 5], [7, 7]]


def test_a_position_that_is_a_symbol() -> None:
    """A Python int that differs from call to call is an input of the graph."""

    def full(q: Tensor, k: Tensor, v: Tensor, seen: int) -> Tensor:
        mask = torch.arange(KEYS) <= (torch.arange(2) + seen)[:, None]
        return SDPA(q, k, v, attn_mask=mask, enable_gqa=True)

    def sliding(q: Tensor, k: Tensor, v: Tensor, seen: int) -> Tensor:
        rows, columns = (torch.arange(2) + seen)[:, None], torch.arange(KEYS)
        return SDPA(q, k, v, attn_mask=(columns <= rows) & (columns > rows - 4), enable_gqa=True)

    for function, form in ((full, "full_self"), (sliding, "sliding_self")):
        outcome = check_recognised(function, *qkv(lengths=(2, KEYS)), 5, forms=(form,), dynamic=True)
        assert outcome.calls[0].keywords["q_start"].tolist() == [5, 5]


@pytest.mark.parametrize("seen", [2, 9])
def test_a_rolling_cache(seen: int) -> None:
    """``StaticSlidingWindowLayer``: the first key is that of position ``max(seen - 3, 0)``, which a guard decides."""

    def step(q: Tensor, k: Tensor, v: Tensor, seen: int) -> Tensor:
        full = seen >= 4
        rows, columns = (torch.arange(1) + seen)[:, None], torch.arange(4) + max(seen - 3, 0)
        mask = (columns <= rows) & (columns > rows - 4)
        out = SDPA(q, k, v, attn_mask=mask, enable_gqa=True)
        return out if full else out + 1

    form = "full_self" if seen >= 4 else "sliding_self"
    outcome = check_recognised(step, *qkv(lengths=(1, 4)), seen, forms=(form,), dynamic=True)
    assert outcome.calls[0].keywords["q_start"].tolist() == [min(seen, 3)] * 2


# ---------------------------------------------------------------------- numbers past int32

FAR = (2**31 + 1, 2**32 + 2, 2**62, -(2**31) - 3)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shift", [0, 3])
def test_starts_of_each_dtype(dtype: torch.dtype, shift: int) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, start: Tensor) -> Tensor:
        rows = start[:, None] + torch.arange(3) + shift
        return SDPA(q, k, v, attn_mask=(rows[..., None] >= torch.arange(KEYS))[:, None], enable_gqa=True)

    outcome = check_recognised(attend, *qkv(lengths=(3, KEYS)), torch.tensor([2, 9], dtype=dtype))
    assert outcome.calls[0].keywords["q_start"].dtype == torch.int32


@pytest.mark.parametrize("far", FAR)
def test_starts_past_int32_do_not_wrap(far: int) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, start: Tensor) -> Tensor:
        rows = start[:, None] + torch.arange(3)
        return SDPA(q, k, v, attn_mask=(rows[..., None] >= torch.arange(KEYS))[:, None], enable_gqa=True)

    check_recognised(attend, *qkv(lengths=(3, KEYS)), torch.tensor([far, 4]))


@pytest.mark.parametrize("far", FAR)
def test_windows_past_int32_do_not_wrap(far: int) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, start: Tensor) -> Tensor:
        rows, columns = (start[:, None] + torch.arange(3))[..., None], torch.arange(KEYS)
        return SDPA(q, k, v, attn_mask=((rows >= columns) & (rows - columns < 4))[:, None], enable_gqa=True)

    check_recognised(attend, *qkv(lengths=(3, KEYS)), torch.tensor([far, 4]), forms=("sliding_self",))


@pytest.mark.parametrize("far", FAR)
def test_prefixes_past_int32_do_not_wrap(far: int) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, prefix: Tensor) -> Tensor:
        rows, columns = torch.arange(6)[:, None], torch.arange(6)
        return SDPA(q, k, v, attn_mask=(rows >= columns) | (columns < prefix[:, None, None, None]), enable_gqa=True)

    check_recognised(attend, *qkv(), torch.tensor([far, 4]), forms=("prefix_lm",))


# ---------------------------------------------------------------------- written to before the mask reads it

WRITES: dict[str, Callable[[Tensor], Any]] = {
    "add_": lambda t: t.add_(1),
    "a view of it": lambda t: t.view(1).fill_(2),
    "copy_": lambda t: t.copy_(torch.tensor(2)),
}


@pytest.mark.parametrize("written", WRITES)
def test_each_read_is_as_the_mask_had_it(written: str) -> None:
    """What is computed from a number that changed before is an operand itself, where one query makes it one number."""

    def step(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        WRITES[written](seen)
        mask = torch.arange(6) <= (torch.arange(1) + seen)[:, None]
        WRITES[written](seen)
        mask = mask & (torch.arange(6) >= seen - 2)
        seen.add_(1)
        return SDPA(q, k, v, attn_mask=mask)

    check_step(step, *qkv(heads=(4, 4), lengths=(1, 6)), torch.tensor(3), forms=("bidirectional",))


def _written_before(write: Callable[[Tensor], Any]) -> Function:
    def step(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        write(seen)
        return SDPA(q, k, v, attn_mask=mask_of(seen, 3)[:, :6])

    return step


def _written_between(write: Callable[[Tensor], Any]) -> Function:
    """Queries from the number as it was, the window from the number as it is."""

    def step(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        mask = mask_of(seen, 3)[:, :6]
        write(seen)
        oldest = (torch.arange(3) + seen - 4)[:, None]
        return SDPA(q, k, v, attn_mask=mask & (torch.arange(6) > oldest))

    return step


def _another_written_before(write: Callable[[Tensor], Any]) -> Function:
    """Another input of its dtype may be the same tensor: the graph does not say."""

    def step(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, other: Tensor) -> Tensor:
        write(other)
        return SDPA(q, k, v, attn_mask=mask_of(seen, 3)[:, :6])

    return step


def _reshaped(write: Callable[[Tensor], Any]) -> Function:
    def step(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        rows = torch.arange(3) + seen
        mask = torch.arange(6) <= rows[:, None]
        rows.unsqueeze_(0)
        write(seen)
        return SDPA(q, k, v, attn_mask=mask)

    return step


NEAR_MISSES: dict[str, tuple[Callable[[Callable[[Tensor], Any]], Function], int, str]] = {
    "before": (_written_before, 1, "no form"),
    "between two reads": (_written_between, 1, "no form"),
    "another input": (_another_written_before, 2, "no form"),
    "reshaped in place": (_reshaped, 1, "written to in place"),
}


@pytest.mark.parametrize("written", WRITES)
@pytest.mark.parametrize("name", NEAR_MISSES)
def test_numbers_of_another_time(name: str, written: str) -> None:
    function, numbers, reason = NEAR_MISSES[name]
    given = [torch.tensor(2 + i) for i in range(numbers)]
    check_left_alone(function(WRITES[written]), *qkv(heads=(4, 4), lengths=(3, 6)), *given, reason=reason)
