"""Sequences that are packed side by side: told by positions that start again, or proved not to be there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.recognising import Function, check_left_alone, check_recognised, qkv

SDPA = F.scaled_dot_product_attention
LENGTH = 6
PACKED = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 3]])
Positions = Callable[[Tensor], Tensor]


def sequences(positions: Tensor) -> Tensor:
    """As ``find_packed_sequence_indices`` of Transformers has it: int64 ``[B, L]``, how many starts there were."""
    first = positions[:, :1] - 1
    return (torch.diff(positions, prepend=first, dim=-1) != 1).cumsum(-1)


def looked_up(ids: Tensor, window: int | None) -> Tensor:
    """As ``packed_sequence_mask_function`` has it, ``[B, 1, L, L]``."""
    batch = torch.arange(ids.shape[0])[:, None, None, None]
    rows = (torch.arange(ids.shape[1]) + 0)[None, None, :, None]
    columns = (torch.arange(ids.shape[1]) + 0)[None, None, None, :]
    mask = (columns <= rows) & (ids[batch, rows] == ids[batch, columns])
    return mask if window is None else mask & (columns > rows - window)


def attention(positions: Positions, window: int | None = None, ids: Function = sequences) -> Function:
    def attend(q: Tensor, k: Tensor, v: Tensor, *given: Tensor) -> Tensor:
        at = positions(*given) if given else positions(q)
        return SDPA(q, k, v, attn_mask=looked_up(ids(at), window), enable_gqa=True)

    return attend


def by_length(q: Tensor) -> Tensor:
    return (torch.arange(q.shape[2]) + 0).unsqueeze(0).expand(q.shape[0], -1)


ONE_SEQUENCE: dict[str, Positions] = {
    "transformers": by_length,
    "from another position": lambda q: (torch.arange(q.shape[2]) + 7)[None].repeat(2, 1),
    "from the end of an arange": lambda q: torch.arange(3, q.shape[2] + 3).expand(2, -1),
    "backwards twice": lambda q: -(-torch.arange(q.shape[2]))[None].expand(2, -1),
}


@pytest.mark.parametrize("positions", ONE_SEQUENCE)
@pytest.mark.parametrize(("window", "dynamic"), [(None, False), (None, True), (3, False)])
def test_one_sequence_is_no_operand(positions: str, window: int | None, dynamic: bool) -> None:
    """The difference of positions that count up is 1 everywhere, so nothing starts again."""
    form = "full_self" if window is None else "sliding_self"
    function = attention(ONE_SEQUENCE[positions], window)
    outcome = check_recognised(function, *qkv(), forms=(form,), dynamic=dynamic)
    assert outcome.calls[0].keywords.keys() <= {"window", "scale"}
    assert outcome.count("cumsum") == 0 and outcome.count("diff") == 0


def test_one_token() -> None:
    check_recognised(attention(by_length), *qkv(lengths=(1, 1)), forms=("bidirectional",))


SPELLINGS: dict[str, tuple[Function, str]] = {
    "running sum of a constant": (lambda at: torch.zeros(2, LENGTH, dtype=torch.int64).cumsum(dim=1), "full_self"),
    "of int32": (lambda at: sequences(at.int()), "full_self"),
    "documents of zeros": (torch.zeros_like, "full_self"),
    "joined first": (lambda at: (torch.diff(torch.cat([at[:, :1] - 1, at], 1)) != 1).cumsum(-1), "causal_from"),
    "padded afterwards": (lambda at: F.pad((torch.diff(at) != 1).cumsum(1), (1, 0)), "document_causal"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_sequences_that_are_spelled_otherwise(spelling: str) -> None:
    """What is not proved to be one sequence is compared."""
    ids, form = SPELLINGS[spelling]
    check_recognised(attention(by_length, ids=ids), *qkv(), forms=(form,))


STARTS = torch.tensor([[0, 0, 0, 3, 3, 5], [0, 0, 2, 2, 2, 2]])
"""The first tokens of the sequences in ``PACKED``."""


@pytest.mark.parametrize("window", [None, 1, 2, 3, LENGTH, 99])
def test_positions_that_are_an_input(window: int | None) -> None:
    """Sequences that are counted are in order: each query sees the keys from its sequence's start, or its window's."""
    outcome = check_recognised(attention(lambda at: at, window), *qkv(), PACKED, forms=("causal_from",))
    oldest = torch.arange(LENGTH) - (LENGTH if window is None else window - 1)
    assert torch.equal(outcome.calls[0].keywords["query_starts"], torch.maximum(STARTS, oldest))


def test_packed_sequences_with_padding_and_two_windows() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, at: Tensor, keep: Tensor) -> Tensor:
        narrow = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH) <= 2
        mask = narrow & looked_up(sequences(at), 4) & keep[:, None, None]
        return SDPA(q, k, v, attn_mask=mask, enable_gqa=True)

    keep = torch.ones(2, LENGTH, dtype=torch.bool)
    keep[1, 4] = False
    outcome = check_recognised(attend, *qkv(), PACKED, keep, forms=("causal_from",))
    oldest = torch.maximum(STARTS, torch.arange(LENGTH) - 2)
    assert torch.equal(outcome.calls[0].keywords["query_starts"], oldest)


def test_layers_share_their_starts() -> None:
    def layers(q: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
        ids = sequences(at)
        for window in (3, None, 3, None):
            q = SDPA(q, k, v, attn_mask=looked_up(ids, window), enable_gqa=True)
        return q

    outcome = check_recognised(layers, *qkv(), PACKED, forms=("causal_from",) * 4)
    assert outcome.count("searchsorted") == 2


def test_one_row_of_positions_for_all_requests() -> None:
    outcome = check_recognised(attention(lambda at: at.expand(2, -1), 3), *qkv(), PACKED[:1], forms=("causal_from",))
    oldest = torch.maximum(STARTS[:1], torch.arange(LENGTH) - 2)
    assert torch.equal(outcome.calls[0].keywords["query_starts"], oldest.expand(2, -1))


def test_documents_are_read_where_they_are() -> None:
    """Looked up at every query and key, they are the documents themselves: no element is gathered."""
    function = attention(lambda ids: ids, ids=lambda ids: ids)
    documents = torch.tensor([[0, 0, 1, 1, 2, 2], [5, 5, 5, 5, 9, 9]])
    outcome = check_recognised(function, *qkv(), documents, forms=("document_causal",))
    assert all(outcome.calls[0].keywords[f"{of}_documents"] is documents for of in ("query", "key"))


def test_documents_that_are_computed_from_data() -> None:
    """Gathered ids stay one operand where what they are made of is more than one."""
    for ids in (
        lambda at: at // 3, lambda at: (at - 1).abs(), lambda at: torch.where(at > 1, at, 7),
        lambda at: torch.where(at > 1, 1, 0), lambda at: (at > 1).long(),
    ):  # fmt: skip
        check_recognised(attention(lambda at: at, ids=ids), *qkv(), PACKED, forms=("document_causal",))


# ---------------------------------------------------------------------- other steps than 1

def _stepping_by_2(at: Tensor) -> Tensor:
    return (torch.diff(2 * at, prepend=2 * at[:, :1] - 2) != 1).cumsum(-1)


UNPROVED: dict[str, Positions] = {
    "in steps of 2": lambda q: torch.arange(0, 12, 2).expand(2, -1),
    "standing still": lambda q: torch.zeros(2, LENGTH, dtype=torch.int64),
    "counting down": lambda q: (6 - torch.arange(LENGTH)).expand(2, -1),
    "two sequences": lambda q: (torch.arange(LENGTH) % 3).expand(2, -1),
    "a step up": lambda q: torch.where(torch.arange(LENGTH) < 3, 0, 1).expand(2, -1),
}
"""What is prepended does not continue these backwards, or their differences are no one number."""


@pytest.mark.parametrize("positions", UNPROVED)
def test_positions_that_do_not_count_up_by_one_stay_sequences(positions: str) -> None:
    check_recognised(attention(UNPROVED[positions]), *qkv(), forms=("causal_from",))


@pytest.mark.parametrize("ids", [_stepping_by_2, lambda at: torch.ones_like(at).cumsum(1)])
def test_tokens_that_are_all_sequences_of_their_own(ids: Function) -> None:
    outcome = check_recognised(attention(by_length, ids=ids), *qkv(), forms=("sliding_self",))
    assert outcome.calls[0].keywords["window"] == 1


def _same_sequence(at: Tensor) -> Tensor:
    ids = sequences(at)[:, None]
    return ids[:, :, :, None] == ids[:, :, None]


def _sliding() -> Tensor:
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    return (distance >= 0) & (distance < 3)


def _every_second(at: Tensor) -> Tensor:
    """A new sequence at every second token: not one number again and again."""
    return torch.ones_like(at).cumsum(1) // 2


NEAR_MISSES: dict[str, tuple[Function, str]] = {
    "counted twice": (attention(by_length, ids=_every_second), "no form"),
    "ids from data, and a window": (attention(lambda at: at, window=3, ids=lambda at: at), "no form"),
    "numbers from data that are summed up": (
        attention(lambda at: at, window=3, ids=lambda at: at.cumsum(1)), "no form"
    ),
    "starts in data, counted over requests": (
        attention(lambda at: at, window=3, ids=lambda at: (at == 0).cumsum(0)), "no form"
    ),
    "starts in data, counted from the end": (
        attention(lambda at: at, window=3, ids=lambda at: -(at == 0).cumsum(1)), "no form"
    ),
    "another sequence than the query's, from data": (
        lambda q, k, v, at: SDPA(q, k, v, attn_mask=~_same_sequence(at) & _sliding()), "no form"
    ),
    "sequences from data that see what comes": (
        lambda q, k, v, at: SDPA(q, k, v, attn_mask=_same_sequence(at) & _sliding().mT), "no form"
    ),
    "looked up from the end": (
        lambda q, k, v: SDPA(q, k, v, attn_mask=torch.arange(6)[:, None] >= torch.arange(6)[torch.arange(6) - 6]),
        "no form",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_left_alone(name: str) -> None:
    function, reason = NEAR_MISSES[name]
    given: tuple[Any, ...] = (PACKED,) if "data" in name else ()
    check_left_alone(function, *qkv(heads=(4, 4)), *given, reason=reason)
