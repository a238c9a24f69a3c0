"""Attention with what Inductor fuses before and after it, in Triton's interpreter: the numbers, without a GPU."""

from __future__ import annotations

import math
import pathlib
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from custom_ops.forms import FORMS
from custom_ops.reference import reference_attention
from tests import fusions
from tests.fusion_sources import CASES, Fused
from tests.fusions import PROLOGUES, Inputs
from tests.interpreter.generated import kernel, sources_of

pytestmark = [
    # Triton 3.6's interpreter makes scalars in a way that numpy deprecates.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton.runtime.interpreter"),
    # Rows that see nothing subtract -inf from -inf before that is replaced.
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return sources_of("tests.fusion_sources", tmp_path_factory.mktemp("generated"))


def in_order(found: dict[str, Any], given: Inputs, out: Tensor) -> list[Tensor]:
    """The kernel's tensors in the order of its parameters."""
    (parameters,) = re.findall(r"^def triton_tem_\w+\((.*)\):$", found["source"], re.MULTILINE)
    names = dict(zip(parameters.split(", "), found["launch"], strict=False))
    tensors = {"arg_K": given.k, "arg_V": given.v}
    by_shape = {tuple(t.shape): t for t in (given.turns, given.factor, given.x)}
    # q comes before the gate, which has its shape, or q none: it shares its memory with k and v.
    rest = iter((given.q, given.gate))
    for parameter in sorted((p for p in names if p.startswith("in")), key=lambda p: names[p]):
        shape = tuple(found["shapes"].get(names[parameter], ()))
        tensors[parameter] = by_shape[shape] if shape in by_shape else next(rest)
    return [out if parameter.startswith("out") else tensors[parameter] for parameter in names]


def by_definition(case: Fused, given: Inputs, dtype: torch.dtype) -> Tensor:
    """Everything in ``dtype``, attention by its definition."""
    wide = Inputs(*(t.to(dtype) for t in given))
    q, k, v = (t.transpose(1, 2) for t in (PROLOGUES[case.prologue](wide.q, wide), wide.k, wide.v))
    out, _ = reference_attention(q.to(dtype), k, v, FORMS["full_self"], {}, dtype=dtype)
    return fusions.after(case.epilogue, out, wide)


@pytest.mark.parametrize("name", CASES)
def test_what_is_computed_around_attention_is_as_exact_as_its_definition(
    name: str, sources: dict[str, Any], tmp_path: pathlib.Path
) -> None:
    case, found = CASES[name], sources[name]
    given = case.inputs("cpu")
    expected = by_definition(case, given, torch.float64)
    low = by_definition(case, given, torch.float32)
    out = torch.full(low.shape, math.nan)
    run = kernel(found["source"], tmp_path / "template.py")
    run[(int(found["launch"][-3]),)](*in_order(found, given, out))
    # Sums in another order: a few units in the last place of the largest value.
    floor = 4 * torch.finfo(torch.float32).eps * float(expected.abs().max())
    allowed = 2 * float((low.double() - expected).abs().max()) + floor
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=allowed)
