"""Which conditions can never hold: how numbers drop out that a mask only seems to have."""

from __future__ import annotations

import sympy
from sympy.core.relational import Relational
from sympy.logic.inference import satisfiable


def impossible(condition: sympy.Basic) -> bool:
    """Whether the logic of a condition says that it never holds, each comparison taken for true or false by itself."""
    if condition in (sympy.true, sympy.false):
        return condition == sympy.false
    if not isinstance(condition, (sympy.And, sympy.Or)):
        return False
    known: dict[sympy.Basic, sympy.Symbol] = {}
    atoms = {relation: _literal(relation, known) for relation in condition.atoms(Relational)}
    return satisfiable(condition.xreplace(atoms)) is False


def _literal(relation: Relational, known: dict[sympy.Basic, sympy.Symbol]) -> sympy.Basic:
    """A comparison of integers as a letter or its negation; what is the opposite of another has that one's letter."""
    difference = sympy.expand(relation.lhs - relation.rhs)
    if isinstance(relation, (sympy.Eq, sympy.Ne)):
        one = min(difference, -difference, key=sympy.default_sort_key)
        letter = known.setdefault(sympy.Eq(one, 0, evaluate=False), sympy.Dummy())
        return letter if isinstance(relation, sympy.Eq) else ~letter
    positive = {  # the comparison as: this is positive
        sympy.Gt: difference, sympy.Ge: difference + 1, sympy.Lt: -difference, sympy.Le: 1 - difference,
    }[relation.func]  # fmt: skip
    opposite = sympy.expand(1 - positive)
    first = min(positive, opposite, key=sympy.default_sort_key)
    letter = known.setdefault(sympy.Gt(first, 0, evaluate=False), sympy.Dummy())
    return letter if first == positive else ~letter
