"""The Hopper kernel with epilogues compiled for sm_90 as it is launched: registers, spills. No GPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from custom_ops.forms import FORMS
from custom_ops.kernels.gluon.dense_shape import HEAD_DIMS, DenseShape, dense_shape, epilogue_reasons
from tests.epilogue_cases import CASES, of_dtype
from tests.test_dense_gluon_compile import SHIPPED, allowed_spills, compiled

MORE_SPILLS = 176
"""Bytes that kernels with an epilogue spill more, where plain ones spill around loops: on Triton 3.9 844, not 664."""
TAKEN = [name for name in SHIPPED if not epilogue_reasons(SHIPPED[name].get("dims", (128, 128))[0])]


def allowed_with_epilogue(shape: DenseShape) -> int:
    plain = allowed_spills(shape)
    return plain and plain + MORE_SPILLS


def check(name: str, epilogue: str) -> None:
    arguments = SHIPPED[name]
    text = of_dtype(CASES[epilogue], arguments.get("dtype"))  # type: ignore[arg-type]
    found, shape = compiled(**arguments, epilogue=text)
    problems = dataclasses.replace(found, spills=max(0, found.spills - allowed_with_epilogue(shape))).problems
    assert not problems, (found.spills, problems)
    assert shape.shared_bytes <= found.shared_memory <= shape.shared_bytes + 1024


@pytest.mark.parametrize("name", TAKEN)
def test_shipped_kernels_hardly_spill_with_a_gate(name: str) -> None:
    check(name, "gate")


@pytest.mark.parametrize("epilogue", CASES)
@pytest.mark.parametrize("name", ("causal", "causal-two"))
def test_kernels_hardly_spill_with_any_epilogue(name: str, epilogue: str) -> None:
    check(name, epilogue)


@pytest.mark.parametrize("consumers", (2, 3))
@pytest.mark.parametrize("dims", ((64, 40), (128, 40), (128, 64), (128, 80), (128, 104)), ids=str)
def test_narrower_values_hardly_spill_with_a_gate(dims: tuple[int, int], consumers: int) -> None:
    found, shape = compiled(dims=dims, consumers=consumers, epilogue=CASES["gate"])
    assert found.spills <= allowed_with_epilogue(shape) and not found.warnings


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_head_dims_that_take_epilogues_have_two_query_stages(dim: int) -> None:
    taken = dim in (64, 128)
    assert epilogue_reasons(dim) == ([] if taken else [f"head_dim: expected 64 or 128, got {dim}"])
    for form in ("full_self", "sliding_self", "document"):
        for consumers in (2, 3):
            mask = FORMS[form].mask.specialise([])
            shape = dense_shape(mask, (False,) * 5, 1, 1, dim, min(dim, 128), False, consumers)
            assert not taken or dataclasses.replace(shape, extra=True).extra


@pytest.mark.parametrize(
    "changes", ({"query_stages": 1}, {"value_stages": 1, "stages": 3}, {"value_columns": 4}), ids=str
)
def test_roles_that_would_wait_for_ever_are_refused(changes: dict[str, Any]) -> None:
    shape = dense_shape(FORMS["full_self"].mask.specialise([]), (False,) * 5, 1, 1, 128, 128, False)
    with pytest.raises(ValueError, match="DenseShape: extra: expected 2 query stages"):
        dataclasses.replace(shape, extra=True, **changes)
