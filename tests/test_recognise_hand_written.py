"""Attention written out becomes a form's op; what only looks like it is left alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.recognising import Outcome, recognised
from tests.test_recognise_sdpa import repeat_kv

INF = float("-inf")
LENGTH = 6
Function = Callable[..., Any]


def qkv(heads: tuple[int, int] = (4, 4), lengths: tuple[int, int] = (LENGTH, LENGTH), **keywords: Any) -> list[Tensor]:
    shapes = ((heads[0], lengths[0]), (heads[1], lengths[1]), (heads[1], lengths[1]))
    return [torch.randn(2, *shape, 8, **keywords) for shape in shapes]


def triangle(n: int = LENGTH) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def check_recognised(function: Function, *inputs: Any, form: str = "full_self", **keywords: Any) -> Outcome:
    """The call is recognised as the form that is named, and the result is the user's."""
    expected = function(*inputs)
    outcome = recognised(function, *inputs, **keywords)
    assert not outcome.of_stage("refused"), outcome.decisions
    assert [d.op for d in outcome.of_stage("recognised")] == [form]
    assert len(outcome.calls) == 1 and outcome.count("softmax") == 0
    low = outcome.calls[0].tensors[0].dtype == torch.bfloat16
    torch.testing.assert_close(outcome.result, expected, rtol=2e-2 if low else 1e-4, atol=2e-2 if low else 1e-5)
    return outcome


def check_left_alone(function: Function, *inputs: Any, reason: str | None) -> None:
    """Nothing changes, the reason is recorded (None where it is not even taken for attention), and the result is the
    user's bit for bit."""
    torch.manual_seed(0)
    expected = function(*inputs)
    torch.manual_seed(0)
    outcome = recognised(function, *inputs)
    assert not outcome.calls and not outcome.of_stage("recognised")
    refused = outcome.of_stage("refused")
    assert len(refused) == (reason is not None)
    assert all(reason in d.detail for d in refused), refused
    torch.testing.assert_close(outcome.result, expected, rtol=0, atol=0, equal_nan=True)


# ---------------------------------------------------------------------- recognised


def by_masked_fill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.size(-1))
    scores = scores.masked_fill(triangle() == 0, INF)
    return torch.matmul(F.softmax(scores, dim=-1), v)


def by_least_number(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * 0.3
    scores = scores.masked_fill(~triangle(), torch.finfo(scores.dtype).min)
    return scores.softmax(-1) @ v


def by_addition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.full((LENGTH, LENGTH), INF, dtype=q.dtype).triu(1)
    return torch.softmax(0.3 * (q @ k.permute(0, 1, 3, 2)) + mask, dim=3) @ v


def by_where(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    positions = torch.arange(LENGTH)
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k)
    scores = torch.where(positions[:, None] >= positions, scores, INF)
    return torch.einsum("bhqk,bhkd->bhqd", scores.softmax(dim=-1), v)


def in_fp32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.3
    scores = scores.masked_fill(~triangle(), INF)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    weights = F.dropout(weights, p=0.0, training=True)
    return torch.matmul(weights, v)


def scores_in_fp32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.transpose(2, 3)).float() * 0.3 + torch.full((LENGTH, LENGTH), INF).triu(1)
    return F.dropout(scores.softmax(-1), p=0.5, training=False).type_as(v) @ v


def scaled_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores are scaled by both numbers, and so are the form's."""
    return ((q @ k.transpose(2, 3) * 0.5) / 4).masked_fill(~triangle(), INF).softmax(-1) @ v


SPELLINGS = (by_masked_fill, by_least_number, by_addition, by_where, in_fp32, scores_in_fp32, scaled_twice)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("function", SPELLINGS, ids=lambda f: f.__name__)
def test_a_triangle(function: Function, dtype: torch.dtype) -> None:
    outcome = check_recognised(function, *qkv(dtype=dtype))
    assert torch.equal(outcome.calls[0].dense()[0], triangle())


def test_a_sliding_triangle() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
        scores = q @ k.transpose(2, 3) * 0.3
        return scores.masked_fill((j > i) | (i - j >= 3), INF).softmax(-1) @ v

    outcome = check_recognised(attend, *qkv(), form="sliding_self")
    assert outcome.calls[0].keywords["window"] == 3


def test_no_mask_is_bidirectional() -> None:
    inputs = qkv(lengths=(3, 7))
    check_recognised(lambda q, k, v: (q @ k.transpose(2, 3)).softmax(-1) @ v, *inputs, form="bidirectional")


def test_a_soft_cap_between_scale_and_mask() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.matmul(q, k.transpose(2, 3)) * 0.3
        scores = torch.tanh(scores / 2.5) * 2.5
        return (scores + torch.full((LENGTH, LENGTH), INF).triu(1)).softmax(-1) @ v

    keywords = check_recognised(attend, *qkv()).calls[0].keywords
    assert keywords["softcap"] == 2.5 and keywords["scale"] == pytest.approx(0.3)


def test_repeated_keys_and_values_are_grouped_again() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return by_masked_fill(q, repeat_kv(k, 2), repeat_kv(v, 2))

    outcome = check_recognised(attend, *qkv((4, 2)))
    assert outcome.calls[0].tensors[1].shape[1] == 2


def test_a_module_in_eval_mode_and_its_gradients() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project, self.dropout = nn.Linear(32, 96), nn.Dropout(0.1)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.project(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
            scores = (q @ k.transpose(-2, -1)) * 8**-0.5
            weights = self.dropout(scores.masked_fill(~triangle(), INF).softmax(-1))
            return (weights @ v).transpose(1, 2).flatten(2)

    layer, x = Layer().eval(), torch.randn(2, LENGTH, 32, requires_grad=True)
    outcome = check_recognised(layer, x)
    (gradient,) = torch.autograd.grad(outcome.result.sum(), x)
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    assert not recognised(layer.train(), x).calls


# ---------------------------------------------------------------------- left alone


def with_mask(mask: Callable[[Tensor, Tensor], Tensor], number: float = INF) -> Function:
    """Attention whose scores are replaced where the mask is true of a query's and a key's index."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        return (q @ k.transpose(2, 3) * 0.3).masked_fill(mask(i, j), number).softmax(-1) @ v

    return attend


def scaled_after_its_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.transpose(2, 3)).masked_fill(~triangle(), -1e38) * 1e-38).softmax(-1) @ v


def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(2, 3)).masked_fill(~triangle(), -1e38).softmax(-2) @ v


def dropped_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.transpose(2, 3)).masked_fill(~triangle(), INF).softmax(-1), p=0.5) @ v


def weights_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = (q @ k.transpose(2, 3)).masked_fill(~triangle(), INF).softmax(-1)
    return weights @ v, weights


def scores_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ k.transpose(2, 3)
    return scores.masked_fill(~triangle(), INF).softmax(-1) @ v, scores


def keys_not_transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.reshape(2, 4, 8, LENGTH)).masked_fill(~triangle(), INF).softmax(-1) @ v


def with_a_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    distance = torch.arange(LENGTH) - torch.arange(LENGTH)[:, None]
    return (q @ k.transpose(2, 3) + distance.float()).masked_fill(~triangle(), INF).softmax(-1) @ v


def gated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.transpose(2, 3)).masked_fill(~triangle(), INF)
    return (scores.softmax(-1) * 0.5) @ v


def scaled_by_a_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(2, 3) * v.mean()).masked_fill(~triangle(), INF).softmax(-1) @ v


def keys_written_to(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = k.clone(), v.clone()
    weights = (q @ k.transpose(2, 3)).masked_fill(~triangle(), INF).softmax(-1)
    k[:, :, 0] = 3.0
    return weights @ v


def hidden_by_data(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(2, 3)).masked_fill(v[0, 0, :, 0] < 0, INF).softmax(-1) @ v


def a_mixture(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.softmax(-1) @ k.transpose(2, 3) @ v


NEAR_MISSES: dict[str, tuple[Function, str | None]] = {
    "the triangle transposed": (with_mask(lambda i, j: j < i), "no form sees what its mask says"),
    "one key too many": (with_mask(lambda i, j: j > i + 1), "no form sees what its mask says"),
    "the diagonal hidden": (with_mask(lambda i, j: j >= i), "no form sees what its mask says"),
    "a query that sees nothing": (with_mask(lambda i, j: (j > i) | (j == 0)), "a query may see no key"),
    "hidden by a small number": (with_mask(lambda i, j: j > i, -5.0), "replaces scores by what may not hide them"),
    "keys hidden by data": (hidden_by_data, "a query may see no key"),
    "scaled after its mask": (scaled_after_its_mask, "hides scores that are scaled afterwards"),
    "softmax over queries": (over_queries, "is not over the keys"),
    "dropout": (dropped_out, "dropout, which no form has"),
    "weights that are returned": (weights_returned, "is read by something else as well"),
    "scores that are returned": (scores_returned, "are read elsewhere too"),
    "keys that are not transposed": (keys_not_transposed, "a reshape that neither splits nor joins"),
    "a bias": (with_a_bias, "where a constant is needed"),
    "weights that are scaled": (gated, None),
    "a scale from data": (scaled_by_a_tensor, "scales scores by no positive constant"),
    "keys that are written to": (keys_written_to, "is written to before its attention ends"),
    "a softmax of no scores": (a_mixture, None),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_left_alone(name: str) -> None:
    function, reason = NEAR_MISSES[name]
    check_left_alone(function, *qkv(), reason=reason)
