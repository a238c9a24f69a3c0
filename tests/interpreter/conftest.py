"""Kernels on a CPU, in Triton's interpreter. TRITON_INTERPRET is read when a kernel is defined: set it before that."""

from __future__ import annotations

import os

import pytest

os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True, scope="session")
def kernels_are_interpreted() -> None:
    """Fail at once, with the remedy, where something defined the kernels earlier, to be compiled."""
    from triton.runtime.interpreter import InterpretedFunction

    from custom_ops.kernels.forward import forward_kernel

    if not isinstance(forward_kernel, InterpretedFunction):
        pytest.fail("kernels were defined for compiling: run tests/interpreter alone, with TRITON_INTERPRET=1 set")
