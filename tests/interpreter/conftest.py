"""Kernels on a CPU, in Triton's interpreter. TRITON_INTERPRET is read when a kernel is defined: set it before that."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True, scope="session")
def kernels_are_interpreted() -> None:
    """Fail at once, with the remedy, where something defined the kernels earlier, to be compiled."""
    from triton.runtime.interpreter import InterpretedFunction

    from custom_ops.kernels.forward import forward_kernel

    if not isinstance(forward_kernel, InterpretedFunction):
        pytest.fail("kernels were defined for compiling: run tests/interpreter alone, with TRITON_INTERPRET=1 set")


@pytest.fixture(autouse=True, scope="session")
def masks_are_booleans() -> Iterator[None]:
    """Triton 3.9 keeps a scalar condition as an int32, and refuses to load or store under a mask made with it."""
    from triton.runtime.interpreter import InterpreterBuilder

    def with_boolean_mask(method: Callable[..., Any], position: int) -> Callable[..., Any]:
        def run(self: Any, *arguments: Any) -> Any:
            mask = arguments[position]
            mask.data = np.asarray(mask.data).astype(bool)
            return method(self, *arguments)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for name, position in (("create_masked_load", 1), ("create_masked_store", 2)):
            patch.setattr(InterpreterBuilder, name, with_boolean_mask(getattr(InterpreterBuilder, name), position))
        yield
