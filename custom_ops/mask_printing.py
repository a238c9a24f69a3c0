"""Mask expressions as source text: Python over ints and tensors, and Triton device functions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import sympy
import torch
from sympy.core.relational import Relational
from sympy.printing.str import StrPrinter
from torch import Tensor

from custom_ops.mask_bounds import q, rises

if TYPE_CHECKING:
    from custom_ops.masks import Mask

PREDICATE_ARGUMENTS = "q, k, ints, request_value, query_value, key_value, key_padding"
BOUNDS_ARGUMENTS = "q_first, q_last, key_len, ints, request_value, query_min, query_max"
CONSTANTS = {sympy.true: "(k >= 0)", sympy.false: "(k < 0)"}
"""Constant predicates, elementwise over the keys all the same."""


class _Printer(StrPrinter):
    """Elementwise operators in full parentheses: ``&`` binds tighter than ``<``. Symbols may be renamed.

    ``floor(a / b)`` prints as ``a // b`` and ``Mod(a, b)`` as ``a % b``. Triton's ``//`` and ``%`` round towards zero,
    Python's down: they agree where ``a >= 0`` and ``b > 0``, so whatever may be otherwise, going by the assumptions of
    its symbols, is refused.
    """

    def __init__(self, maximum: str, minimum: str, names: dict[str, str]) -> None:
        super().__init__()
        self._functions = {sympy.Max: maximum, sympy.Min: minimum}
        self._names = names

    def _print_Symbol(self, e: sympy.Symbol) -> str:
        return self._names.get(e.name, e.name)

    def _joined(self, e: sympy.Basic, operator: str) -> str:
        return operator.join(f"({self._print(a)})" for a in sorted(e.args, key=sympy.default_sort_key))

    def _print_And(self, e: sympy.And) -> str:
        return self._joined(e, " & ")

    def _print_Or(self, e: sympy.Or) -> str:
        return self._joined(e, " | ")

    def _print_Not(self, e: sympy.Not) -> str:
        return f"({self._print(e.args[0])}) == 0"

    def _print_Relational(self, e: Relational) -> str:
        left, right = self._print(e.lhs), self._print(e.rhs)
        for side in e.args:
            if not side.is_integer:
                raise ValueError(
                    f"{e}: expected integers on both sides, got {side}, which may be a fraction; write floor(a / b)"
                )
        return f"{left} {e.rel_op} {right}"

    def _rounded(self, e: sympy.Expr, parts: tuple[sympy.Expr, sympy.Expr], operator: str) -> str:
        dividend, divisor = parts
        if not (dividend.is_nonnegative and divisor.is_positive):
            raise ValueError(
                f"{e}: expected a dividend that is never negative and a divisor that is always positive, got "
                f"{dividend} and {divisor}; give their operands a minimum, or divide something else"
            )
        return f"(({self._print(dividend)}) {operator} ({self._print(divisor)}))"

    def _print_floor(self, e: sympy.floor) -> str:
        return self._rounded(e, e.args[0].as_numer_denom(), "//")

    def _print_Mod(self, e: sympy.Mod) -> str:
        return self._rounded(e, e.args, "%")

    def _print_Pow(self, e: sympy.Pow, rational: bool = False) -> str:
        if not (e.exp.is_Integer and e.exp.is_positive):
            return self._print_Function(e)
        return f"({' * '.join([f'({self._print(e.base)})'] * int(e.exp))})"

    def _print_Function(self, e: sympy.Basic) -> str:
        raise ValueError(
            f"{e}: expected +, -, *, floor, Mod, Max and Min of integers, got {type(e).__name__}; write it with those "
            "(Abs(x) is Max(x, -x))"
        )

    _print_Abs = _print_ceiling = _print_Piecewise = _print_Function

    def _nested(self, e: sympy.Basic) -> str:
        first, *rest = sorted(e.args, key=sympy.default_sort_key)
        text = self._print(first)
        for a in rest:
            text = f"{self._functions[type(e)]}({text}, {self._print(a)})"
        return text

    _print_Max = _nested
    _print_Min = _nested


def python_text(expression: sympy.Basic) -> str:
    """``expression`` as Python over ints and integer tensors, with ``maximum`` and ``minimum`` in scope."""
    return CONSTANTS.get(expression) or _Printer("maximum", "minimum", {}).doprint(expression)


def triton_text(expression: sympy.Basic, names: dict[str, str] | None = None, namespace: str = "tl") -> str:
    """``expression`` as a Triton expression; ``names`` renames symbols. Gluon's ``namespace`` is ``"gl"``."""
    printer = _Printer(f"{namespace}.maximum", f"{namespace}.minimum", names or {})
    return CONSTANTS.get(expression) or printer.doprint(expression)


@functools.cache
def python_function(expression: sympy.Basic, arguments: tuple[str, ...]) -> Callable[..., Any]:
    """``expression`` as a Python function of ints and integer tensors, which broadcast; Dynamo can trace it."""
    scope = {"maximum": _maximum, "minimum": _minimum}
    return eval(f"lambda {', '.join(arguments)}: {python_text(expression)}", scope)


def triton_source(mask: Mask, namespace: str = "tl") -> str:
    """Three Triton device functions as undecorated source, one after the other:

    ``<name>_visible`` the banded predicate, applied to partial tiles; ``<name>_key_visible`` the per-key predicate,
    applied to every tile; ``<name>_bounds`` the tile bounds clipped to ``0 <= k <= key_len``. Operands arrive by slot:
    ``ints`` is a tuple in the order of the mask's int operands; a kind's value is broadcast already, and anything where
    the mask has no such operand. ``namespace`` is ``"tl"`` or, for Gluon, ``"gl"``. Raises ValueError for several
    per-request operands: there is one slot.
    """
    if len(mask.request_operands) > 1:
        names = [o.name for o in mask.request_operands]
        raise ValueError(f"mask {mask.name!r}: expected one per-request operand, got {names}; print it by range_source")
    reads = _reads(mask)
    per_query = mask.operand("query")
    if per_query is not None:
        # In 64 bits: "no segment" may be the greatest int32, and a bound is one more.
        reads[per_query.lowest.name] = f"{namespace}.cast(query_min, {namespace}.int64)"
        reads[per_query.highest.name] = f"{namespace}.cast(query_max, {namespace}.int64)"

    def predicate(suffix: str, condition: sympy.Basic) -> str:
        text = triton_text(condition, reads, namespace)
        return f"def {mask.name}_{suffix}({PREDICATE_ARGUMENTS}):\n    return {text}\n"

    bounds = mask.tile_bounds()
    lines = [f"def {mask.name}_bounds({BOUNDS_ARGUMENTS}):"]
    for end in ("lo_any", "lo_all", "hi_all", "hi_any"):
        e = getattr(bounds, end)
        text = "key_len" if e == sympy.oo else triton_text(e, reads, namespace)
        clipped = f"{namespace}.minimum({namespace}.maximum({text}, 0), key_len)"
        if f"{namespace}.int64" in text:
            clipped = f"{namespace}.cast({clipped}, {namespace}.int32)"
        lines.append(f"    {end} = {clipped}")
    lines.append("    return lo_any, lo_all, hi_all, hi_any\n")
    return "\n\n".join([predicate("visible", mask.banded), predicate("key_visible", mask.per_key), "\n".join(lines)])


def _reads(mask: Mask) -> dict[str, str]:
    """What device functions call the operands, by name."""
    reads = {o.name: f"ints[{i}]" for i, o in enumerate(mask.int_operands)}
    reads.update({o.name: "key_padding" if o.boolean else f"{o.kind}_value" for o in mask.operands if o.kind != "int"})
    return reads


def interval_source(mask: Mask, namespace: str = "tl") -> str:
    """A device function of a mask whose ``interval()`` is not None, undecorated:

    ``<name>_interval(q, key_len, ints, request_value, query_value)`` returns ``(lower, upper)``, int32 of ``q``'s
    shape: query ``q`` sees the keys ``lower <= k < upper``, as far as the banded part goes. Operands arrive as for
    ``triton_source``. Raises ValueError for another mask.
    """
    ends = mask.interval()
    if ends is None:
        raise ValueError(f"mask {mask.name!r}: expected one interval of keys a query, got several; use its predicate")
    reads = _reads(mask)
    per_query = mask.operand("query")
    if per_query is not None:
        # In 64 bits: "no segment" may be the greatest int32, and an end is one more.
        reads[per_query.name] = f"{namespace}.cast(query_value, {namespace}.int64)"
    lines = [f"def {mask.name}_interval(q, key_len, ints, request_value, query_value):"]
    for end, e in zip(("lower", "upper"), ends, strict=True):
        text = "key_len" if e == sympy.oo else triton_text(e, reads, namespace)
        clipped = f"{namespace}.minimum({namespace}.maximum({text}, 0), key_len)"
        # Of q's shape even where it is one number.
        lines.append(f"    {end} = {namespace}.cast(q * 0 + {clipped}, {namespace}.int32)")
    lines.append("    return lower, upper\n")
    return "\n".join(lines)


def range_source(mask: Mask, namespace: str = "tl") -> str:
    """Two device functions of a mask over per-request operands (a paged one), undecorated, one after the other:

    ``<name>_range(q, requests)`` returns ``(lower, upper)``, integers of ``q``'s shape: all keys ``k >= 0`` that query
    ``q`` sees are in ``lower <= k < upper``, and all of these are seen where ``mask.interval()`` is not None. The ends
    are not clipped (``lower`` may be negative), and neither ever falls as ``q`` grows: what the queries of a tile see
    is in the lower end of its first query and the upper end of its last.

    ``<name>_visible(q, k, requests)`` returns the predicate itself, for masks whose ``interval()`` is None. It is
    of the shape of ``k`` alone where it does not depend on ``q``.

    ``requests`` is a tuple of scalars that begins with the mask's operands, in their order. ``namespace`` is ``"tl"``
    or, for Gluon, ``"gl"``. Raises ValueError where another kind of operand is read, where the keys have no upper end,
    and where an end may fall.
    """
    others = [f"{o.name} ({o.kind})" for o in mask.operands if o.kind != "request"]
    if others:
        raise ValueError(f"mask {mask.name!r}: expected per-request operands only, got {others}; make them numbers")
    reads = {o.name: f"requests[{i}]" for i, o in enumerate(mask.operands)}
    lines = [f"def {mask.name}_range(q, requests):"]
    for end, e in zip(("lower", "upper"), mask.key_range(), strict=True):
        if e == sympy.oo:
            raise ValueError(f"mask {mask.name!r}: expected an upper end of the keys, got none; add k < something")
        if not rises(e):
            raise ValueError(
                f"mask {mask.name!r}: expected an end that cannot fall as q grows, got the {end} {e}; write it with +, "
                "Max, Min and floor of q, and with no negative factor"
            )
        text = triton_text(e, reads, namespace)
        # Of q's shape (and, in Gluon, of its layout) even where it is one number a request.
        lines.append(f"    {end} = {text if q in e.free_symbols else f'q * 0 + ({text})'}")
    lines.append("    return lower, upper\n")
    visible = triton_text(mask.visible, reads, namespace)
    return "\n\n".join(["\n".join(lines), f"def {mask.name}_visible(q, k, requests):\n    return {visible}\n"])


def _maximum(a: int | Tensor, b: int | Tensor) -> int | Tensor:
    return _pairwise(torch.maximum, max, a, b)


def _minimum(a: int | Tensor, b: int | Tensor) -> int | Tensor:
    return _pairwise(torch.minimum, min, a, b)


def _pairwise(on_tensors: Callable, on_ints: Callable, a: int | Tensor, b: int | Tensor) -> int | Tensor:
    like = a if isinstance(a, Tensor) else b
    if not isinstance(like, Tensor):
        return on_ints(a, b)
    return on_tensors(torch.as_tensor(a, device=like.device), torch.as_tensor(b, device=like.device))
