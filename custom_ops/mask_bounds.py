"""Which keys a tile of queries can see: a mask's conditions solved for ``k``, and their extremes over the tile.

Everything here is symbolic and happens once a mask. ``custom_ops/masks.py`` says how it is used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import sympy
from sympy.core.relational import Relational

q = sympy.Symbol("q", integer=True, nonnegative=True)
"""Absolute position of a query, in tokens."""
k = sympy.Symbol("k", integer=True, nonnegative=True)
"""Absolute position of a key, in tokens (or segments, where a key is a segment)."""
q_first = sympy.Symbol("q_first", integer=True, nonnegative=True)
q_last = sympy.Symbol("q_last", integer=True, nonnegative=True)

Ends = Mapping[sympy.Symbol, tuple[sympy.Symbol, sympy.Symbol]]
"""What varies over a tile of queries, with its least and its greatest value there."""


@dataclasses.dataclass(frozen=True)
class TileBounds:
    """Bounds on the keys that queries ``q_first..q_last`` (both included) see, before clipping to ``0 <= k < Lk``.

    Keys ``k < lo_any`` or ``k >= hi_any`` are hidden from every query of the tile; keys ``lo_all <= k < hi_all`` are
    visible to every query, as far as the mask's banded part goes. ``sympy.oo`` stands for the number of keys.
    """

    lo_any: sympy.Expr
    lo_all: sympy.Expr
    hi_all: sympy.Expr
    hi_any: sympy.Expr


CONSERVATIVE = TileBounds(sympy.S.Zero, sympy.oo, sympy.S.Zero, sympy.oo)
"""What is used where bounds cannot be derived: every key may be seen, none is surely seen."""


class Span(NamedTuple):
    """``lower <= k < upper`` wherever a condition holds, for ``k >= 0``; ``exact`` where the converse holds as well."""

    lower: sympy.Expr
    upper: sympy.Expr
    exact: bool


_UNKNOWN = Span(sympy.S.Zero, sympy.oo, False)


def without_fractions(relation: Relational) -> sympy.Basic:
    """The same relation between integers, where its denominators are positive; as it is where they may not be.

    Sympy itself makes fractions: of ``floor(k / block) <= n`` it makes ``k / block < n + 1``, which a GPU would round.
    """
    if relation.lhs.is_integer and relation.rhs.is_integer:
        return relation
    (left, left_over), (right, right_over) = relation.lhs.as_numer_denom(), relation.rhs.as_numer_denom()
    if not (left_over.is_positive and right_over.is_positive):
        return relation
    return relation.func(sympy.expand(left * right_over), sympy.expand(right * left_over))


def solve(condition: sympy.Basic) -> Span:
    """The narrowest span of ``k`` that can be told from the structure of ``condition``."""
    if condition == sympy.true:
        return Span(sympy.S.Zero, sympy.oo, True)
    if condition == sympy.false:
        return Span(sympy.S.Zero, sympy.S.Zero, True)
    if isinstance(condition, Relational):
        return _solve_relation(condition)
    if not isinstance(condition, (sympy.And, sympy.Or)):
        return _UNKNOWN
    lowers, uppers, exacts = zip(*(solve(a) for a in condition.args), strict=True)
    if isinstance(condition, sympy.And):
        return Span(sympy.Max(*lowers), sympy.Min(*uppers), all(exacts))
    # A union of intervals has no hole when they all start at 0, or when none of them ends.
    no_hole = all(lower == 0 for lower in lowers) or all(upper == sympy.oo for upper in uppers)
    return Span(sympy.Min(*lowers), sympy.Max(*uppers), all(exacts) and no_hole)


def _solve_relation(relation: Relational) -> Span:
    """A relation linear in ``k`` with coefficient 1 or -1."""
    if relation.lhs == k and not relation.rhs.has(k, sympy.Mod):
        slope, bound = sympy.S.One, relation.rhs  # solved: expanding a nest of Max and Min takes sympy seconds
    else:
        difference = relation.lhs - relation.rhs  # REL 0
        difference = sympy.expand(difference.replace(sympy.Mod, lambda a, b: a - b * sympy.floor(a / b)))
        slope = difference.coeff(k, 1)
        rest = difference - slope * k
        if slope not in (1, -1) or k in rest.free_symbols:
            return _UNKNOWN
        bound = -slope * rest
    kind = type(relation if slope == 1 else relation.reversed)  # k KIND bound
    intervals = {
        sympy.Lt: (sympy.S.Zero, bound),
        sympy.Le: (sympy.S.Zero, bound + 1),
        sympy.Gt: (bound + 1, sympy.oo),
        sympy.Ge: (bound, sympy.oo),
        sympy.Eq: (bound, bound + 1),
    }
    return Span(*intervals[kind], True) if kind in intervals else _UNKNOWN


def bounds_over_tile(span: Span, ends: Ends) -> TileBounds:
    """``span``'s extremes over a tile; an extreme that cannot be told is replaced by its ``CONSERVATIVE`` value."""
    lo_any, hi_any = _extreme(span.lower, ends, least=True), _extreme(span.upper, ends, least=False)
    lo_all, hi_all = _extreme(span.lower, ends, least=False), _extreme(span.upper, ends, least=True)
    if not span.exact or lo_all is None or hi_all is None:
        lo_all, hi_all = CONSERVATIVE.lo_all, CONSERVATIVE.hi_all
    lo_any = CONSERVATIVE.lo_any if lo_any is None else lo_any
    hi_any = CONSERVATIVE.hi_any if hi_any is None else hi_any
    return TileBounds(*map(_without_zero, (lo_any, lo_all, hi_all, hi_any)))


def _extreme(e: sympy.Expr, ends: Ends, least: bool) -> sympy.Expr | None:
    """A lower bound (``least``) or an upper bound of ``e`` over the tile; None where the structure does not tell.

    Interval arithmetic, so always sound. It is exact where everything in ``e`` rises and falls together.
    """
    if not e.free_symbols & ends.keys():
        return e
    if isinstance(e, sympy.Symbol):
        return ends[e][0 if least else 1]
    if isinstance(e, (sympy.Add, sympy.Max, sympy.Min, sympy.floor)):
        parts = [_extreme(a, ends, least) for a in e.args]
        return None if None in parts else e.func(*parts)
    if isinstance(e, sympy.Mul):
        factor = sympy.Mul(*(a for a in e.args if not a.free_symbols & ends.keys()))
        varying = [a for a in e.args if a.free_symbols & ends.keys()]
        if len(varying) > 1 or not (factor.is_nonnegative or factor.is_nonpositive):
            return None
        part = _extreme(varying[0], ends, least if factor.is_nonnegative else not least)
        return None if part is None else factor * part
    return None


def rises(e: sympy.Expr) -> bool:
    """Whether the structure of ``e`` tells that it never falls as ``q`` grows.

    Its extremes over a tile are then its values at the tile's first and last query, with no looseness.
    """
    if q not in e.free_symbols or e == q:
        return True
    if isinstance(e, (sympy.Add, sympy.Max, sympy.Min, sympy.floor)):
        return all(rises(a) for a in e.args)
    if isinstance(e, sympy.Mul):
        varying = [a for a in e.args if q in a.free_symbols]
        factor = sympy.Mul(*(a for a in e.args if q not in a.free_symbols))
        return len(varying) == 1 and bool(factor.is_nonnegative) and rises(varying[0])
    return False


def _without_zero(e: sympy.Expr) -> sympy.Expr:
    """Bounds are clipped at 0 anyway, so a maximum with 0 says nothing."""
    return sympy.Max(*(a for a in e.args if a != 0)) if isinstance(e, sympy.Max) else e


def width(span: Span, varying: set[sympy.Symbol]) -> sympy.Expr:
    """An upper bound on ``upper - lower`` in which none of ``varying`` is left; ``oo`` where there is none."""
    lowers = {sympy.S.Zero, *sympy.Max.make_args(span.lower)}
    spans = [sympy.expand(u - lower) for u in sympy.Min.make_args(span.upper) for lower in lowers if u != sympy.oo]
    bounded = [s for s in spans if not s.free_symbols & varying]
    return sympy.Max(0, sympy.Min(*bounded)) if bounded else sympy.oo
