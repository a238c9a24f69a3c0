"""The products of attention that is written out: heads folded into requests, and dimensions in another order."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.recognising import repeat_kv, triangle
from tests.test_recognise_hand_written import check_left_alone, check_recognised, qkv

INF = float("-inf")
LENGTH = 6
Function = Callable[..., Any]


def folded(x: Tensor) -> Tensor:
    """``[B, H, L, D]`` as ``[B * H, L, D]``."""
    return x.reshape(x.shape[0] * x.shape[1], x.shape[2], x.shape[3])


def unfolded(x: Tensor, heads: int = 4) -> Tensor:
    return x.view(x.shape[0] // heads, heads, *x.shape[1:])


def hidden() -> Tensor:
    return ~triangle(LENGTH)


# ---------------------------------------------------------------------- recognised


def by_bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.bmm(folded(q), folded(k).transpose(1, 2)) / math.sqrt(8)
    return unfolded(torch.bmm(scores.masked_fill(hidden(), INF).softmax(-1), folded(v)))


def by_bmm_of_views(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The masks of BART's old attention: scores take their heads back, and give them up again."""
    weights = folded(q).contiguous().bmm(k.flatten(0, 1).mT) * 0.3
    weights = weights.view(2, 4, LENGTH, LENGTH) + torch.zeros(LENGTH, LENGTH, dtype=q.dtype).masked_fill(hidden(), INF)
    weights = F.softmax(weights.view(2 * 4, LENGTH, LENGTH), dim=-1)
    return torch.bmm(weights.reshape(2, 4, LENGTH, LENGTH).flatten(0, 1), folded(v)).view(2, 4, LENGTH, 8)


def by_matmul_of_three(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return unfolded((folded(q) @ folded(k).mT).masked_fill(hidden(), INF).softmax(2) @ folded(v))


def by_baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As diffusers has it: what is added does not count."""
    empty = torch.empty(8, LENGTH, LENGTH, dtype=q.dtype)
    scores = torch.baddbmm(empty, folded(q), folded(k).transpose(-1, -2), beta=0, alpha=0.3)
    return unfolded(torch.bmm(scores.masked_fill(hidden(), INF).softmax(-1), folded(v)))


def by_baddbmm_of_a_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.zeros(1, LENGTH, LENGTH, dtype=q.dtype).masked_fill(hidden(), INF)
    return unfolded(mask.baddbmm(batch1=folded(q), batch2=folded(k).mT, alpha=0.3).softmax(-1) @ folded(v))


def by_baddbmm_of_zeros(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As GPT-NeoX had it: scores are scaled, added to zeros, and then hidden with their heads unfolded."""
    zeros = torch.zeros(8, LENGTH, LENGTH, dtype=q.dtype)
    scores = torch.baddbmm(zeros, folded(q), folded(k).mT, beta=1.0, alpha=0.3).view(2, 4, LENGTH, LENGTH)
    return scores.where(triangle(LENGTH), torch.finfo(q.dtype).min).softmax(-1) @ v


def by_padding(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A mask that is expanded to every head of every request."""
    mask = hidden()[None, None].expand(2, 4, -1, -1).reshape(8, LENGTH, LENGTH)
    return unfolded((folded(q) @ folded(k).mT).masked_fill(mask, INF).softmax(2) @ folded(v))


def by_token_major_equations(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k).masked_fill(hidden(), INF)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).transpose(1, 2)


def by_equations_of_letters(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Any letters, any order, spaces and a list of operands."""
    scores = torch.einsum("zy x w, wzyv -> z y x v", [q, k.permute(3, 0, 1, 2)])
    return torch.einsum("abcd,dbae->ecab", scores.masked_fill(hidden(), INF).softmax(3), v.permute(2, 1, 0, 3)).permute(
        2, 3, 1, 0
    )


def by_equations_of_three(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("nid,njd->nij", folded(q), folded(k)).masked_fill(hidden(), INF)
    return unfolded(torch.einsum("nij,njd->nid", scores.softmax(-1), folded(v)))


def by_permuted_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """k is token-major, and transposed twice at once."""
    k = k.transpose(1, 2).contiguous()
    return (q @ k.permute(0, 2, 3, 1)).masked_fill(hidden(), INF).softmax(-1) @ v


SPELLINGS = (
    by_bmm, by_bmm_of_views, by_matmul_of_three, by_baddbmm, by_baddbmm_of_a_mask, by_baddbmm_of_zeros, by_padding,
    by_token_major_equations, by_equations_of_letters, by_equations_of_three, by_permuted_keys,
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("function", SPELLINGS, ids=lambda f: f.__name__)
def test_a_triangle(function: Function, dtype: torch.dtype) -> None:
    outcome = check_recognised(function, *qkv(dtype=dtype))
    (call,) = outcome.calls
    assert torch.equal(call.dense()[0], triangle(LENGTH))
    assert [tuple(t.shape) for t in call.tensors] == [(2, 4, LENGTH, 8)] * 3
    for name in ("bmm", "baddbmm", "einsum", "matmul"):
        assert outcome.count(name) == 0


@pytest.mark.parametrize("sizes", [(1, 4, 6), (2, 1, 6), (1, 1, 6), (2, 4, 1)])
@pytest.mark.parametrize("heads_first", [False, True])
def test_dimensions_of_one_element(sizes: tuple[int, int, int], heads_first: bool) -> None:
    batch, heads, length = sizes

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(0, 1).contiguous().transpose(0, 1) if heads_first else t for t in (q, k, v))
        scores = (folded(q) @ folded(k).mT).masked_fill(~triangle(length, 6), INF)
        return unfolded(scores.softmax(-1) @ folded(v), heads)

    inputs = [torch.randn(batch, heads, n, 8) for n in (length, 6, 6)]
    outcome = check_recognised(attend, *inputs)
    assert [tuple(t.shape) for t in outcome.calls[0].tensors] == [tuple(t.shape) for t in inputs]


def test_requests_of_one_head() -> None:
    """Three dimensions that nobody folded."""

    def attend(x: Tensor, keep: Tensor) -> Tensor:
        scores = torch.bmm(x, x.transpose(1, 2)) * 0.3 + torch.where(keep, 0.0, INF)[:, None]
        return torch.bmm(scores.softmax(-1), x)

    inputs = torch.randn(5, LENGTH, 16), torch.ones(5, LENGTH, dtype=torch.bool)
    check_left_alone(attend, *inputs, reason="a query may see no key")
    plain = lambda x: torch.bmm((torch.bmm(x, x.mT) * 0.3).masked_fill(hidden(), INF).softmax(-1), x)  # noqa: E731
    outcome = check_recognised(plain, inputs[0])
    assert [tuple(t.shape) for t in outcome.calls[0].tensors] == [(5, 1, LENGTH, 16)] * 3


def test_heads_that_were_folded_behind_tokens() -> None:
    """``[L, B * H, D]``, as fairseq had it: nothing tells heads from requests, and the mask need not."""

    def attend(x: Tensor) -> Tensor:
        q, k, v = (t.contiguous().view(LENGTH, 8, 8).transpose(0, 1) for t in x.chunk(3, dim=-1))
        out = torch.bmm(torch.bmm(q, k.transpose(1, 2)).masked_fill(hidden(), INF).softmax(-1), v)
        return out.transpose(0, 1).contiguous().view(LENGTH, 2, 32)

    outcome = check_recognised(attend, torch.randn(LENGTH, 2, 96))
    assert [tuple(t.shape) for t in outcome.calls[0].tensors] == [(8, 1, LENGTH, 8)] * 3


def test_repeated_heads_that_were_folded_are_grouped_again() -> None:
    for attend in (by_bmm, by_token_major_equations, by_permuted_keys):
        grouped = lambda q, k, v: attend(q, repeat_kv(k, 2), repeat_kv(v, 2))  # noqa: B023, E731
        outcome = check_recognised(grouped, *qkv((4, 2)))
        assert outcome.calls[0].tensors[1].shape[1] == 2


def test_a_sliding_window_and_one_graph_for_every_length() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])
        scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).masked_fill((j > i) | (i - j >= 3), INF)
        return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).unflatten(0, (-1, 4))

    outcome = check_recognised(attend, *qkv(), form="sliding_self", dynamic=True)
    assert outcome.calls[0].keywords["window"] == 3


def test_an_output_that_stays_folded_and_its_gradients() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project, self.out = nn.Linear(32, 96), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.project(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
            scores = torch.bmm(folded(q), folded(k).mT) * 0.3
            return self.out(torch.bmm(scores.masked_fill(hidden(), INF).softmax(-1), folded(v)))

    layer, x = Layer(), torch.randn(2, LENGTH, 32, requires_grad=True)
    outcome = check_recognised(layer, x)
    (gradient,) = torch.autograd.grad(outcome.result.square().sum(), x)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def attention(
    mask: Function | None = None, queries: Function = folded, keys: Function = lambda k: folded(k).mT,
    values: Function = folded, after: Function = lambda x: x, product: Function = torch.bmm,
) -> Function:  # fmt: skip
    """Folded attention with one of its parts replaced."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = product(queries(q), keys(k))
        scores = scores.masked_fill(hidden(), INF) if mask is None else mask(scores)
        return after(torch.bmm(scores.softmax(-1), values(v)))

    return attend


def _copied(k: Tensor) -> Tensor:
    return folded(k.transpose(1, 2).contiguous().transpose(1, 2))


def _written_later(k: Tensor) -> Tensor:
    """The copy is older than what it is a copy of."""
    token_major = k.transpose(1, 2).contiguous()
    keys = folded(token_major.transpose(1, 2))
    token_major.mul_(2)
    return keys.mT


def _written_itself(k: Tensor) -> Tensor:
    keys = _copied(k)
    keys[:, 0] = 2.0
    return keys.mT


ANY_KEYS: dict[str, Function] = {
    "the copied is written to": _written_later,
    "the copy is written to": _written_itself,
    "reshaped": lambda k: folded(k).reshape(8, 8, LENGTH),
    "folded the other way": lambda k: k.transpose(0, 1).reshape(8, LENGTH, 8).mT,
    "heads joined to tokens": lambda k: k.transpose(1, 2).reshape(8, LENGTH, 8).mT,
}
"""Keys that are no ``[B, H, L, D]`` any more: what the product reads is read, whatever it is made of."""


@pytest.mark.parametrize("keys", ANY_KEYS)
def test_keys_are_those_of_the_product(keys: str) -> None:
    outcome = check_recognised(attention(keys=ANY_KEYS[keys]), *(t.clone() for t in qkv()))
    assert outcome.calls[0].tensors[1].shape == (8, 1, LENGTH, 8)


def test_a_product_without_a_transpose() -> None:
    """Of as many features as keys, it is one with the keys transposed."""
    inputs = [torch.randn(2, 4, LENGTH, LENGTH) for _ in "qkv"]
    outcome = check_recognised(attention(keys=folded), *inputs)
    assert torch.equal(outcome.calls[0].tensors[1], inputs[1].mT)


# ---------------------------------------------------------------------- left alone


def keys_written_to(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k.clone()
    keys = folded(k)
    weights = torch.bmm(folded(q), keys.mT).masked_fill(hidden(), INF).softmax(-1)
    k.mul_(2)
    return torch.bmm(weights, folded(v))


def of_two_orders(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Weights change their rows for their columns on the way."""
    scores = torch.einsum("bhqd,bhkd->bhkq", q, k).masked_fill(hidden(), INF)
    return torch.einsum("bhkq,bhkd->bhqd", scores.softmax(-1), v)


def of_transposed_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k).masked_fill(hidden(), INF)
    return torch.einsum("bhqk,bhqd->bhkd", scores.softmax(-1), v)


def of_a_sum_of_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k).masked_fill(hidden(), INF)
    return torch.einsum("bhqk,bhkd->bqd", scores.softmax(-1), v)


def _masked(scale: float | None = None, **keywords: float) -> Function:
    def product(q: Tensor, k: Tensor) -> Tensor:
        mask = torch.zeros(1, LENGTH, LENGTH).masked_fill(hidden(), INF)
        scores = torch.baddbmm(mask, q, k, **keywords)
        return scores if scale is None else scores * scale

    return product


def plain(scores: Tensor) -> Tensor:
    return scores


def of_every_second_head(scores: Tensor) -> Tensor:
    odd = (torch.arange(8) % 2 == 0)[:, None, None]
    return scores.masked_fill(hidden() & odd, INF)


def heads_and_requests_exchanged(scores: Tensor) -> Tensor:
    return scores.view(4, 2, LENGTH, LENGTH).transpose(0, 1).reshape(8, LENGTH, LENGTH).masked_fill(hidden(), INF)


NEAR_MISSES: dict[str, tuple[Function, str | None]] = {
    "a mask of some heads": (attention(of_every_second_head), "differs by head"),
    "heads exchanged for requests": (attention(heads_and_requests_exchanged), None),
    "scores in another order": (
        attention(lambda s: s.reshape(4, 2, LENGTH, LENGTH).masked_fill(hidden(), INF).view(8, LENGTH, LENGTH)),
        "rearranges scores",
    ),
    "the output of one mask more": (
        attention(lambda s: s.masked_fill(torch.ones(8, LENGTH, LENGTH).triu(2) == 1, INF)), "no form"
    ),
    "a bias of data": (
        attention(plain, product=lambda q, k: torch.baddbmm(q @ k, q, k)), "values are not in the graph"
    ),
    "half a mask": (attention(plain, product=_masked(beta=0.5)), "scales what it adds"),
    "a mask that is scaled": (attention(plain, product=_masked(scale=0.5)), "hides scores that are scaled afterwards"),
    "a negative scale": (attention(plain, product=_masked(alpha=-1.0)), "no positive constant"),
    "a scale of nothing": (attention(plain, product=_masked(alpha=0.0)), "no positive constant"),
    "an output that is added to": (
        lambda q, k, v: torch.baddbmm(folded(v), attention_weights(q, k), folded(v)), "adds to the output"
    ),
    "queries of the weights": (of_transposed_values, "are no [B, H, L, L] or [N, L, L]"),
    "keys before queries": (of_two_orders, "are no [B, H, L, L] or [N, L, L]"),
    "heads that are summed": (of_a_sum_of_heads, "is no product over"),
    "keys that are written to": (keys_written_to, "is written to before its attention ends"),
}  # fmt: skip


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    return torch.bmm(folded(q), folded(k).mT).masked_fill(hidden(), INF).softmax(-1)


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_left_alone(name: str) -> None:
    function, reason = NEAR_MISSES[name]
    check_left_alone(function, *qkv(), reason=reason)
