"""Cosines and sines of equal angles are computed once: counts, equal results, and what must be left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import lowered_attn  # noqa: F401
from inductor_passes import decisions
from inductor_passes.share_angles import ONCE, TURNS, ShareAngles
from lowered_attn.compile import backend
from lowered_attn.layers import apply_rope
from tests.test_op_protocol import check

OPS = torch.ops.lowered_attn
POSITIONS = torch.tensor([3, 0, 7, 4, 5])


def q_and_k(q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    return apply_rope(q, positions), apply_rope(k, positions)


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 5, 4, 16), torch.randn(2, 5, 1, 16)


def shared(fn: Callable[..., Any], *arguments: Tensor) -> tuple[int, int, int]:
    """Cosines and sines in the graph of ``fn`` before and after the pass, and kept ones; results are the same."""
    graph = make_fx(fn)(*arguments)

    def count(*targets: Any) -> int:
        return sum(len(graph.graph.find_nodes(op="call_function", target=target)) for target in targets)

    before, share = count(*TURNS), ShareAngles()
    share(graph.graph)
    graph.graph.lint()
    graph.recompile()
    torch.manual_seed(1)
    expected = fn(*arguments)
    torch.manual_seed(1)
    torch.testing.assert_close(graph(*arguments), expected, rtol=0, atol=0)
    return before, count(*TURNS), count(ONCE)


def test_q_and_k_are_turned_by_the_same() -> None:
    assert shared(q_and_k, *inputs(), POSITIONS) == (4, 2, 2)


def test_other_positions_and_another_base_have_their_own() -> None:
    def two(q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return apply_rope(q, positions), apply_rope(k, positions + 1)

    def bases(q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return apply_rope(q, positions), apply_rope(k, positions, base=500.0)

    assert shared(two, *inputs(), POSITIONS) == (4, 4, 4)
    assert shared(bases, *inputs(), POSITIONS) == (4, 4, 4)


def test_angles_that_take_no_computing_stay_where_they_are_read() -> None:
    def two(q: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        return q * angles.cos(), q * (2 * angles).sin()

    assert shared(two, inputs()[0], torch.randn(16)) == (2, 2, 0)


def test_random_angles_are_never_the_same() -> None:
    def two(q: Tensor) -> Tensor:
        return (torch.rand(5) * 3 - 1).exp().cos() - (torch.rand(5) * 3 - 1).exp().cos()

    assert shared(two, inputs()[0]) == (2, 2, 2)


def test_numbers_that_are_equal_but_of_another_type_are_not_the_same() -> None:
    def two(x: Tensor) -> tuple[Tensor, Tensor]:
        return (x * 3 + 1 - x).cos(), (x * 3 + True - x).cos()

    before, after, _ = shared(two, torch.randn(4))
    assert before == after == 2


@pytest.mark.parametrize("serving", [True, False], ids=["serving", "training"])
def test_graphs_that_serve_are_changed_and_no_others(serving: bool) -> None:
    cache = torch.zeros(4, 4, 16)

    def step(q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        q, k = q_and_k(q, k, positions)
        if serving:
            OPS.store_latent_cache(k[0, :, 0], cache, torch.arange(5))
        return q, k

    torch.compiler.reset()
    with torch.no_grad(), decisions.recording() as log:
        actual = torch.compile(step, backend=backend, fullgraph=True)(*inputs(), POSITIONS)
    torch.testing.assert_close(actual, q_and_k(*inputs(), POSITIONS))
    assert [name for name, *_ in log.graphs].count("ShareAngles") == serving
    if serving:
        torch.testing.assert_close(cache.view(16, 16)[:5], actual[1][0, :, 0])


def test_opcheck() -> None:
    check(ONCE, (torch.randn(3, 4)[:, ::2],))
