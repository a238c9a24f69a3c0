"""The Hopper kernel with epilogues compiled for sm_90 as it is launched: registers, spills. No GPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from custom_ops.forms import FORMS
from custom_ops.kernels.gluon.dense_shape import dense_shape, epilogue_reasons
from tests.epilogue_cases import CASES, of_dtype
from tests.test_dense_gluon_compile import SHIPPED, allowed_spills, compiled

TAKEN = [name for name in SHIPPED if not epilogue_reasons(*SHIPPED[name].get("dims", (128, 128)))]


def check(name: str, epilogue: str) -> None:
    arguments = SHIPPED[name]
    text = of_dtype(CASES[epilogue], arguments.get("dtype"))  # type: ignore[arg-type]
    found, shape = compiled(**arguments, epilogue=text)
    allowed = allowed_spills(shape)
    # Where plain kernels spill around loops, those with an epilogue spill more.
    problems = dataclasses.replace(found, spills=max(0, found.spills - allowed - (96 if allowed else 0))).problems
    assert not problems, (found.spills, problems)
    assert shape.shared_bytes <= found.shared_memory <= shape.shared_bytes + 1024


@pytest.mark.parametrize("name", TAKEN)
def test_shipped_kernels_hardly_spill_with_a_gate(name: str) -> None:
    check(name, "gate")


@pytest.mark.parametrize("epilogue", CASES)
@pytest.mark.parametrize("name", ("causal", "causal-two"))
def test_kernels_hardly_spill_with_any_epilogue(name: str, epilogue: str) -> None:
    check(name, epilogue)


@pytest.mark.parametrize(
    "dims, reason",
    (
        ((64, 64), None),
        ((128, 128), None),
        ((128, 40), None),
        ((96, 64), None),
        ((96, 96), "value_dim: expected at most 64, the first part of head_dim 96, got 96"),
        ((192, 128), "head_dim: expected at most 128, got 192"),
        ((256, 256), "head_dim: expected at most 128, got 256"),
    ),
)
def test_head_dims_of_which_there_are_two_query_stages_take_epilogues(
    dims: tuple[int, int], reason: str | None
) -> None:
    assert epilogue_reasons(*dims) == ([] if reason is None else [reason])
    for form in ("full_self", "sliding_self", "document"):
        for consumers in (2, 3):
            mask = FORMS[form].mask.specialise([])
            shape = dense_shape(mask, (False,) * 5, 1, 1, *dims, False, consumers)
            assert (shape.query_stages == 2 and not shape.own_outputs) == (reason is None)


@pytest.mark.parametrize(
    "changes", ({"query_stages": 1}, {"value_stages": 1, "stages": 3}, {"value_columns": 4}), ids=str
)
def test_roles_that_would_wait_for_ever_are_refused(changes: dict[str, Any]) -> None:
    shape = dense_shape(FORMS["full_self"].mask.specialise([]), (False,) * 5, 1, 1, 128, 128, False)
    with pytest.raises(ValueError, match="DenseShape: extra: expected 2 query stages"):
        dataclasses.replace(shape, extra=True, **changes)
