"""What the modes of paged attention share: the request's operands, and the arithmetic of guards.

A request has ``context`` cached keys, at the positions ``k < context``, and new tokens after them: query ``i`` and new
key ``i`` are both at position ``context + i``, and of the new keys the first ``valid`` are real.

The greatest key that a query sees must never fall as ``q`` grows, and the expression must show it: then the range of
keys of a tile of queries is read off its first and its last query. So a guard ("from this query on") is no comparison
but a minimum: a large number where it holds and 0 where it does not.
"""

from __future__ import annotations

import dataclasses

import sympy
from sympy import Max, Min

from custom_ops.masks import Operand, int_operand, q, request_operand

CONTEXT = request_operand("context")
"""Tokens of the request that were cached before this step."""
VALID = request_operand("valid")
"""New tokens of the request that are real: the first ones. The others are seen by nobody and see nothing."""
STATUS = request_operand("status")
"""0 while the request is prefilling, 1 while it is decoding."""
PREFIX = request_operand("prefix")
"""Tokens of the prefix: new ones in the prefix modes, from the request's start for the hole."""
PADDED_PREFIX = request_operand("padded_prefix")
"""The same with the prefix's padding, so at least ``prefix``."""
BLOCK = int_operand("block", minimum=1)
"""Tokens of a block. ``paged_mask`` puts its number here."""

MAX_EXTRAS = 4
"""Operands of a mode besides ``context`` and ``valid``: kernels carry that many values a request."""

FAR = 2**30
"""Past every position: kernels compute in int32, and what is FAR past a position must still fit."""

DECODING = Min(1, STATUS.symbol)
"""1 while the request is decoding, else 0."""


def where(flag: sympy.Expr, value: sympy.Expr) -> sympy.Expr:
    """``value`` where ``flag`` is 1; where it is 0, 0 or less, which is before every key."""
    return Min(value, FAR * flag)


def from_query(start: sympy.Expr, value: sympy.Expr) -> sympy.Expr:
    """``value`` for queries at ``start`` and later, 0 or less for those before: rises with ``q`` if ``value`` does."""
    return where(Min(1, Max(0, q - start + 1)), value)


def end_of_block() -> sympy.Expr:
    """The position after the query's block; blocks are counted from the request's start."""
    return (sympy.floor(q / BLOCK.symbol) + 1) * BLOCK.symbol


@dataclasses.dataclass(frozen=True)
class PagedMode:
    """Which keys the queries of a request see, before padding, window and prefix hole are applied to it.

    ``name``: an identifier, the op's ``mode``. ``visible``: an expression of the mask language (``custom_ops.masks``)
    over ``q``, ``k``, ``BLOCK.symbol`` and the symbols of per-request operands; a mode that lets every query see all
    cached keys (all that ship do) makes it true for ``k < context``. ``operands``: the per-request operands that it
    reads besides ``CONTEXT`` and ``VALID``, in the order in which the op takes them, at most ``MAX_EXTRAS``. ``doc``:
    a line for people. Raises ValueError where the name or an operand is not of that kind.
    """

    name: str
    visible: sympy.Basic
    operands: tuple[Operand, ...] = ()
    doc: str = ""

    def __post_init__(self) -> None:
        def expect(condition: bool, expected: str, got: object, remedy: str) -> None:
            if not condition:
                raise ValueError(f"paged mode {self.name!r}: expected {expected}, got {got}; {remedy}")

        object.__setattr__(self, "visible", sympy.sympify(self.visible))
        expect(self.name.isidentifier(), "an identifier as its name", repr(self.name), "rename it")
        unfit = [f"{o.name} ({o.kind})" for o in self.operands if o.kind != "request" or o.optional]
        expect(not unfit, "per-request operands that are not optional", unfit, "make them by request_operand")
        given = [o.name for o in self.operands if o in (CONTEXT, VALID)]
        expect(not given, "operands besides context and valid", given, "leave them out: every mode may read them")
        names = [o.name for o in self.operands]
        expect(len(names) <= MAX_EXTRAS, f"at most {MAX_EXTRAS} operands", names, "fold some into one")

    @property
    def reads_block(self) -> bool:
        return BLOCK.symbol in self.visible.free_symbols
