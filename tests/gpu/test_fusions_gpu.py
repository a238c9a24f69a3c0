"""What is computed before and after attention in its kernel, on a real GPU: launches, and errors against fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from custom_ops.forms import FORMS
from custom_ops.reference import reference_attention
from inductor_passes import LIBRARY_OPTION, QUERIES_OPTION
from lowered_attn.compile import backend
from tests import fusions
from tests.fusions import EPILOGUES, EPILOGUES_OF_HEADS, FP8, PROLOGUES, Inputs
from tests.helpers import largest_error

pytestmark = pytest.mark.gpu


def rounding(out: Tensor, exact: Tensor) -> float:
    """How far rounding to ``out``'s dtype moves a value; fp8 and int8 ones are rounded in ``exact`` too, to a neighbour
    at worst."""
    largest = float(exact.abs().max())
    return {torch.bfloat16: 2.0**-9 * largest, FP8: 2.0**-3 * largest, torch.int8: 1.0}[out.dtype]


def model(prologue: str | None, epilogue: str | None) -> Callable[..., Tensor]:
    def run(*tensors: Tensor, attend: Callable[[Inputs, Tensor], Tensor] = fusions.attend) -> Tensor:
        given = Inputs(*tensors)
        out = attend(given, given.q if prologue is None else PROLOGUES[prologue](given.q, given))
        return out if epilogue is None else fusions.after(epilogue, out, given)

    return run


def launches(code: list[str]) -> int:
    return code[0].split("def call(", 1)[1].split("def get_args", 1)[0].count(".run(")


def check(
    prologue: str | None, epilogue: str | None, *, dim: int = 128, length: int = 300, max_autotune: bool = False,
    **keywords: Any,
) -> None:  # fmt: skip
    """One launch, whose error against fp64 is at most twice that of the same in bf16, each step rounded."""
    torch.manual_seed(0)
    torch.compiler.reset()
    q_dtype = FP8 if prologue == "dequantise" else None
    if q_dtype is not None and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("Triton reads float8_e4m3fn from sm_89 on")
    given = fusions.inputs(2, length, 8, 2, dim, torch.bfloat16, "cuda", q_dtype)
    # The output is small: a factor that leaves something of it in 8 bits.
    given = given._replace(factor=given.factor / 32 if prologue is None else given.factor)
    run = model(prologue, epilogue)
    options = {LIBRARY_OPTION: False, QUERIES_OPTION: True, "max_autotune": max_autotune}
    with torch.no_grad():
        actual, code = run_and_get_code(
            torch.compile(run, backend=backend, fullgraph=True, options=options, **keywords), *given
        )
    # Among several tilings Inductor times what it fuses.
    assert launches(code) == 1 or max_autotune

    def by_definition(dtype: torch.dtype) -> Callable[[Inputs, Tensor], Tensor]:
        def attend(at: Inputs, q: Tensor) -> Tensor:
            q, k, v = (t.transpose(1, 2) for t in (q, at.k, at.v))
            return reference_attention(q, k, v, FORMS["full_self"], {}, dtype=dtype)[0]

        return attend

    exact = run(*(t.double() for t in given), attend=by_definition(torch.float64)).double()
    low = run(*given, attend=by_definition(torch.float32)).double()
    exact = exact.cpu()
    assert largest_error(actual, exact) <= 2 * largest_error(low, exact) + rounding(actual, exact)


@pytest.mark.parametrize("name", PROLOGUES)
@pytest.mark.parametrize("dim", [64, 112, 128])
def test_a_query_made_in_the_kernel_is_as_exact_as_one_made_before_it(name: str, dim: int) -> None:
    check(name, None, dim=dim)


@pytest.mark.parametrize("name", [*EPILOGUES, *EPILOGUES_OF_HEADS])
def test_what_follows_attention_is_as_exact_in_its_kernel(name: str) -> None:
    check(None, name)


@pytest.mark.parametrize("length", [1, 127, 2048])
def test_rope_and_a_gate_in_one_kernel_with_dynamic_shapes(length: int) -> None:
    check("rope of heads", "gate merged heads", length=length, dynamic=True)


def test_autotuning_takes_prologues_too() -> None:
    check("rope", "residual", max_autotune=True)
