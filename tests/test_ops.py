"""The form ops on a CPU: values and gradients against fp64, strides, rows that see nothing, padding, memory."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from custom_ops import cpu
from custom_ops.form import Form
from custom_ops.forms import FORMS
from custom_ops.reference import reference_attention
from tests.helpers import (
    LAYOUTS,
    PADDINGS,
    Call,
    Case,
    assert_as_exact_as_the_reference,
    assert_outputs_are_well_formed,
    cotangents,
    dense_mask,
    make,
    make_operands,
    pairwise,
    run,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DIMS = ((16, 16), (64, 64), (80, 48), (96, 96), (192, 128), (256, 256), (24, 40))
GROUPS = ((2, 2), (4, 2), (7, 1))
# Lengths with whether q_start is given: without it a self-attention form wants as many queries as keys.
SELF_LENGTHS = (
    (37, 37, False), (37, 37, True), (1, 1, False), (1, 1, True), (0, 0, False), (300, 300, False), (5, 41, True),
    (3, 0, True), (0, 3, True), (41, 5, True), (290, 333, True),
)  # fmt: skip
CROSS_LENGTHS = ((37, 11), (1, 1), (0, 3), (3, 0), (0, 0), (300, 41), (290, 333))
on_forms = pytest.mark.parametrize("name", FORMS)


def cases(name: str) -> list[Case]:
    """Every two settings of one form together at least once."""
    factors = {
        "lengths": SELF_LENGTHS if FORMS[name].self_attention else CROSS_LENGTHS,
        "dims": DIMS,
        "layout": LAYOUTS,
        "dtype": DTYPES,
        "padding": PADDINGS,
        "heads": GROUPS,
        "band": (1, 4, 40),
        "scale": (None, 0.3),
        "softcap": (0.0, 0.5),
    }
    found = []
    for row in pairwise(factors):
        query_len, key_len, *q_start = row.pop("lengths")
        found.append(Case(name, lengths=(query_len, key_len), q_start=any(q_start), **row))
    return found


def identity_values(name: str, query_len: int, key_len: int, **settings: Any) -> Call:
    """A call whose values are the unit vectors, so that ``out[b, h, i, j]`` is the weight of key ``j``."""
    call = make(Case(name, torch.float64, lengths=(query_len, key_len), dims=(8, key_len), **settings))
    call.v = torch.eye(key_len, dtype=torch.float64).expand_as(call.v)
    return call


@pytest.mark.parametrize("case", [case for name in FORMS for case in cases(name)], ids=str)
def test_values_and_gradients_are_as_exact_as_the_reference(case: Case) -> None:
    call = make(case)
    grads = cotangents(call)
    results = run(call.form.op, call, grads)
    assert_outputs_are_well_formed(results.out, results.lse, call)
    for gradient, t in zip(results[2:], call.qkv, strict=True):
        assert gradient.dtype == t.dtype
    assert_as_exact_as_the_reference(results, call, grads)


def test_every_two_settings_meet() -> None:
    rows = pairwise({"a": "xyz", "b": (1, 2), "c": (True, False)})
    for first, second in (("a", "b"), ("b", "c"), ("a", "c")):
        met = {(row[first], row[second]) for row in rows}
        assert len(met) == len({x for x, _ in met}) * len({y for _, y in met})
    assert len(rows) <= 8


# What a query sees, by the definitions in the forms' documentation, in plain Python.
SEES = {
    "full_self": lambda i, k, o: k <= i,
    "sliding_self": lambda i, k, o: k <= i and i - k < o["window"],
    "segment_cross": lambda i, k, o: o["query_segments"] - o["lookback"] <= k <= o["query_segments"],
    "bidirectional": lambda i, k, o: True,
    "document": lambda i, k, o: o["query_documents"] == o["key_documents"],
    "document_causal": lambda i, k, o: k <= i and o["query_documents"] == o["key_documents"],
    "causal_from": lambda i, k, o: o["query_starts"] <= k <= i,
    "prefix_lm": lambda i, k, o: k <= i or k < o["prefix_lens"],
}


def numbers_at(operands: dict[str, Any], b: int, i: int, k: int) -> dict[str, int]:
    """A call's operands as they are for key ``k`` and the ``i``-th query of request ``b``."""
    found = {}
    for name, value in operands.items():
        index = (b,) if name in ("q_start", "prefix_lens") else (b, k if name.startswith("key_") else i)
        found[name] = int(value[index]) if isinstance(value, Tensor) else value
    return found


@pytest.mark.parametrize("band", [1, 3, 50])
@pytest.mark.parametrize("lengths", [(9, 9), (6, 11), (300, 20)], ids=str)
@on_forms
def test_a_query_sees_exactly_the_keys_of_the_definition(name: str, lengths: tuple[int, int], band: int) -> None:
    query_len, key_len = lengths
    call = identity_values(name, query_len, key_len, band=band, padding="some", q_start=True)
    weights, _ = call.form.op(*call.qkv, **call.operands)
    o = call.operands
    expected = torch.zeros(weights.shape[0], query_len, key_len, dtype=torch.bool)
    for b, i, k in itertools.product(*map(range, expected.shape)):
        numbers = numbers_at(o, b, i, k)
        position = i + numbers.get("q_start", 0)
        expected[b, i, k] = SEES[name](position, k, numbers) and not numbers["key_padding"]
    assert torch.equal(weights > 0, expected[:, None].expand_as(weights))
    assert torch.equal(dense_mask(call.form, call.q, call.k, o)[:, 0], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_forms
def test_gradients_through_lse_alone_and_out_alone(name: str, dtype: torch.dtype) -> None:
    call = make(Case(name, dtype, lengths=(20, 20), dims=(16, 24), padding="some"))
    grad_out, grad_lse = cotangents(call)
    for grads in ((grad_out, None), (None, grad_lse)):
        results = run(call.form.op, call, grads)
        assert_as_exact_as_the_reference(results, call, grads)
    assert torch.count_nonzero(results.dv) == 0  # lse does not depend on the values


def test_inputs_that_need_no_gradient_get_none() -> None:
    call = make(Case("full_self"))
    call.k.requires_grad_()
    out, lse = call.form.op(*call.qkv)
    (out.sum() + lse.sum()).backward()
    assert call.q.grad is None and call.v.grad is None and call.k.grad is not None
    with torch.no_grad():
        assert not call.form.op(*call.qkv)[0].requires_grad


@pytest.mark.parametrize("name, operands", [("full_self", {}), ("sliding_self", {"window": 10**9})])
def test_operands_left_out_mean_no_operand(name: str, operands: dict[str, int]) -> None:
    q, k, v = make(Case(name)).qkv
    op = FORMS[name].op
    expected = op(q, k, v, *operands.values(), None, None, scale=16**-0.5)
    no_start = torch.zeros(2, dtype=torch.int32)
    nothing_hidden = torch.zeros(2, 37, dtype=torch.bool)
    for given in (
        {},
        {"q_start": no_start},
        {"key_padding": nothing_hidden},
        {"key_padding": nothing_hidden, "q_start": no_start},
    ):
        for result, wanted in zip(op(q, k, v, **operands, **given), expected, strict=True):
            torch.testing.assert_close(result, wanted)


def test_a_window_that_never_ends_and_a_full_lookback_are_full_attention() -> None:
    q, k, v = make(Case("full_self")).qkv
    full = FORMS["full_self"].op(q, k, v)
    positions = torch.arange(37).expand(2, -1)
    for other in (FORMS["sliding_self"].op(q, k, v, 37), FORMS["segment_cross"].op(q, k, v, positions, 37)):
        for a, b in zip(other, full, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_segments_far_out_of_range_see_nothing(dtype: torch.dtype) -> None:
    call = make(Case("segment_cross", lengths=(4, 6)))
    least, most = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    call.operands["query_segments"] = torch.tensor([[least, -1, 5, most], [most, 0, least, 5]], dtype=dtype)
    out, lse = call.form.op(*call.qkv, **call.operands)
    sees = torch.tensor([[False, False, True, False], [False, True, False, True]])[:, None].expand_as(lse)
    assert torch.equal(lse > -math.inf, sees)
    assert torch.equal(out.abs().sum(-1) > 0, sees)


@pytest.mark.parametrize("name", ["document", "document_causal"])
def test_document_ids_count_with_all_their_bits(name: str) -> None:
    call = make(Case(name))
    wide = {n: call.operands[n] for n in ("query_documents", "key_documents")}
    expected = call.form.op(*call.qkv, **call.operands)
    for shift in (lambda ids: ids << 40, lambda ids: ids - 2**62, lambda ids: ids.to(torch.int32)):
        shifted = {**call.operands, **{n: shift(ids) for n, ids in wide.items()}}
        for one, other in zip(call.form.op(*call.qkv, **shifted), expected, strict=True):
            assert torch.equal(one, other)


# ---------------------------------------------------------------------- rows that see nothing, hidden keys


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding", ["first", "all"])
@on_forms
def test_rows_that_see_nothing_give_zero_and_pass_no_gradient(name: str, padding: str, dtype: torch.dtype) -> None:
    call = make(Case(name, dtype, padding=padding, q_start=True))
    results = run(call.form.op, call, cotangents(call))
    blind = ~dense_mask(call.form, call.q, call.k, call.operands).any(-1).expand_as(results.lse)
    # In both directions half of the keys are enough for every query.
    assert bool(blind.any()) == (name != "bidirectional" or padding == "all")
    assert bool(blind.all()) == (padding == "all")
    assert torch.equal(results.lse == -math.inf, blind)
    assert torch.count_nonzero(results.out[blind]) == 0 and torch.count_nonzero(results.dq[blind]) == 0
    # Cotangents of those rows alone reach no key.
    grad_out, grad_lse = cotangents(call)
    alone = run(call.form.op, call, (grad_out.masked_fill(~blind[..., None], 0), grad_lse.masked_fill(~blind, 0)))
    for gradient in alone[2:]:
        assert torch.count_nonzero(gradient) == 0 and not gradient.isnan().any()


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@on_forms
def test_what_lies_in_hidden_keys_reaches_nothing(name: str, dtype: torch.dtype, poison: float) -> None:
    call = make(Case(name, dtype, padding="some", lengths=(300, 300) if FORMS[name].self_attention else (37, 21)))
    hidden = call.operands["key_padding"][:, None, :, None]
    poisoned = dataclasses.replace(call, k=call.k.masked_fill(hidden, poison), v=call.v.masked_fill(hidden, -poison))
    grads = cotangents(call)
    clean, dirty = (run(call.form.op, c, grads) for c in (call, poisoned))
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
    for gradient in dirty[3:]:
        assert torch.count_nonzero(gradient.masked_select(hidden)) == 0


# ---------------------------------------------------------------------- layout, repeatability, size


@pytest.mark.parametrize("layout", LAYOUTS)
@on_forms
def test_merging_heads_is_a_view_whatever_the_inputs_strides(name: str, layout: str) -> None:
    for settings in ({"dims": (16, 16)}, {"dims": (24, 8)}, {"padding": "some"}, {"heads": (7, 1)}):
        call = make(Case(name, layout=layout, **settings))  # type: ignore[arg-type]
        out, lse = call.form.op(*call.qkv, **call.operands)
        assert_outputs_are_well_formed(out, lse, call)
        out.transpose(1, 2).view(2, 37, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@on_forms
def test_two_runs_are_bitwise_equal(name: str, dtype: torch.dtype) -> None:
    call = make(Case(name, dtype, heads=(8, 2), lengths=(300, 300), dims=(64, 64), padding="some"))
    grads = cotangents(call)
    first, second = (run(call.form.op, call, grads) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("sizes", [(0, 2, 5), (2, 0, 5), (2, 4, 0)], ids=["no-requests", "no-heads", "no-tokens"])
@on_forms
def test_empty_calls_have_empty_results_and_gradients(name: str, sizes: tuple[int, int, int]) -> None:
    batch, heads, length = sizes
    form = FORMS[name]
    q = torch.randn(batch, heads, length, 16, requires_grad=True)
    k, v = (torch.randn(batch, 2, length, 16, requires_grad=True) for _ in range(2))
    for settings in ({}, {"padding": "some", "q_start": True}):
        out, lse = form.op(q, k, v, **make_operands(form, batch, length, length, **settings))  # type: ignore[arg-type]
        assert out.shape == q.shape and lse.shape == q.shape[:3]
        for gradient in torch.autograd.grad(out.sum() + lse.sum(), (q, k, v)):
            assert torch.count_nonzero(gradient) == 0


def allocations(run_once: Callable[[], object]) -> list[int]:
    """Bytes of every CPU allocation during ``run_once()``, kernels' own scratch memory included."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        run_once()
    events = profiler.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]


# ---------------------------------------------------------------------- values that KV heads share


# One value head for all, for pairs of KV heads, and for groups of query heads that share KV heads too.
SHARED_VALUES = (
    {"heads": (3, 3), "value_heads": 1, "dims": (24, 512)},
    {"heads": (4, 4), "value_heads": 2, "dims": (16, 40), "padding": "some"},
    {"heads": (8, 4), "value_heads": 1, "dims": (16, 16), "lengths": (290, 333), "q_start": True, "scale": 0.3},
    {"heads": (6, 6), "value_heads": 3, "dims": (48, 8), "padding": "first", "layout": "token_major"},
)
on_shared_values = pytest.mark.parametrize(
    "settings", SHARED_VALUES, ids=lambda s: "h{}x{}v{}".format(*s["heads"], s["value_heads"])
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@on_shared_values
@on_forms
def test_shared_values_are_as_exact_as_the_reference(name: str, settings: dict[str, Any], dtype: torch.dtype) -> None:
    call = make(Case(name, dtype, **settings))
    grads = cotangents(call)
    results = run(call.form.op, call, grads)
    assert_outputs_are_well_formed(results.out, results.lse, call)
    for gradient, t in zip(results[2:], call.qkv, strict=True):
        assert gradient.shape == t.shape and gradient.dtype == t.dtype
    assert_as_exact_as_the_reference(results, call, grads)


@on_shared_values
@on_forms
def test_shared_values_give_what_a_copy_for_every_kv_head_gives(name: str, settings: dict[str, Any]) -> None:
    call = make(Case(name, torch.float64, **settings))
    grads = cotangents(call)
    sharing = call.k.shape[1] // call.v.shape[1]
    copied = dataclasses.replace(call, v=call.v.repeat_interleave(sharing, 1))
    for attend in (call.form.op, functools.partial(reference, call.form)):
        results, expected = run(attend, call, grads), run(attend, copied, grads)
        summed = expected._replace(dv=expected.dv.unflatten(1, (-1, sharing)).sum(2))  # type: ignore[union-attr]
        for a, b in zip(results, summed, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def reference(form: Form, *qkv: Tensor, scale: float | None, **operands: Any) -> tuple[Tensor, Tensor]:
    return reference_attention(*qkv, form, operands, scale, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@on_forms
def test_nan_in_hidden_keys_reaches_nothing_of_shared_values(name: str, dtype: torch.dtype) -> None:
    call = make(Case(name, dtype, padding="some", heads=(4, 4), value_heads=1, lengths=(37, 37), dims=(16, 40)))
    hidden = call.operands["key_padding"][:, None, :, None]
    poisoned = dataclasses.replace(call, k=call.k.masked_fill(hidden, math.nan), v=call.v.masked_fill(hidden, math.nan))
    grads = cotangents(call)
    clean, dirty = (run(call.form.op, c, grads) for c in (call, poisoned))
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
    for gradient in dirty[3:]:
        assert torch.count_nonzero(gradient.masked_select(hidden)) == 0


class Allocations(TorchDispatchMode):
    """Sizes in bytes of what aten ops allocate for their results; results that share an input's memory left out."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = (t.untyped_storage() for t in tree_leaves(results) if isinstance(t, Tensor))
        self.sizes += [storage.nbytes() for storage in made if storage.data_ptr() not in given]
        return results


MIB = 1 << 20
HEADS, KEYS, LATENT = 16, 2048, 512
LATENT_BYTES = KEYS * LATENT * 4


def latent_call(name: str, query_len: int, **settings: Any) -> Call:
    """16 heads of 8 elements whose values are one latent of 512: a copy of it a head is 64 MiB, the keys are 1 MiB."""
    dims = {"heads": (HEADS, HEADS), "value_heads": 1, "lengths": (query_len, KEYS), "dims": (8, LATENT)}
    return make(Case(name, batch=1, q_start=True, band=KEYS, **dims, **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("padding", ["none", "some"])
@pytest.mark.parametrize("query_len", [1, 16])
@on_forms
def test_no_value_is_copied_for_a_head(name: str, query_len: int, padding: str) -> None:
    call = latent_call(name, query_len, padding=padding)
    slots = call.form.slots(call.operands)
    # One copy of the latent where padded keys are cleared in it; the scores of all heads are at most 2 MiB.
    allowed = LATENT_BYTES if padding == "some" else HEADS * query_len * KEYS * 4
    forwards = (
        lambda: cpu.forward(call.form, *call.qkv, slots, 0.3),
        lambda: reference_attention(*call.qkv, call.form, call.operands, 0.3),
    )
    for forward in forwards:
        with Allocations() as seen:
            forward()
        assert max(seen.sizes) <= allowed and sum(seen.sizes) <= HEADS * LATENT_BYTES // 2
        assert (LATENT_BYTES in seen.sizes) == (padding == "some")  # the watch sees what is there
    # Kernels' own scratch memory too.
    assert largest_allocation(lambda: call.form.op(*call.qkv, **call.operands)) <= allowed


@on_forms
def test_gradients_of_shared_values_are_summed_without_one_for_every_head(name: str) -> None:
    call = latent_call(name, 16)
    grads = cotangents(call)
    assert largest_allocation(lambda: run(call.form.op, call, grads)) <= LATENT_BYTES


def largest_allocation(run_once: Callable[[], object]) -> int:
    """The most bytes that one CPU allocation asked for during ``run_once()``."""
    return max(allocations(run_once))


def test_the_memory_watch_sees_a_dense_mask() -> None:
    assert largest_allocation(lambda: torch.ones(1000, 1000, dtype=torch.bool)) == 1000 * 1000


LONG = 16384


@pytest.mark.parametrize("name", ["sliding_self", "segment_cross"])
def test_a_band_over_a_long_sequence_takes_memory_by_its_length(name: str) -> None:
    form = FORMS[name]
    q, k, v = (torch.randn(1, 1, LONG, 16, requires_grad=True) for _ in range(3))
    operands = make_operands(form, 1, LONG, LONG, band=64, padding="some")

    def train_step() -> Tensor:
        out, lse = form.op(q, k, v, **operands)
        return torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))[0]

    # [S, S] is 256 MiB as bool and 1 GiB as fp32; q, k and v are 1 MiB each, a chunk's scores 256 * (256 + 64) * 4 B.
    assert largest_allocation(train_step) <= 2 * MIB


def test_many_heads_of_full_attention_stay_within_the_chunk_budget() -> None:
    form = FORMS["full_self"]
    length = 2048
    q, k, v = (torch.randn(2, 32, length, 4, requires_grad=True) for _ in range(3))
    hidden = torch.zeros(2, length, dtype=torch.bool)

    def train_step() -> Tensor:
        out, lse = form.op(q, k, v, hidden)
        return torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))[0]

    # The scores of all heads together are 1 GiB.
    assert largest_allocation(train_step) <= 64 * MIB
