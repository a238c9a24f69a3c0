"""Calls of ``scaled_dot_product_attention`` that only look like a form's, or that nothing proves: left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.recognising import (
    Function,
    check_left_alone,
    check_recognised,
    qkv,
    recognised,
    repeat_kv,
    triangle,
)

SDPA = F.scaled_dot_product_attention
INF = float("-inf")

_LENGTHS = torch.tensor([2, 5])
_BIAS = torch.tensor([0.5, 0.25, 0.125, 0.0625])
Make = Callable[[], tuple[Function, tuple[Any, ...]]]


def masked(mask: Function, *given: Tensor, heads: tuple[int, int] = (4, 4), lengths: tuple[int, int] = (6, 6)) -> Make:
    return lambda: (
        lambda q, k, v, *t: SDPA(q, k, v, attn_mask=mask(*t), enable_gqa=heads[0] != heads[1]),
        (*qkv(heads, lengths), *given),
    )


def called(function: Function, *given: Any, **keywords: Any) -> Make:
    return lambda: (function, (*qkv(**{"heads": (4, 4), **keywords}), *given))


def _written_later(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = triangle(6)
    mask[0, 3] = True
    return SDPA(q, k, v, attn_mask=mask)


def _view_written_later(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = triangle(6)
    row = mask[2]
    row.fill_(True)
    return SDPA(q, k, v, attn_mask=mask)


def _written_as_another_dtype(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = triangle(6)
    mask.view(torch.uint8).fill_(1)
    return SDPA(q, k, v, attn_mask=mask)


def _reshaped_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows = torch.arange(6).unsqueeze(0)
    return SDPA(q, k, v, attn_mask=rows.t_() >= torch.arange(6))


def _per_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    distance = torch.arange(6)[:, None] - torch.arange(6)
    return SDPA(q, k, v, attn_mask=(distance >= 0) & (distance < torch.arange(1, 5)[:, None, None]))


def _alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    distance = torch.arange(6)[:, None] - torch.arange(6)
    bias = -slopes[:, None, None] * distance
    return SDPA(q, k, v, attn_mask=bias.masked_fill(distance < 0, INF))


def _float(number: float) -> Tensor:
    return torch.zeros(6, 6).masked_fill(~triangle(6), number)


NEAR_MISSES: dict[str, tuple[Make, str]] = {
    "triangle one too low": (masked(lambda: torch.ones(6, 6).tril(-1).bool() | (torch.arange(6) == 0)), "no form"),
    "triangle one too high": (masked(lambda: torch.ones(6, 6).tril(1).bool()), "no form"),
    "compared with one more": (masked(lambda: torch.arange(6)[:, None] + 1 >= torch.arange(6)), "no form"),
    "transposed triangle": (masked(lambda: triangle(6).T), "no form"),
    "upper triangle": (masked(lambda: torch.ones(6, 6, dtype=torch.bool).triu()), "no form"),
    "flipped comparison": (masked(lambda: torch.arange(6)[:, None] <= torch.arange(6)), "no form"),
    "bottom right, one short": (
        masked(lambda: torch.arange(3)[:, None] + 4 >= torch.arange(6), lengths=(3, 6)), "no form"
    ),
    "a hole in the triangle": (
        masked(lambda: triangle(6) & (torch.arange(6)[:, None] - torch.arange(6) != 2)), "no form"
    ),
    "window to both sides": (
        masked(lambda: (torch.arange(6)[:, None] - torch.arange(6)).abs() < 3), "no form"
    ),
    "dilated window": (
        masked(lambda: triangle(6) & ((torch.arange(6)[:, None] - torch.arange(6)) % 2 == 0)), "no form"
    ),
    "window from a tensor": (
        masked(lambda w: triangle(6) & (torch.arange(6)[:, None] - torch.arange(6) < w), torch.tensor(3)), "no form"
    ),
    "window of a head each": (called(_per_head), "head"),
    "mask from data": (masked(lambda m: m, torch.rand(6, 6) < 2), "every query and key"),
    "triangle or data": (masked(lambda m: triangle(6) | m, torch.rand(6, 6) < 0.5), "every query and key"),
    "mask a head, from data": (masked(lambda m: m & triangle(6), torch.rand(1, 4, 1, 6) < 2), "head"),
    "padding that is or-ed": (
        masked(lambda keep: triangle(6) | keep[:, None, None], torch.rand(2, 6) < 0.5), "differently for each query"
    ),
    "padded queries": (
        masked(lambda keep: triangle(6) & keep[:, None, :, None], torch.ones(2, 6, dtype=torch.bool)),
        "by request or query",
    ),
    "mask that depends on a sum": (
        masked(lambda x: triangle(6) & (x.sum() > 0), torch.ones(3)), "sum"
    ),
    "ALiBi": (called(_alibi, _BIAS), "slopes"),
    "additive bias": (masked(lambda: torch.where(triangle(6), 0.5, INF)), "adds 0.5"),
    "additive mask of -1e4": (masked(lambda: _float(-1e4)), "adds -10000"),
    "additive mask of ones": (masked(lambda: torch.tril(torch.ones(6, 6))), "adds 1"),
    "additive mask, the wrong way round": (masked(lambda: torch.full((6, 6), INF).tril(-1)), "no form"),
    "float mask from data": (masked(lambda m: m, torch.zeros(6, 6)), "every query and key"),
    "padding of floats": (masked(lambda m: m[:, None, None], torch.zeros(2, 6)), "torch.float32"),
    "least number where a query may see nothing": (
        masked(
            lambda keep: torch.zeros(2, 1, 6, 6).masked_fill(~(triangle(6) & keep[:, None, None]), torch.finfo().min),
            torch.tensor([[False, True, True, True, True, True], [True] * 6]),
        ), "may see no key",
    ),
    "dropout": (called(lambda q, k, v: SDPA(q, k, v, is_causal=True, dropout_p=0.5)), "dropout"),
    "negative scale": (called(lambda q, k, v: SDPA(q, k, v, is_causal=True, scale=-1.0)), "scale"),
    "mask written to": (called(_written_later), "written to"),
    "mask written to through a view": (called(_view_written_later), "written to"),
    "mask written to as another dtype": (called(_written_as_another_dtype), "written to"),
    "mask reshaped in place": (called(_reshaped_in_place), "in place"),
    "three dimensions": (lambda: (lambda q: SDPA(q, q, q, is_causal=True), (torch.randn(4, 6, 8),)), "3 dimensions"),
    "batch that is broadcast": (
        lambda: (lambda q, k: SDPA(q, k, k, is_causal=True), (torch.randn(2, 4, 6, 8), torch.randn(1, 4, 6, 8))),
        "batch",
    ),
    "heads too wide": (called(lambda q, k, v: SDPA(q, k, v, is_causal=True), dim=264), "1 to 256"),
    "vmap": (
        lambda: (torch.vmap(lambda q: SDPA(q, q, q, is_causal=True)), (torch.randn(3, 2, 4, 6, 8),)), "vmap"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISSES)
@pytest.mark.filterwarnings("ignore:.*batching rule")
def test_near_misses_are_left_alone(name: str) -> None:
    make, reason = NEAR_MISSES[name]
    function, inputs = make()
    check_left_alone(function, *inputs, reason=reason)


def test_attention_inside_a_function_of_torchs_is_reported() -> None:
    layer = nn.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(2, 6, 32)
    attention = lambda x: layer(x, x, x, need_weights=False)[0]  # noqa: E731
    outcome = recognised(attention, x)
    assert [d.op for d in outcome.of_stage("refused")] == ["multi_head_attention_forward"]
    torch.testing.assert_close(outcome.result, attention(x))


def test_a_mask_and_is_causal_at_once() -> None:
    """An error from torch 2.15 on, and on CUDA; before, a CPU takes them for both, and does so by itself."""
    both = lambda q, k, v: SDPA(q, k, v, attn_mask=triangle(6), is_causal=True)  # noqa: E731
    arguments = qkv(heads=(4, 4))
    try:
        both(*arguments)
    except RuntimeError:
        with pytest.raises(RuntimeError, match="is_causal"):
            recognised(both, *arguments)
    else:
        check_left_alone(both, *arguments, reason="at once")


def test_a_tensor_as_scale() -> None:
    """A symbol of a scale is no constant: a graph that has one would be right for one call alone."""

    def scaled(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return SDPA(q, k, v, is_causal=True, scale=scale)

    arguments = qkv(heads=(4, 4))
    for scale in (0.3, 0.4, 0.5):
        outcome = recognised(scaled, *arguments, scale, dynamic=True)
        torch.testing.assert_close(outcome.result, scaled(*arguments, scale))
        assert len(outcome.decisions) == 1


@pytest.mark.parametrize(
    "repeat",
    [
        pytest.param(lambda x: x.repeat(1, 2, 1, 1), id="tiled heads"),
        pytest.param(lambda x: torch.cat([x, x], dim=1), id="joined heads"),
        pytest.param(lambda x: repeat_kv(x, 2).flip(1), id="flipped heads"),
        pytest.param(lambda x: repeat_kv(x, 2)[:, [0, 2, 1, 3]], id="permuted heads"),
        pytest.param(lambda x: x[:, None].expand(2, 2, 2, 6, 8).reshape(2, 4, 6, 8), id="expanded before the heads"),
        pytest.param(lambda x: x.mT.repeat_interleave(2, dim=3).reshape(2, 4, 8, 6).mT, id="tokens"),
        pytest.param(lambda x: repeat_kv(x, 2) * 1.5, id="scaled after"),
        pytest.param(lambda x: x.repeat_interleave(torch.tensor([1, 3]), dim=1, output_size=4), id="unequal"),
    ],
)
def test_other_repetitions_stay(repeat: Callable[[Tensor], Tensor]) -> None:
    """Attention itself is recognised, over the heads that the user made."""
    outcome = check_recognised(lambda q, k, v: SDPA(q, repeat(k), repeat(v), is_causal=True), *qkv())
    assert [t.shape[1] for t in outcome.calls[0].tensors] == [4, 4, 4]


def test_k_repeated_but_not_v() -> None:
    q, k, _ = qkv()
    v = torch.randn(2, 4, 6, 8)
    outcome = check_recognised(lambda q, k, v: SDPA(q, repeat_kv(k, 2), v, is_causal=True), q, k, v)
    assert [t.shape[1] for t in outcome.calls[0].tensors] == [4, 4, 4]


def test_v_repeated_but_not_k() -> None:
    """Forms let KV heads share values."""
    q, _, v = qkv()
    k = torch.randn(2, 4, 6, 8)
    outcome = check_recognised(lambda q, k, v: SDPA(q, k, repeat_kv(v, 2), is_causal=True), q, k, v)
    assert [t.shape[1] for t in outcome.calls[0].tensors] == [4, 4, 2]
