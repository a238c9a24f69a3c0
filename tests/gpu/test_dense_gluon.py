"""The Hopper kernel of the dense forms, as eager calls take it, against fp64: every form, ragged ends, any strides."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from custom_ops.form import empty_outputs
from custom_ops.forms import FORMS
from tests.helpers import (
    Call,
    Case,
    assert_as_exact_as_the_reference,
    assert_outputs_are_well_formed,
    cotangents,
    make,
    run,
)
from tests.hopper import chosen

pytestmark = pytest.mark.gpu

BASE = Case("full_self", torch.bfloat16, heads=(8, 2), lengths=(1000, 1000), dims=(128, 128), band=300)
LENGTHS = ((128, 128), (192, 192), (193, 1000), (1000, 333), (577, 64), (1337, 1337), (448, 1))
CASES = [
    *(
        dataclasses.replace(BASE, lengths=lengths, dims=(dim, dim), q_start=lengths[0] != lengths[1] or dim == 64)
        for lengths in LENGTHS
        for dim in (64, 128)
    ),
    *(
        dataclasses.replace(BASE, form=form, dims=dims, heads=heads, dtype=dtype, padding=padding, softcap=softcap)
        for form in FORMS
        for dims, heads, dtype, padding, softcap in (
            ((128, 128), (7, 1), torch.bfloat16, "none", 0.0),
            ((64, 64), (16, 1), torch.float16, "some", 0.0),
            ((192, 128), (4, 4), torch.bfloat16, "none", 0.0),
            ((256, 256), (4, 2), torch.float16, "first", 30.0),
        )
    ),
    *(
        dataclasses.replace(BASE, form=form, dims=(dim, dim), padding=padding)
        for form, dim, padding in (
            ("full_self", 96, "none"), ("sliding_self", 80, "some"), ("bidirectional", 72, "all"),
            ("document_causal", 200, "none"), ("causal_from", 128, "some"),
        )
    ),
    *(
        dataclasses.replace(BASE, form=form, dims=dims, heads=(4, 2), dtype=dtype)
        for form, dims, dtype in (
            ("bidirectional", (96, 96), torch.float16), ("sliding_self", (96, 88), torch.bfloat16),
            ("segment_cross", (96, 64), torch.bfloat16), ("full_self", (104, 96), torch.float16),
            ("document_causal", (80, 80), torch.bfloat16), ("full_self", (144, 128), torch.bfloat16),
            ("sliding_self", (160, 128), torch.float16), ("full_self", (256, 128), torch.bfloat16),
        )
    ),
    dataclasses.replace(BASE, form="sliding_self", q_start=True, lengths=(700, 900), band=1000),
    dataclasses.replace(BASE, form="sliding_self", q_start=True, lengths=(700, 900), band=128),
    dataclasses.replace(BASE, heads=(8, 8), value_heads=2, dims=(192, 128)),
    dataclasses.replace(BASE, layout="token_major", heads=(64, 8), batch=3),
    dataclasses.replace(BASE, layout="contiguous", lengths=(200, 200), batch=40),
]  # fmt: skip


@pytest.fixture(autouse=True, params=(2, 3), ids=("two", "three"))
def consumers(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both tilings, whichever is faster; some calls have only the one of two."""
    with chosen("gluon", request.param):
        yield


@pytest.fixture(autouse=True)
def unwritten_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    from custom_ops.kernels import launch

    def poisoned(query: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.fill_(math.nan) for t in empty_outputs(query, value))

    monkeypatch.setattr(launch, "empty_outputs", poisoned)


def on_hopper(case: Case) -> Call:
    """The tensors of a case that nothing is against."""
    from custom_ops.kernels import launch

    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    torch.manual_seed(7)
    call = make(case, "cuda")
    assert launch.against_hopper(call.form, *call.qkv, call.form.slots(call.operands), call.softcap) == []
    return call


@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_are_as_exact_as_the_reference_and_repeat(case: Case) -> None:
    call = on_hopper(case)
    results = run(call.form.op, call)
    assert_outputs_are_well_formed(results.out, results.lse, call)
    assert_as_exact_as_the_reference(results, call)
    again = run(call.form.op, call)
    assert torch.equal(results.out, again.out) and torch.equal(results.lse, again.lse)


TWO: dict[str, Any] = {
    "consumers": 2, "overlap": True, "split": False, "consumer_registers": 240, "producer_registers": 24,
}  # fmt: skip


@pytest.mark.parametrize("form", ("full_self", "sliding_self", "bidirectional"))
@pytest.mark.parametrize(
    "dims, tiling",
    (
        ((64, 64), {"turns": True, "split": False, "overlap": True}),
        ((96, 96), TWO | {"turns": True}),
        ((128, 128), TWO | {"turns": True}),
        ((128, 128), TWO | {"turns": True, "split": True}),
        ((128, 128), TWO | {"late_wait": False, "lazy": True}),
        ((128, 128), {"lazy": True}),
        ((192, 128), TWO | {"turns": True}),
        ((256, 256), {"turns": True}),
    ),
    ids=str,
)
def test_other_tilings_are_as_exact(
    form: str, dims: tuple[int, int], tiling: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from custom_ops.kernels.gluon import dense_launch

    call = on_hopper(dataclasses.replace(BASE, form=form, dims=dims, lengths=(1337, 1337)))
    shipped = dense_launch.dense_shape
    monkeypatch.setattr(dense_launch, "dense_shape", lambda *of: dataclasses.replace(shipped(*of), **tiling))
    dense_launch._launch_of.cache_clear()
    try:
        results = run(call.form.op, call)
        assert_outputs_are_well_formed(results.out, results.lse, call)
        assert_as_exact_as_the_reference(results, call)
        for _ in range(5):
            assert torch.equal(run(call.form.op, call).out, results.out)
    finally:
        dense_launch._launch_of.cache_clear()


@pytest.mark.parametrize("form", ("full_self", "bidirectional", "segment_cross"))
def test_nothing_of_padded_keys_reaches_the_outputs(form: str) -> None:
    call = on_hopper(dataclasses.replace(BASE, form=form, padding="some"))
    expected = run(call.form.op, call)
    hidden = call.operands["key_padding"]
    assert isinstance(hidden, Tensor)
    for t in call.qkv[1:]:
        t.masked_fill_(hidden[:, None, :, None], math.nan)
    found = run(call.form.op, call)
    assert torch.equal(found.out, expected.out) and torch.equal(found.lse, expected.lse)


@pytest.mark.parametrize("form", ("full_self", "sliding_self", "document_causal"))
def test_gradients_follow_from_its_outputs(form: str) -> None:
    call = on_hopper(dataclasses.replace(BASE, form=form, lengths=(300, 300)))
    grads = cotangents(call)
    assert_as_exact_as_the_reference(run(call.form.op, call, grads), call, grads)


@pytest.mark.parametrize("rise", (-6.0, 3.0, 7.0, 20.0))
@pytest.mark.parametrize(
    "form, dims, dtype",
    (
        ("full_self", (96, 96), torch.bfloat16),
        ("bidirectional", (128, 128), torch.float16),
        ("sliding_self", (128, 128), torch.bfloat16),
        ("full_self", (192, 128), torch.bfloat16),
        ("bidirectional", (256, 256), torch.float16),
    ),
    ids=str,
)
def test_maxima_that_rise_from_tile_to_tile(
    form: str, dims: tuple[int, int], dtype: torch.dtype, rise: float
) -> None:
    """Outputs are scaled down only after a rise by more than 8: by less at every tile, by more, and never."""
    call = on_hopper(dataclasses.replace(BASE, form=form, dims=dims, dtype=dtype))
    query, key, _value = call.qkv
    with torch.no_grad():
        # The first keys come last. Base-2 logarithms, `rise` of them every 64 keys.
        before = torch.arange(key.shape[2], 0, -1, device="cuda") / 64
        query[..., 0] = 1.0
        key[..., 0] = before * rise * math.log(2) * dims[0] ** 0.5
    results = run(call.form.op, call)
    assert_outputs_are_well_formed(results.out, results.lse, call)
    assert_as_exact_as_the_reference(results, call)


def test_a_scale_of_zero_averages_what_is_seen() -> None:
    call = on_hopper(dataclasses.replace(BASE, scale=0.0))
    assert_as_exact_as_the_reference(run(call.form.op, call), call)


def test_a_graph_replays() -> None:
    call = on_hopper(dataclasses.replace(BASE, q_start=True))
    arguments: dict[str, Any] = {**call.operands, **call.keywords}
    expected = call.form.op(*call.qkv, **arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = call.form.op(*call.qkv, **arguments)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


def test_what_the_copy_engine_cannot_read_takes_the_portable_kernel() -> None:
    from custom_ops.kernels import launch

    call = make(dataclasses.replace(BASE, layout="expanded"), "cuda")
    assert launch.against_hopper(call.form, *call.qkv, call.form.slots(call.operands))
    assert_as_exact_as_the_reference(run(call.form.op, call), call)
