"""The forward and backward kernels, launched as eager CUDA calls launch them, in Triton's interpreter.

In fp32 only: the interpreter's bf16 products are wrong. Outputs start as NaN, so that what a kernel leaves unwritten
shows.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from custom_ops.form import default_scale, empty_gradients, empty_outputs
from custom_ops.forms import FORMS
from custom_ops.kernels import launch
from custom_ops.kernels.tile_config import TileConfig
from tests.helpers import (
    LAYOUTS,
    Call,
    Case,
    Grads,
    Results,
    assert_as_exact_as_the_reference,
    assert_outputs_are_well_formed,
    cotangents,
    dense_mask,
    make,
    pairwise,
)

# Rows that see nothing take the logarithm of 0 before it is replaced.
pytestmark = [
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log2"),
    # Triton 3.6's interpreter makes scalars in a way that numpy deprecates.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.runtime.interpreter"),
]

SMALL = TileConfig(16, 16, 4, 1)
TILINGS = (SMALL, TileConfig(32, 16, 4, 1), TileConfig(16, 64, 4, 1), TileConfig(64, 32, 8, 2))
"""Square, tall, wider than every sequence here, and both large."""
SELF_LENGTHS = ((37, 37, False), (1, 1, False), (37, 37, True), (5, 41, True), (32, 32, False), (41, 5, True))
CROSS_LENGTHS = ((37, 11), (1, 1), (21, 37), (32, 32))
on_forms = pytest.mark.parametrize("name", FORMS)


@pytest.fixture(autouse=True)
def unwritten_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(allocate: Any) -> Any:
        return lambda *tensors: tuple(t.fill_(math.nan) for t in allocate(*tensors))

    monkeypatch.setattr(launch, "empty_outputs", poisoned(empty_outputs))
    monkeypatch.setattr(launch, "empty_gradients", poisoned(empty_gradients))


def interpret(call: Call, grads: Grads = None, tiling: TileConfig = SMALL) -> Results:
    """Results of the kernels; gradients where ``grads`` are given."""
    slots, scale = call.form.slots(call.operands), default_scale(call.q, call.scale)
    out, lse = launch.forward(call.form, *call.qkv, slots, scale, call.softcap, tiling)
    if grads is None:
        return Results(out, lse)
    gradients = launch.backward(call.form, *grads, *call.qkv, out, lse, slots, scale, call.softcap, tiling)
    return Results(out, lse, *gradients)


def cases(name: str) -> list[Any]:
    """Every two settings of one form together at least once."""
    factors = {
        "lengths": SELF_LENGTHS if FORMS[name].self_attention else CROSS_LENGTHS,
        "tiling": TILINGS,
        "dims": ((16, 16), (24, 8), (5, 40)),
        "heads": ((4, 2), (7, 1), (2, 2)),
        "padding": ("none", "some", "first"),
        "band": (1, 5, 20),
        "may_be_full": (None, True, False),
        "heads_together": (None, 1, 2),
        "batch": (2, 3),
        "softcap": (0.0, 0.7),
    }
    params = []
    for row in pairwise(factors):
        query_len, key_len, *q_start = row.pop("lengths")
        launched = [row.pop(key) for key in ("tiling", "may_be_full", "heads_together")]
        case = Case(name, lengths=(query_len, key_len), q_start=any(q_start), **row)
        tiling, may_be_full, heads_together = launched
        suffix = f"m{tiling.block_m}n{tiling.block_n}-full_{may_be_full}-together_{heads_together}"
        params.append(pytest.param(case, *launched, id=f"{case}-{suffix}"))
    return params


@pytest.mark.parametrize("case, tiling, may_be_full, heads_together", [p for name in FORMS for p in cases(name)])
def test_values_and_gradients_are_as_exact_as_the_reference(
    case: Case,
    tiling: TileConfig,
    may_be_full: bool | None,
    heads_together: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Both loops must be right whatever the launcher finds out about full tiles, and any order of programs.
    if may_be_full is not None:
        monkeypatch.setattr(launch, "may_be_full", lambda *_: may_be_full)
    if heads_together is not None:
        monkeypatch.setattr(launch, "heads_together", lambda *_: heads_together)
    call = make(case)
    grads = cotangents(call)
    results = interpret(call, grads, tiling)
    assert_outputs_are_well_formed(results.out, results.lse, call)
    assert_as_exact_as_the_reference(results, call, grads)


# One value head for all KV heads, for pairs of them, and for groups of query heads that share KV heads too. Past 256
# elements the gradients of k and v come from transposed products.
SHARED_VALUES = (
    {"heads": (3, 3), "value_heads": 1, "dims": (16, 264)},
    {"heads": (4, 4), "value_heads": 2, "dims": (24, 8), "padding": "some"},
    {"heads": (4, 2), "value_heads": 1, "dims": (16, 16), "lengths": (5, 41), "q_start": True},
)


@pytest.mark.parametrize("settings", SHARED_VALUES, ids=lambda s: "h{}x{}v{}".format(*s["heads"], s["value_heads"]))
@on_forms
def test_values_that_heads_share(name: str, settings: dict[str, Any]) -> None:
    call = make(Case(name, **settings))
    grads = cotangents(call)
    results = interpret(call, grads, TileConfig(32, 16, 4, 1))
    assert_outputs_are_well_formed(results.out, results.lse, call)
    assert_as_exact_as_the_reference(results, call, grads)
    # The same products in the same order as with a copy of the values for every KV head.
    sharing = call.k.shape[1] // call.v.shape[1]
    copied = dataclasses.replace(call, v=call.v.repeat_interleave(sharing, 1))
    expanded = interpret(copied, grads, TileConfig(32, 16, 4, 1))
    for a, b in zip(results[:4], expanded[:4], strict=True):
        assert torch.equal(a, b)
    assert expanded.dv is not None and results.dv is not None
    torch.testing.assert_close(results.dv, expanded.dv.unflatten(1, (-1, sharing)).sum(2))


@on_forms
def test_any_strides(name: str) -> None:
    for layout in LAYOUTS:
        call = make(Case(name, lengths=(20, 20), layout=layout, padding="some", heads=(2, 1)))
        grad_out, grad_lse = cotangents(call)
        for grads in (
            (grad_out[:1, :1, :1, :1].expand_as(grad_out), grad_lse),
            (grad_out.mT.contiguous().mT, grad_lse.mT.contiguous().mT),
        ):
            assert_as_exact_as_the_reference(interpret(call, grads), call, grads)
        shared = make(Case(name, lengths=(20, 20), layout=layout, heads=(4, 4), value_heads=2))
        grads = cotangents(shared)
        assert_as_exact_as_the_reference(interpret(shared, grads), shared, grads)


@on_forms
def test_gradients_through_lse_alone_and_out_alone(name: str) -> None:
    call = make(Case(name, lengths=(20, 20), dims=(16, 24), scale=0.3, softcap=0.7))
    grad_out, grad_lse = cotangents(call)
    for grads in ((grad_out, None), (None, grad_lse)):
        assert_as_exact_as_the_reference(interpret(call, grads), call, grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("softcap", [1e-37, 0.01, 1.0, 5.0, 50.0, 1e30])
def test_a_soft_cap_of_any_size(softcap: float, dtype: torch.dtype) -> None:
    """Scores of up to about 15: all of them at the cap, some, or none."""
    case = Case("sliding_self", dtype, lengths=(33, 33), scale=1.0, softcap=softcap, padding="some", band=20)
    call = make(case)
    grads = cotangents(call)
    assert_as_exact_as_the_reference(interpret(call, grads), call, grads)


@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=str)
@on_forms
def test_what_lies_in_hidden_keys_reaches_nothing(name: str, poison: float) -> None:
    call = make(Case(name, padding="some", q_start=True, heads=(2, 1)))
    hidden = call.operands["key_padding"][:, None, :, None]
    poisoned = dataclasses.replace(call, k=call.k.masked_fill(hidden, poison), v=call.v.masked_fill(hidden, -poison))
    grads = cotangents(call)
    clean, dirty = (interpret(c, grads) for c in (call, poisoned))
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
    for gradient in dirty[3:]:
        assert torch.count_nonzero(gradient.masked_select(hidden)) == 0


@pytest.mark.parametrize("padding", ["first", "all"])
@on_forms
def test_rows_that_see_nothing_give_zero_and_pass_no_gradient(name: str, padding: str) -> None:
    call = make(Case(name, padding=padding, q_start=True, heads=(2, 1)))
    results = interpret(call, cotangents(call))
    blind = ~dense_mask(call.form, call.q, call.k, call.operands).any(-1).expand_as(results.lse)
    # In both directions half of the keys are enough for every query.
    assert bool(blind.any()) == (name != "bidirectional" or padding == "all")
    assert bool(blind.all()) == (padding == "all")
    assert torch.equal(results.lse == -math.inf, blind)
    assert torch.count_nonzero(results.out[blind]) == 0 and torch.count_nonzero(results.dq[blind]) == 0
    grad_out, grad_lse = cotangents(call)
    alone = interpret(call, (grad_out.masked_fill(~blind[..., None], 0), grad_lse.masked_fill(~blind, 0)))
    for gradient in alone[2:]:
        assert torch.count_nonzero(gradient) == 0 and not gradient.isnan().any()


@on_forms
def test_two_runs_are_bitwise_equal(name: str) -> None:
    call = make(Case(name, heads=(3, 1), padding="some"))
    grads = cotangents(call)
    for a, b in zip(interpret(call, grads), interpret(call, grads), strict=True):
        assert torch.equal(a, b)


@on_forms
def test_the_shipped_tiling_runs(name: str) -> None:
    call = make(Case(name))
    results = launch.forward(call.form, *call.qkv, call.form.slots(call.operands), 0.25)
    for a, b in zip(results, interpret(call), strict=False):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("sizes", [(0, 2, 5, 5), (2, 0, 5, 5), (2, 4, 0, 5), (2, 4, 5, 0)], ids=str)
def test_empty_calls_launch_nothing(sizes: tuple[int, int, int, int]) -> None:
    batch, heads, query_len, key_len = sizes
    q = torch.randn(batch, heads, query_len, 16)
    k, v = (torch.randn(batch, 2, key_len, 16) for _ in range(2))
    segments = torch.zeros(batch, query_len, dtype=torch.int32)
    call = Call(FORMS["segment_cross"], q, k, v, {"query_segments": segments, "lookback": 1, "key_padding": None})
    results = interpret(call, cotangents(call))
    assert (results.lse == -math.inf).all()
    for t in (results.out, *results[2:]):
        assert torch.count_nonzero(t) == 0


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_segments_of_either_integer_type_and_out_of_order(dtype: torch.dtype) -> None:
    call = make(Case("segment_cross", lengths=(37, 21)))
    segments: Tensor = call.operands["query_segments"]
    segments = segments[:, torch.randperm(37)].to(dtype)
    segments[:, ::5], segments[:, 1::5] = torch.iinfo(dtype).max, torch.iinfo(dtype).min
    call.operands["query_segments"] = segments
    grads = cotangents(call)
    assert_as_exact_as_the_reference(interpret(call, grads), call, grads)


@pytest.mark.parametrize("dims", [(40, 40), (72, 128), (80, 48), (96, 96)], ids=str)
def test_head_dims_that_are_cut_in_two(dims: tuple[int, int]) -> None:
    """Up to three quarters of a power of two, q and k are multiplied in two parts: 96 is 64 + 32."""
    call = make(Case("sliding_self", dims=dims))
    assert_as_exact_as_the_reference(interpret(call), call)


@pytest.mark.parametrize("name", ["document", "document_causal"])
def test_document_ids_count_with_all_their_bits(name: str) -> None:
    call = make(Case(name))
    for operand in ("query_documents", "key_documents"):
        call.operands[operand] = call.operands[operand] << 40
    grads = cotangents(call)
    assert_as_exact_as_the_reference(interpret(call, grads), call, grads)
