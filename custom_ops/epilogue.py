"""Epilogues: what a kernel computes elementwise from attention's output before it stores it. Text, so that ops take it.

    v0 = sigmoid(y); v1 = mul(x, v0); v2 = bfloat16(v1)

Single assignment, one operation a statement. ``x`` is attention's output, normalised, and ``y``, which need not be
there, one further tensor of its shape and dtype, the extra; one operand of two may be a number. The last statement is a
cast, to the result's dtype, which is q's. Values are fp32 in between, and nothing but casts rounds them: ``x`` is what
the Hopper kernel accumulated, not yet rounded to q's dtype. (Other kernels hand it over rounded.)

An operation is one line of ``OPERATIONS``: as torch computes it, and as a Gluon kernel does.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Operation(NamedTuple):
    """An elementwise operation on fp32 values, as expressions in ``{0}``, ``{1}``."""

    torch: str
    gluon: str
    """In ``gl``, and device functions of ``custom_ops/kernels/gluon/assembly.py``."""

    @property
    def arity(self) -> int:
        return 2 if "{1}" in self.torch else 1


OPERATIONS: dict[str, Operation] = {
    "add": Operation("{0} + {1}", "{0} + {1}"),
    "sub": Operation("{0} - {1}", "{0} - {1}"),
    "mul": Operation("{0} * {1}", "{0} * {1}"),
    "div": Operation("{0} / {1}", "{0} * fast_inverse({1})"),
    "neg": Operation("-{0}", "-{0}"),
    "abs": Operation("{0}.abs()", "gl.abs({0})"),
    "exp": Operation("{0}.exp()", "fast_exp({0})"),
    "sigmoid": Operation("{0}.sigmoid()", "fast_sigmoid({0})"),
    "relu": Operation("{0}.relu()", "gl.where({0} < 0.0, 0.0, {0})"),
    # Comparisons, not gl.maximum: a NaN stays one.
    "maximum": Operation("{0}.clamp_min({1})", "gl.where(({0} > {1}) | ({0} != {0}), {0}, {1})"),
    "minimum": Operation("{0}.clamp_max({1})", "gl.where(({0} < {1}) | ({0} != {0}), {0}, {1})"),
    "float32": Operation("{0}", "{0}"),
    "bfloat16": Operation("{0}.to(torch.bfloat16).to({0}.dtype)", "{0}.to(gl.bfloat16).to(gl.float32)"),
    "float16": Operation("{0}.to(torch.float16).to({0}.dtype)", "{0}.to(gl.float16).to(gl.float32)"),
}
"""Every operation by its name; casts have their dtype's."""
CASTS: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in OPERATIONS if isinstance(getattr(torch, name, None), torch.dtype)
}
"""Those of them that are casts."""
NUMBERS_FIRST = ("sub", "div")
"""Operations whose first operand may be a number; others do not mind its place, and so have it second."""
RESULTS = (torch.bfloat16, torch.float16)
"""Dtypes of results."""

_STATEMENT = re.compile(r"v(\d+) = (\w+)\(([^()]*)\)")
_VALUE = re.compile(r"[xy]|v(?:0|[1-9]\d*)")


class Statement(NamedTuple):
    """``v<its number> = operation(*operands)``."""

    operation: str
    operands: tuple[str, ...]
    """``x``, ``y``, ``v<number>`` or a number as ``repr`` writes it."""


class Epilogue(NamedTuple):
    """An epilogue; ``str`` gives its text, ``parse`` reads it."""

    statements: tuple[Statement, ...]

    def __str__(self) -> str:
        return "; ".join(f"v{i} = {s.operation}({', '.join(s.operands)})" for i, s in enumerate(self.statements))

    @property
    def reads_extra(self) -> bool:
        return any("y" in s.operands for s in self.statements)

    @property
    def dtype(self) -> torch.dtype:
        """The result's."""
        return CASTS[self.statements[-1].operation]

    @property
    def result(self) -> str:
        """The value that is cast last, which is for whoever stores it to do."""
        return self.statements[-1].operands[0]

    def lines(self, language: str) -> list[str]:
        """A Python line a statement but for the last cast, in ``"torch"`` or ``"gluon"``."""
        return [
            f"v{i} = {getattr(OPERATIONS[s.operation], language).format(*s.operands)}"
            for i, s in enumerate(self.statements[:-1])
        ]


@functools.cache
def parse(text: str) -> Epilogue:
    """The epilogue of a text; raises ValueError that names the statement and what was expected."""
    statements: list[Statement] = []
    reads_x = False
    for i, line in enumerate(text.split("; ")):
        match = _STATEMENT.fullmatch(line)
        if match is None or int(match[1]) != i:
            raise ValueError(f"epilogue: expected a statement 'v{i} = operation(operands)', got {line!r}")
        name, operands = match[2], tuple(match[3].split(", "))
        if name not in OPERATIONS:
            raise ValueError(
                f"epilogue: expected one of {', '.join(OPERATIONS)}, got operation {name!r}; "
                "compute it outside of the epilogue, or give it a line in custom_ops.epilogue.OPERATIONS"
            )
        if len(operands) != OPERATIONS[name].arity:
            raise ValueError(f"epilogue: expected {OPERATIONS[name].arity} operands of {name}, got {line!r}")
        for operand in operands:
            if not _is_value(operand, i):
                raise ValueError(
                    f"epilogue: expected x, y, an earlier v<number> or a number, got {operand!r} in {line!r}"
                )
        if _is_number(operands[0]) and (name not in NUMBERS_FIRST or _is_number(operands[1])):
            raise ValueError(
                f"epilogue: expected a number as the second operand, or as the first of {' and '.join(NUMBERS_FIRST)} "
                f"where the second is none, got {line!r}"
            )
        reads_x |= "x" in operands
        statements.append(Statement(name, operands))
    if CASTS.get(statements[-1].operation) not in RESULTS:
        raise ValueError(f"epilogue: expected a cast to one of {RESULTS} at the end, got {text!r}")
    if not reads_x:
        raise ValueError(f"epilogue: expected a statement that reads x, attention's output, got {text!r}")
    return Epilogue(tuple(statements))


def number(value: float) -> str:
    """A finite number as an operand; raises ValueError for others."""
    text = repr(float(value))
    if not _is_number(text):
        raise ValueError(f"epilogue: expected a finite number, got {text}")
    return text


def _is_value(operand: str, statements: int) -> bool:
    if _VALUE.fullmatch(operand):
        return operand[0] != "v" or int(operand[1:]) < statements
    return _is_number(operand)


def _is_number(operand: str) -> bool:
    """Whether it is a number in Python's shortest spelling, so that an epilogue has one text."""
    return re.fullmatch(r"-?\d+(\.\d+)?(e[+-]\d+)?", operand) is not None and repr(float(operand)) == operand


@functools.cache
def torch_function(epilogue: Epilogue) -> Callable[..., Tensor]:
    """``(x, y) -> value``, all in one floating dtype, fp32 or wider, before the result is cast."""
    lines = ["def epilogue(x, y):", *epilogue.lines("torch"), f"return {epilogue.result}"]
    scope: dict[str, Any] = {"torch": torch}
    exec("\n    ".join(lines), scope)
    return scope["epilogue"]


def apply(epilogue: Epilogue, x: Tensor, extra: Tensor | None) -> Tensor:
    """The epilogue of ``x`` as torch computes it, in fp32 (fp64 where x is), the result in its dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch_function(epilogue)(x.to(wide), None if extra is None else extra.to(wide)).to(epilogue.dtype)
