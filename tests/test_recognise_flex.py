"""``flex_attention`` as users write it becomes a form's op; what only looks like it is left alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, and_masks, create_block_mask, flex_attention, or_masks

from lowered_attn import explain
from tests.recognising import Outcome, recognised

pytestmark = pytest.mark.filterwarnings("ignore:return_lse is deprecated:FutureWarning")

BATCH, LENGTH = 2, 150  # more than one block of 128, and none that is whole
Function = Callable[..., Any]


@pytest.fixture(autouse=True)
def quiet() -> Any:
    """Eager flex_attention warns that it is slow."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        yield


def qkv(heads: tuple[int, int] = (4, 4), lengths: tuple[int, int] = (LENGTH, LENGTH), **keywords: Any) -> list[Tensor]:
    shapes = ((heads[0], lengths[0]), (heads[1], lengths[1]), (heads[1], lengths[1]))
    return [torch.randn(BATCH, *shape, 8, **keywords) for shape in shapes]


def blocks(mask_mod: Function, batch: int | None = None, lengths: tuple[int, int] = (LENGTH, LENGTH)) -> BlockMask:
    return create_block_mask(mask_mod, batch, None, *lengths, device="cpu")


def causal(b: Any, h: Any, i: Any, j: Any) -> Any:
    return i >= j


def masked(mask_mod: Function, batch: int | None = None, **keywords: Any) -> Function:
    """Attention under a mask that is made in the compiled code."""
    return lambda q, k, v: flex_attention(q, k, v, block_mask=blocks(mask_mod, batch), **keywords)


def check_recognised(function: Function, *inputs: Any, form: str, **keywords: Any) -> Outcome:
    """The call is recognised as the form that is named, and the result is the user's."""
    expected = function(*inputs)
    outcome = recognised(function, *inputs, **keywords)
    assert not outcome.of_stage("refused"), outcome.decisions
    assert [d.op for d in outcome.of_stage("recognised")] == [form]
    assert len(outcome.calls) == 1 and outcome.count("flex_attention") == 0
    torch.testing.assert_close(outcome.result, expected, rtol=1e-4, atol=1e-5)
    return outcome


def check_left_alone(function: Function, *inputs: Any, reason: str, **keywords: Any) -> None:
    """Nothing changes, the reason is recorded, and the result is the user's."""
    expected = function(*inputs)
    outcome = recognised(function, *inputs, **keywords)
    assert not outcome.calls and not outcome.of_stage("recognised")
    (refused,) = outcome.of_stage("refused")
    assert refused.op == "flex_attention" and reason in refused.detail, refused.detail
    torch.testing.assert_close(outcome.result, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


# ---------------------------------------------------------------------- recognised


def sliding(b: Any, h: Any, i: Any, j: Any) -> Any:
    return (i >= j) & (i - j < 17)


def window(b: Any, h: Any, i: Any, j: Any) -> Any:
    return i - j <= 16


def prefix_17(b: Any, h: Any, i: Any, j: Any) -> Any:
    return j < 17


def without_heads(b: Any, h: Any, i: Any, j: Any) -> Any:
    return torch.where(i < j, False, True)


MASKS: dict[str, tuple[Function, str]] = {
    "causal": (causal, "full_self"),
    "turned around": (lambda b, h, i, j: ~(j > i), "full_self"),
    "by where": (without_heads, "full_self"),
    "by a difference": (lambda b, h, i, j: i - j >= 0, "full_self"),
    "sliding": (sliding, "sliding_self"),
    "sliding by and_masks": (and_masks(causal, window), "sliding_self"),
    "prefix of a constant": (or_masks(causal, prefix_17), "prefix_lm"),
    "everything": (lambda b, h, i, j: j >= 0, "bidirectional"),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_positions(name: str) -> None:
    mask_mod, form = MASKS[name]
    outcome = check_recognised(masked(mask_mod), *qkv(), form=form)
    seen = outcome.calls[0].dense()
    rows, columns = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    zero = torch.tensor(0)
    assert torch.equal(seen[0], mask_mod(zero, zero, rows, columns).expand(LENGTH, LENGTH))


def test_no_mask_at_all_is_bidirectional() -> None:
    check_recognised(flex_attention, *qkv(lengths=(5, 150)), form="bidirectional")


def documents(ids: Tensor) -> Function:
    return lambda b, h, i, j: ids[b, i] == ids[b, j]


def test_documents_both_ways_and_causal() -> None:
    ids = torch.randint(3, (BATCH, LENGTH)).sort(1)[0]
    inputs = (*qkv(), ids)

    def both_ways(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        return flex_attention(q, k, v, block_mask=blocks(documents(ids), BATCH))

    def forward_only(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        return flex_attention(q, k, v, block_mask=blocks(and_masks(causal, documents(ids)), BATCH))

    same = ids[:, :, None] == ids[:, None]
    assert torch.equal(check_recognised(both_ways, *inputs, form="document").calls[0].dense(), same)
    outcome = check_recognised(forward_only, *inputs, form="document_causal")
    assert torch.equal(outcome.calls[0].dense(), same.tril())


def test_documents_of_one_packed_sequence_for_all_requests() -> None:
    ids = torch.arange(LENGTH) // 40

    def attend(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        return flex_attention(q, k, v, block_mask=blocks(lambda b, h, i, j: (ids[i] == ids[j]) & (i >= j)))

    check_recognised(attend, *qkv(), ids, form="document_causal")


def test_prefixes_starts_and_padding_of_requests() -> None:
    lengths, starts = torch.tensor([100, 3]), torch.tensor([7, 40])
    padding = torch.rand(BATCH, LENGTH) < 0.2

    def prefix(q: Tensor, k: Tensor, v: Tensor, n: Tensor) -> Tensor:
        return flex_attention(q, k, v, block_mask=blocks(lambda b, h, i, j: (i >= j) | (j < n[b]), BATCH))

    def started(q: Tensor, k: Tensor, v: Tensor, n: Tensor) -> Tensor:
        mask = blocks(lambda b, h, i, j: i + n[b] >= j, BATCH, (9, LENGTH))
        return flex_attention(q, k, v, block_mask=mask)

    def padded(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
        return flex_attention(q, k, v, block_mask=blocks(lambda b, h, i, j: (i >= j) & ~hidden[b, j], BATCH))

    outcome = check_recognised(prefix, *qkv(), lengths, form="prefix_lm")
    assert torch.equal(outcome.calls[0].keywords["prefix_lens"], lengths.int())
    outcome = check_recognised(started, *qkv(lengths=(9, LENGTH)), starts, form="full_self")
    assert torch.equal(outcome.calls[0].keywords["q_start"], starts.int())
    outcome = check_recognised(padded, *qkv(), padding, form="full_self")
    assert torch.equal(outcome.calls[0].keywords["key_padding"], padding)


def test_scale_grouped_heads_and_the_log_sum_exp() -> None:
    function = masked(sliding, enable_gqa=True, scale=0.3, return_lse=True)
    outcome = check_recognised(function, *qkv((4, 2)), form="sliding_self")
    assert outcome.calls[0].keywords["scale"] == 0.3 and outcome.calls[0].tensors[1].shape[1] == 2


@pytest.mark.parametrize(
    "score_mod",
    [
        lambda s, b, h, i, j: 2.5 * torch.tanh(s / 2.5),
        lambda s, b, h, i, j: torch.tanh(s * 0.4) * 2.5,
    ],
    ids=["divided", "multiplied"],
)
def test_a_soft_cap(score_mod: Function) -> None:
    outcome = check_recognised(masked(causal, score_mod=score_mod), *qkv(), form="full_self")
    assert outcome.calls[0].keywords["softcap"] == 2.5


def test_scores_that_a_score_mod_hides() -> None:
    def hide(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return torch.where(i >= j, s, -math.inf)

    check_recognised(lambda q, k, v: flex_attention(q, k, v, score_mod=hide), *qkv(), form="full_self")


def test_layers_that_share_a_block_mask() -> None:
    ids = torch.randint(3, (BATCH, LENGTH))

    def layers(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        mask = blocks(and_masks(causal, documents(ids)), BATCH)
        return flex_attention(flex_attention(q, k, v, block_mask=mask), k, v, block_mask=mask)

    inputs = (*qkv(), ids)
    outcome = recognised(layers, *inputs)
    assert [d.op for d in outcome.of_stage("recognised")] == ["document_causal"] * 2
    torch.testing.assert_close(outcome.result, layers(*inputs), rtol=1e-4, atol=1e-5)


def test_dynamic_lengths() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, block_mask=blocks(causal, lengths=(q.shape[2], k.shape[2])))

    check_recognised(attend, *qkv(), form="full_self", dynamic=True)


def test_explain_says_what_became_of_it() -> None:
    said = str(explain(masked(sliding), *qkv()))
    assert "flex_attention whose mask is sliding_self's, window 17" in said


# ---------------------------------------------------------------------- block masks from outside


def attend_with(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    return flex_attention(q, k, v, block_mask=mask)


def test_a_block_mask_from_outside_is_the_users_word() -> None:
    inputs = (*qkv(), blocks(sliding))
    check_left_alone(attend_with, *inputs, reason="pass options={'trust_block_masks': True} if that made all of yours")
    check_recognised(attend_with, *inputs, form="sliding_self", trust_block_masks=True)
    compiled = torch.compile(attend_with, backend="lowered_attn", options={"trust_block_masks": True})
    torch.testing.assert_close(compiled(*inputs), attend_with(*inputs), rtol=1e-4, atol=1e-5)


def test_blocks_that_hide_more_than_their_mask_mod_says() -> None:
    """What trust is about: the first block of keys is listed for no query but its own."""
    count, which = torch.ones(1, 1, 2, dtype=torch.int32), torch.tensor([[[[0, 1], [1, 0]]]], dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(count, which, BLOCK_SIZE=128, mask_mod=causal, seq_lengths=(LENGTH, LENGTH))
    expected = torch.compile(attend_with, fullgraph=True)(*(inputs := (*qkv(), mask)))
    full = torch.nn.functional.scaled_dot_product_attention(*inputs[:3], is_causal=True)
    assert (expected - full).abs().max() > 0.1
    torch.compiler.reset()
    compiled = torch.compile(attend_with, backend="lowered_attn", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- left alone


NEAR_MISSES: dict[str, tuple[Function, str]] = {
    "a triangle the other way": (masked(lambda b, h, i, j: i <= j), "no form sees what its mask says"),
    "the diagonal left out": (masked(lambda b, h, i, j: i > j), "no form sees what its mask says"),
    "one key too many": (masked(lambda b, h, i, j: i + 1 >= j), "no form sees what its mask says"),
    "a window both ways": (masked(lambda b, h, i, j: (i - j < 9) & (j - i < 9)), "no form sees what its mask says"),
    "a sink and a window": (
        masked(lambda b, h, i, j: (i >= j) & ((i - j < 9) | (j < 4))),
        "no form sees what its mask says",
    ),
    "dilated": (masked(lambda b, h, i, j: (i >= j) & ((i - j) % 2 == 0)), "its mask"),
    "another mask for one head": (masked(lambda b, h, i, j: (i >= j) | (h == 0)), "its mask_mod: it differs by head"),
    "another mask for one request": (
        masked(lambda b, h, i, j: (i >= j) | (b == 0), BATCH),
        "its mask_mod: it depends on the request's number",
    ),
    "a product of positions": (masked(lambda b, h, i, j: i * i >= j * j), "no form sees what its mask says"),
    "scores with a bias": (masked(causal, score_mod=lambda s, b, h, i, j: s + (j - i)), "its score_mod"),
    "scores twice as large": (masked(causal, score_mod=lambda s, b, h, i, j: s * 2.0), "its score_mod"),
    "a cap that caps at another number": (
        masked(causal, score_mod=lambda s, b, h, i, j: 3.0 * torch.tanh(s / 2.0)),
        "its score_mod: it changes scores, and by more than a soft-cap",
    ),
    "a cap of what is hidden": (
        masked(
            lambda b, h, i, j: j >= 0, score_mod=lambda s, b, h, i, j: torch.tanh(torch.where(i >= j, s, -math.inf))
        ),
        "its score_mod: it changes scores",
    ),
    "scores hidden by a number": (
        masked(causal, score_mod=lambda s, b, h, i, j: torch.where(i - j < 9, s, -5.0)),
        "its score_mod: it replaces scores by numbers",
    ),
    "a kernel that is asked for": (
        masked(causal, kernel_options={"BACKEND": "TRITON"}),
        "kernel_options ask for the kernel 'TRITON' by name",
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_left_alone(name: str) -> None:
    function, reason = NEAR_MISSES[name]
    check_left_alone(function, *qkv(), reason=reason)


def test_masks_that_depend_on_data_are_left_alone() -> None:
    dense = torch.rand(LENGTH, LENGTH) < 0.5
    other = torch.randint(3, (BATCH, LENGTH))

    def tabulated(q: Tensor, k: Tensor, v: Tensor, dense: Tensor) -> Tensor:
        return flex_attention(q, k, v, block_mask=blocks(lambda b, h, i, j: dense[i, j]))

    def greater(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        return flex_attention(q, k, v, block_mask=blocks(lambda b, h, i, j: ids[b, i] >= ids[b, j], BATCH))

    def next_to(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        longer = torch.cat([ids, ids[:, :1]], 1)
        return flex_attention(q, k, v, block_mask=blocks(lambda b, h, i, j: longer[b, i + 1] == longer[b, j], BATCH))

    check_left_alone(tabulated, *qkv(), dense, reason="holds a value for every query and key")
    check_left_alone(greater, *qkv(), other, reason="no form sees what its mask says")
    check_left_alone(next_to, *qkv(), other, reason="its mask_mod")


def test_blocks_of_another_mask_are_left_alone() -> None:
    def paired(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        made = blocks(sliding)
        wrong = BlockMask.from_kv_blocks(
            made.kv_num_blocks, made.kv_indices, made.full_kv_num_blocks, made.full_kv_indices,
            made.BLOCK_SIZE, causal, seq_lengths=(LENGTH, LENGTH),
        )  # fmt: skip
        return flex_attention(q, k, v, block_mask=wrong)

    def fewer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        made = blocks(causal)
        wrong = BlockMask.from_kv_blocks(
            made.kv_num_blocks.clamp(max=1), made.kv_indices, None, None, made.BLOCK_SIZE, causal,
            seq_lengths=(LENGTH, LENGTH),
        )  # fmt: skip
        return flex_attention(q, k, v, block_mask=wrong)

    for function in (paired, fewer):
        check_left_alone(function, *qkv(), reason="blocks are not those that create_block_mask makes of its mask_mod")


def test_documents_that_are_written_to_after_their_block_mask() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        ids = ids.clone()
        mask = blocks(documents(ids), BATCH)
        ids[:, 0] = 7
        return flex_attention(q, k, v, block_mask=mask)

    outcome = recognised(attend, *qkv(), torch.zeros(BATCH, LENGTH, dtype=torch.int64))
    assert not outcome.calls and "written to" in outcome.of_stage("refused")[0].detail


def test_vmapped_attention_is_left_alone() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.vmap(lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))(
            *(t[None] for t in (q, k, v))
        )

    outcome = recognised(attend, *qkv())
    assert not outcome.calls and "functorch transform" in outcome.of_stage("refused")[0].detail
