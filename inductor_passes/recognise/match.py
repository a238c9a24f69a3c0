"""Which form a visibility condition is: the condition solved for the keys that a query sees, compared with every form.

A spelling (``sdpa.py``, ``flex.py``, ``hand_written.py``) finds out what its mask says and asks ``match_form``. What
comes back is exact: on every query and key of the call the form sees what the condition says, or it is refused.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import sympy
from sympy.core.relational import Relational

from custom_ops.form import Form
from custom_ops.forms import FORMS
from custom_ops.mask_bounds import Span, solve
from custom_ops.masks import Operand, k, q

Size: TypeAlias = int | sympy.Expr
"""A length: a number, or an expression of symbolic sizes."""

_START = sympy.Dummy("start", integer=True)


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a call keeps the user's own path, as half a sentence for ``explain``."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Matched:
    """A form that sees what a condition says, with what its op takes after q, k and v.

    ``operands`` has an entry for every operand that the call needs; absent ones are optional. Integers of the mask are
    Python ints. All else is an expression over the symbols of the condition's tensor operands and of sizes:
    ``key_padding`` is a boolean one (True = hidden), which may read ``k`` as well; ``q_start`` is an integer one.
    """

    form: Form
    operands: dict[str, int | sympy.Basic]
    every_query_sees: bool
    """Whether it is proved that every query sees at least one key, whatever the tensors hold."""


def match_form(
    visible: sympy.Basic,
    *,
    query_len: Size,
    key_len: Size,
    tensors: Mapping[Operand, Any],
    forms: Mapping[str, Form] = FORMS,
) -> Matched | Refusal:
    """The form that sees what ``visible`` says.

    ``visible`` is a boolean expression over ``q``, the query's index in the call (``0 <= q < query_len``, wherever the
    query stands among the keys), ``k``, the key's index, symbols of sizes, and ``operand.symbol`` of the operands in
    ``tensors``. A boolean operand may stand in a conjunct of its own, negated or not. Values of ``tensors`` are the
    caller's; only their operands are read here.
    """
    visible = sympy.to_nnf(sympy.sympify(visible), simplify=False)
    visible = visible.xreplace({c: _reduced_relation(c) for c in visible.atoms(Relational)})
    if visible == sympy.false:
        return Refusal("its mask hides every key")
    query_len, key_len = sympy.sympify(query_len), sympy.sympify(key_len)
    conjuncts = set() if visible == sympy.true else set(sympy.And.make_args(visible))
    if query_len == 1:
        conjuncts = {c.xreplace({q: sympy.S.Zero}) for c in conjuncts} - {sympy.true}
    per_query = {q, *(o.symbol for o in tensors if o.kind == "query")}
    booleans = {o.symbol for o in tensors if o.boolean}
    padding = {c for c in conjuncts if c.free_symbols & booleans}
    mixed = [c for c in padding if c.free_symbols & per_query]
    if mixed:
        return Refusal(f"its mask hides keys by a tensor, but differently for each query: {mixed[0]}")
    rest = conjuncts - padding
    # Where one interval does not say it all, what does not depend on the query can be said as padding.
    by_key = {c for c in rest if not c.free_symbols & per_query}
    for hidden in (padding, padding | by_key):
        for form in sorted(forms.values(), key=lambda f: len(f.mask.operands)):
            matched = _compare(form, conjuncts - hidden, hidden, query_len, key_len, tensors)
            if matched is not None:
                return matched
        if not by_key:
            break
    return Refusal(f"no form sees what its mask says: {sympy.And(*rest)}")


def _compare(
    form: Form,
    seen: set[sympy.Basic],
    hidden: set[sympy.Basic],
    query_len: sympy.Expr,
    key_len: sympy.Expr,
    tensors: Mapping[Operand, Any],
) -> Matched | None:
    """``form`` if it sees exactly where all of ``seen`` and of ``hidden`` hold; ``hidden`` becomes key padding."""
    if hidden and form.mask.operand("key", boolean=True) is None:
        return None
    present = [o.name for o in form.mask.operands if not o.optional]
    mask = form.mask.specialise(present)
    key_symbols = {o.symbol for o in tensors if o.kind == "key"}
    banded = {c for c in seen if not c.free_symbols & key_symbols}
    span = solve(sympy.And(*banded))
    interval = mask.interval()
    if interval is None or not span.exact:
        return None
    if form.self_attention:
        place = _START if query_len == 1 else q + _START
        interval = tuple(e.xreplace({q: place}) for e in interval)  # type: ignore[assignment]
    elif query_len == 1:
        interval = tuple(e.xreplace({q: sympy.S.Zero}) for e in interval)  # type: ignore[assignment]
    for paired in _pairings(mask.operands, tensors):
        theirs = {c.xreplace(paired) for c in sympy.And.make_args(mask.per_key)} - {sympy.true}
        if {_canonical(c) for c in theirs} != {_canonical(c) for c in seen - banded}:
            continue
        lower, upper = (e.xreplace(paired) for e in interval)
        unknown = {o.symbol for o in mask.operands if o.kind in ("int", "request")} | {_START}
        for one in (_reduced(span, query_len, key_len), span):
            for found in _unify(Span(lower, upper, True), one, frozenset(unknown)):
                matched = _matched(form, mask.operands, {**paired, **found}, hidden, one, query_len, key_len)
                if matched is not None:
                    return matched
    return None


def _pairings(operands: Sequence[Operand], tensors: Mapping[Operand, Any]) -> Iterator[dict[sympy.Basic, sympy.Basic]]:
    """Every way to take the condition's per-query and per-key tensors for those of a form."""
    ours = [o for o in operands if o.kind in ("query", "key")]
    candidates = [[t.symbol for t in tensors if t.kind == o.kind and not t.boolean] for o in ours]
    for chosen in itertools.product(*candidates):
        yield dict(zip((o.symbol for o in ours), chosen, strict=True))


def _reduced_relation(relation: Relational) -> sympy.Basic:
    """The relation without a factor that all its terms share: ``2 * k <= 2 * q`` is ``k <= q``."""
    factor, rest = sympy.expand(relation.lhs - relation.rhs).as_content_primitive()
    return relation.func(rest, 0) if factor.is_Integer and factor > 1 else relation


def _canonical(condition: sympy.Basic) -> sympy.Basic:
    """One spelling of an equation and of its mirror image."""
    if isinstance(condition, (sympy.Eq, sympy.Ne)):
        return condition.func(*sorted(condition.args, key=sympy.default_sort_key))
    return condition


def _reduced(span: Span, query_len: sympy.Expr, key_len: sympy.Expr) -> Span:
    """The span without ends that every query and key of the call is inside of."""
    first, last = {q: sympy.S.Zero}, {q: query_len - 1}

    def extreme(end: sympy.Expr, least: bool) -> sympy.Expr | None:
        slope = sympy.expand(end).coeff(q, 1)
        if q in (end - slope * q).expand().free_symbols or not (slope.is_nonnegative or slope.is_nonpositive):
            return None
        return end.xreplace(first if bool(slope.is_nonnegative) == least else last)

    def binds_below(end: sympy.Expr) -> bool:
        most = extreme(end, least=False)
        return most is None or (most <= 0) != sympy.true

    def binds_above(end: sympy.Expr) -> bool:
        least = extreme(end, least=True)
        return least is None or (least >= key_len) != sympy.true

    lowers = [e for e in sympy.Max.make_args(span.lower) if binds_below(e)]
    uppers = [e for e in sympy.Min.make_args(span.upper) if e != sympy.oo and binds_above(e)]
    return Span(sympy.Max(0, *lowers), sympy.Min(sympy.oo, *uppers), True)


def _unify(ours: Span, theirs: Span, unknown: frozenset[sympy.Basic]) -> Iterator[dict[sympy.Basic, sympy.Basic]]:
    """Values of ``unknown`` for which the two spans are one, in every way in which their parts can be paired."""
    for uppers in _parts(ours.upper, theirs.upper, sympy.Min):
        for lowers in _parts(ours.lower, theirs.lower, sympy.Max):
            found = _solve_pairs([*uppers, *lowers], unknown)
            if found is not None:
                yield found


def _parts(ours: sympy.Expr, theirs: sympy.Expr, outer: Any) -> Iterator[list[tuple[sympy.Expr, sympy.Expr]]]:
    """Pairings of the arguments of two maxima or two minima; a single argument may itself be a nest of the other."""
    mine, other = ([a for a in outer.make_args(e) if a != 0 or outer is sympy.Min] for e in (ours, theirs))
    if len(mine) != len(other) or len(mine) > 3:
        return
    if len(mine) == 1 and outer is sympy.Min and isinstance(mine[0], sympy.Max):
        yield from _parts(mine[0], other[0], sympy.Max)
        return
    for order in itertools.permutations(other):
        yield list(zip(mine, order, strict=True))


def _solve_pairs(
    pairs: list[tuple[sympy.Expr, sympy.Expr]], unknown: frozenset[sympy.Basic]
) -> dict[sympy.Basic, sympy.Basic] | None:
    """What the unknowns are if both of each pair are equal; None where they are not, or where that does not tell."""
    found: dict[sympy.Basic, sympy.Basic] = {}
    waiting = list(pairs)
    while waiting:
        left = []
        for mine, theirs in waiting:
            if sympy.oo in (mine, theirs):
                if mine != theirs:
                    return None
                continue
            difference = sympy.expand(mine.xreplace(found) - theirs)
            open_ones = difference.free_symbols & unknown
            if not open_ones:
                if difference != 0:
                    return None
            elif len(open_ones) == 1:
                (one,) = open_ones
                slope = difference.coeff(one, 1)
                rest = sympy.expand(difference - slope * one)
                if slope not in (1, -1) or rest.free_symbols & {one, q, k}:
                    return None
                found[one] = sympy.expand(-slope * rest)
            else:
                left.append((mine, theirs))
        if len(left) == len(waiting):
            return None
        waiting = left
    return found


def _matched(
    form: Form,
    operands: Sequence[Operand],
    found: Mapping[sympy.Basic, sympy.Basic],
    hidden: set[sympy.Basic],
    span: Span,
    query_len: sympy.Expr,
    key_len: sympy.Expr,
) -> Matched | None:
    values: dict[str, int | sympy.Basic] = {}
    for o in operands:
        value = found.get(o.symbol)
        if value is None:
            return None
        if o.kind == "int":
            if not value.is_Integer or int(value) < (o.minimum or 0):
                return None
            value = int(value)
        elif o.kind == "request" and o.minimum is not None and _negative(value, o.minimum):
            return None
        values[o.name] = value
    start = found.get(_START, sympy.S.Zero)
    if form.self_attention:
        if not _among_keys(start, query_len, key_len):
            return None
        if start != 0 or query_len != key_len:
            values["q_start"] = start
    if hidden:
        values["key_padding"] = sympy.to_nnf(sympy.Not(sympy.And(*hidden)), simplify=False)
    return Matched(form, values, not hidden and _never_empty(span, query_len, key_len))


def _negative(value: sympy.Basic, minimum: int) -> bool:
    """Whether a value without tensors may lie below ``minimum``; what tensors hold is theirs to answer for."""
    return value.is_Integer and int(value) < minimum


def _among_keys(start: sympy.Expr, query_len: sympy.Expr, key_len: sympy.Expr) -> bool:
    """Whether queries that start at ``start`` surely stand among the keys, which is what ``q_start`` is for.

    Sizes alone must prove it; where the start is read from a tensor, it is what its owner says it is.
    """
    if start.has(sympy.Max, sympy.Min):
        return False
    if start == 0 or start.free_symbols - (query_len.free_symbols | key_len.free_symbols):
        return True
    return (start >= 0) == sympy.true and (sympy.expand(key_len - start - query_len) >= 0) == sympy.true


def _never_empty(span: Span, query_len: sympy.Expr, key_len: sympy.Expr) -> bool:
    """Whether ``lower <= k < upper`` surely has a key of the call in it for every query, each pair of ends alike."""

    def surely_positive(e: sympy.Expr) -> bool:
        slope = sympy.expand(e).coeff(q, 1)
        if q in sympy.expand(e - slope * q).free_symbols:
            return False
        return all((sympy.expand(e.xreplace({q: at})) > 0) == sympy.true for at in (sympy.S.Zero, query_len - 1))

    lowers = {sympy.S.Zero, *sympy.Max.make_args(span.lower)}
    uppers = {key_len, *(u for u in sympy.Min.make_args(span.upper) if u != sympy.oo)}
    return all(surely_positive(u - low) for u in uppers for low in lowers)
