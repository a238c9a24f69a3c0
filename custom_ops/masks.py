"""The mask language: what a query may see, as ONE sympy expression per form.

A mask is a boolean expression over two positions, ``q`` and ``k`` (absolute, in tokens), and named operands.
Everything else is derived from it: the dense reference mask, the Flex ``mask_mod``, the Triton predicate, the FLOP
count, a drawing, and the *tile bounds*, which say for a tile of queries which keys nobody in the tile sees (the kernel
skips them) and which keys everybody sees (the kernel applies no predicate).

    >>> from custom_ops.masks import Mask, int_operand, k, q
    >>> window = int_operand("window", minimum=1)
    >>> sliding = Mask("sliding", (k <= q) & (q - k < window.symbol), (window,))
    >>> sliding.tile_bounds()
    TileBounds(lo_any=q_first - window + 1, lo_all=q_last - window + 1, hi_all=q_first + 1, hi_any=q_last + 1)
    >>> print(sliding.draw_text(4, 4, {"window": 2}))
    █···
    ██··
    ·██·
    ··██

Expressions are made of ``+ - *``, ``sympy.floor(a / b)``, ``sympy.Mod``, ``sympy.Max`` and ``sympy.Min`` of integers,
compared by ``< <= > >=``, ``sympy.Eq`` and ``sympy.Ne`` (``==`` compares sympy expressions, not their values), and
joined by ``& | ~``. What is divided must never be negative: Triton rounds towards zero where Python rounds down.

How bounds are found: each conjunct is solved for ``k``, which gives an interval ``lower <= k < upper``; conjunctions
take the maximum of the lower ends and the minimum of the upper ends. The extremes of the ends over a tile follow from
its first and last query, and from the minimum and maximum of a per-query operand over the tile. Conjuncts that read a
per-key operand (key padding, document ids) cannot be bounded without reading it: they stay out of the bounds and are
applied to every tile. What cannot be solved is conservative: it bounds nothing, and no tile is full. Of a union with a
hole (a sink and a window) only what lies before or after all of it is skipped, and no tile is full.

The masks of paged attention (``custom_ops.paged.masks``) read several values a request, and their kernels take the
range of keys of each query instead of tile bounds: ``custom_ops.mask_printing.range_source``.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import keyword
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, Literal

import sympy
import torch
from sympy.core.relational import Relational
from sympy.logic.boolalg import Boolean
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from custom_ops.mask_bounds import (
    CONSERVATIVE,
    Span,
    TileBounds,
    bounds_over_tile,
    k,
    q,
    q_first,
    q_last,
    solve,
    width,
    without_fractions,
)
from custom_ops.mask_printing import python_function, python_text

__all__ = [
    "CONSERVATIVE",
    "KEY_PADDING",
    "Mask",
    "Operand",
    "OperandValue",
    "TileBounds",
    "int_operand",
    "k",
    "key_operand",
    "q",
    "q_first",
    "q_last",
    "query_operand",
    "request_operand",
]

Kind = Literal["int", "request", "query", "key"]
OperandValue = int | Tensor | None

_RESERVED = ("q", "k", "q_first", "q_last", "maximum", "minimum")
_BROADCAST: dict[Kind, tuple] = {
    "request": (slice(None), None, None),
    "query": (slice(None), slice(None), None),
    "key": (slice(None), None, slice(None)),
}
"""Indices that bring a tensor operand to ``[B, Lq, Lk]``."""


@dataclasses.dataclass(frozen=True)
class Operand:
    """A named value that a mask reads.

    ``kind``: ``"int"`` a plain integer; ``"request"`` int tensor ``[B]``; ``"query"`` int tensor ``[B, Lq]``; ``"key"``
    int or bool tensor ``[B, Lk]``. ``minimum`` is the least legal value of an integer, None where it may be any. A
    ``boolean`` operand hides keys: a mask reads it as the conjunct ``~operand.symbol``, and True = hidden. An
    ``optional`` operand may be None: the conjuncts that read it then drop out of the mask.
    """

    name: str
    kind: Kind
    minimum: int | None = None
    boolean: bool = False
    optional: bool = False

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or keyword.iskeyword(self.name) or self.name in _RESERVED:
            taken = ", ".join(_RESERVED)
            raise ValueError(
                f"operand {self.name!r}: expected an identifier, no keyword and none of {taken}; rename it"
            )
        if self.boolean and self.kind != "key":
            raise ValueError(
                f"operand {self.name!r}: expected kind 'key' for a boolean, got {self.kind!r}; use integers"
            )
        if self.optional and self.kind == "int":
            raise ValueError(f"operand {self.name!r}: expected a tensor where optional, got an int; give it a value")

    @property
    def symbol(self) -> sympy.Symbol:
        return sympy.Symbol(self.name) if self.boolean else self._integer(self.name)

    @property
    def lowest(self) -> sympy.Symbol:
        """The operand's minimum over a tile of queries."""
        return self._integer(f"{self.name}_min")

    @property
    def highest(self) -> sympy.Symbol:
        """The operand's maximum over a tile of queries."""
        return self._integer(f"{self.name}_max")

    def _integer(self, name: str) -> sympy.Symbol:
        minimum = -1 if self.minimum is None else self.minimum
        sign = {"positive": True} if minimum >= 1 else {"nonnegative": True} if minimum == 0 else {}
        return sympy.Symbol(name, integer=True, **sign)


def int_operand(name: str, minimum: int = 0) -> Operand:
    """A plain integer, at least ``minimum``."""
    return Operand(name, "int", minimum)


def request_operand(name: str, minimum: int | None = 0) -> Operand:
    """One integer a request, tensor ``[B]``."""
    return Operand(name, "request", minimum)


def query_operand(name: str, minimum: int | None = None) -> Operand:
    """One integer a query, tensor ``[B, Lq]``."""
    return Operand(name, "query", minimum)


def key_operand(name: str, *, boolean: bool = False, optional: bool = False) -> Operand:
    """One integer (or bool) a key, tensor ``[B, Lk]``."""
    return Operand(name, "key", None, boolean, optional)


KEY_PADDING = key_operand("key_padding", boolean=True, optional=True)
"""The padding operand that every dense form takes: True = the key is hidden from every query."""


@dataclasses.dataclass(frozen=True)
class Mask:
    """Visibility of keys to queries: ``visible`` is true where query ``q`` sees key ``k``.

    ``name`` is an identifier (generated functions carry it). ``operands`` lists every operand of the expression, in the
    order in which ops take them; besides plain ints and per-request values there may be one operand of a kind (two of
    kind ``"key"`` when one is boolean). Dense forms take one per-request value, paged masks any number. ``visible`` is
    brought to negation normal form: ``~(a | b)`` is two conjuncts. Raises ValueError where it is not an expression of
    the mask language.
    """

    name: str
    visible: sympy.Basic
    operands: tuple[Operand, ...] = ()

    # Set once per mask, and no part of its identity. Dynamo traces dense and flex_mask_mod, and cannot trace sympy:
    # what they need is made beforehand, as plain functions and masks.
    _sees: ClassVar[Any]
    _specialised: ClassVar[Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "visible", _checked(self.name, sympy.sympify(self.visible), self.operands))
        names = ("q", "k", *(o.name for o in self.operands))
        object.__setattr__(self, "_sees", python_function(self.visible, names))
        object.__setattr__(self, "_specialised", self._without_each_choice())

    def __reduce__(self) -> tuple:
        return Mask, (self.name, self.visible, self.operands)

    # ------------------------------------------------------------------ structure

    def _without_each_choice(self) -> dict[tuple[str, ...], Mask]:
        """This mask by the names of the optional operands that are absent."""
        optional = [o for o in self.operands if o.optional]
        masks: dict[tuple[str, ...], Mask] = {(): self}
        for count in range(1, len(optional) + 1):
            for absent in itertools.combinations(optional, count):
                gone = {o.symbol for o in absent}
                kept = [c for c in sympy.And.make_args(self.visible) if not c.free_symbols & gone]
                operands = tuple(o for o in self.operands if o not in absent)
                masks[tuple(o.name for o in absent)] = Mask(self.name, sympy.And(*kept), operands)
        return masks

    def specialise(self, present: Collection[str]) -> Mask:
        """The mask with the conjuncts of optional operands that are not in ``present`` dropped."""
        return self._specialised[tuple([o.name for o in self.operands if o.optional and o.name not in present])]

    def _conjuncts(self, per_key: bool) -> sympy.Basic:
        key_symbols = {o.symbol for o in self.operands if o.kind == "key"}
        conjuncts = sympy.And.make_args(self.visible)
        return sympy.And(*(c for c in conjuncts if bool(c.free_symbols & key_symbols) == per_key))

    @property
    def banded(self) -> sympy.Basic:
        """The conjuncts that read no per-key operand: they give the tile bounds, and full tiles skip them."""
        return self._conjuncts(per_key=False)

    @property
    def per_key(self) -> sympy.Basic:
        """The conjuncts that read a per-key operand: they are applied to every tile."""
        return self._conjuncts(per_key=True)

    def operand(self, kind: Kind, boolean: bool = False) -> Operand | None:
        """The operand of this kind (not for ints; the first one of kind "request"), or None."""
        return next((o for o in self.operands if o.kind == kind and o.boolean == boolean), None)

    @property
    def request_operands(self) -> tuple[Operand, ...]:
        return tuple(o for o in self.operands if o.kind == "request")

    @property
    def int_operands(self) -> tuple[Operand, ...]:
        return tuple(o for o in self.operands if o.kind == "int")

    # ------------------------------------------------------------------ bounds

    @functools.cache  # noqa: B019  masks are few and live as long as their forms
    def _span(self) -> Span:
        return solve(self.banded)

    def interval(self) -> tuple[sympy.Expr, sympy.Expr] | None:
        """``(lower, upper)`` where the banded part is ``lower <= k < upper``, None where it is not one interval."""
        lower, upper, exact = self._span()
        return (lower, upper) if exact else None

    def key_range(self) -> tuple[sympy.Expr, sympy.Expr]:
        """``(lower, upper)``: all visible ``k`` are in ``lower <= k < upper``; see ``interval`` for the converse."""
        lower, upper, _ = self._span()
        return lower, upper

    @functools.cache  # noqa: B019
    def tile_bounds(self) -> TileBounds:
        """Bounds on the visible keys of a tile of queries; ``CONSERVATIVE`` where they cannot be derived."""
        per_query = self.operand("query")
        ends = {q: (q_first, q_last)}
        if per_query is not None:
            ends[per_query.symbol] = (per_query.lowest, per_query.highest)
        return bounds_over_tile(self._span(), ends)

    @property
    def is_bounded(self) -> bool:
        """Whether tiles can be skipped or be full at all."""
        return self.tile_bounds() != CONSERVATIVE

    @functools.cache  # noqa: B019
    def width(self) -> sympy.Expr:
        """An upper bound on the keys that a query sees, over the int operands alone; ``oo`` where there is none."""
        return width(self._span(), {q, *(o.symbol for o in self.operands if o.kind != "int")})

    def width_for(self, ints: tuple[int, ...]) -> int | None:
        """``width`` in numbers, for these values of the int operands; None where there is no bound."""
        if self.width() == sympy.oo:
            return None
        return int(python_function(self.width(), tuple(o.name for o in self.int_operands))(*ints))

    # ------------------------------------------------------------------ evaluation

    def dense(self, q_positions: Tensor, k_positions: Tensor, operands: Mapping[str, OperandValue]) -> Tensor:
        """The mask as a tensor, for references and small chunks.

        ``q_positions`` int ``[Lq]`` or ``[B, Lq]``; ``k_positions`` int ``[Lk]``; per-query and per-key operands must
        already be cut to these queries and keys. Returns bool ``[B, Lq, Lk]`` (``B`` = 1 where nothing depends on the
        request). Raises ValueError where an operand is missing.
        """
        mask = self.for_call(operands)
        rows = q_positions if q_positions.dim() == 2 else q_positions[None]
        values: list[OperandValue] = [rows[:, :, None], k_positions[None, None, :]]
        for o in mask.operands:
            value = operands[o.name]
            values.append(value[_BROADCAST[o.kind]] if isinstance(value, Tensor) else value)
        batches = [(v.shape[0],) for v in values if isinstance(v, Tensor)]
        shape = (*torch.broadcast_shapes(*batches), rows.shape[1], k_positions.shape[0])
        return torch.as_tensor(mask._sees(*values), device=rows.device).expand(shape)

    def flex_mask_mod(
        self, operands: Mapping[str, OperandValue], q_start: Tensor | None = None
    ) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """The mask as a FlexAttention ``mask_mod(b, h, q_idx, kv_idx)``; ``q_start`` int ``[B]`` shifts the queries.

        Raises ValueError where an operand is missing.
        """
        mask = self.for_call(operands)
        values = [(o.kind, operands[o.name]) for o in mask.operands]

        def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            at: list = [q_idx if q_start is None else q_idx + q_start[b], kv_idx]
            for kind, value in values:
                if not isinstance(value, Tensor):
                    at.append(value)
                else:
                    at.append(value[b] if kind == "request" else value[b, q_idx if kind == "query" else kv_idx])
            return torch.as_tensor(mask._sees(*at))

        return mask_mod

    def for_call(self, operands: Mapping[str, OperandValue]) -> Mask:
        """``specialise`` for these operands, by name; ValueError where one is missing that is not optional."""
        for o in self.operands:
            if not o.optional and operands.get(o.name) is None:
                raise ValueError(f"mask {self.name!r}: {o.name}: expected a value, got None; pass {o.name}")
        return self.specialise([name for name, value in operands.items() if value is not None])

    def evaluate_bounds(
        self,
        first: int,
        last: int,
        key_len: int,
        ints: Mapping[str, int],
        query_range: tuple[int, int] | None = None,
        request_value: int | Mapping[str, int] | None = None,
    ) -> tuple[int, int, int, int]:
        """``tile_bounds`` in numbers, clipped to ``[0, key_len]``, for the queries at positions ``first..last``.

        ``query_range`` is the minimum and maximum of the per-query operand over the tile, ``request_value`` the value
        of the per-request operand, or the values by name. Bounds that read one that is not given are conservative.
        """
        per_query, per_request = self.operand("query"), self.operand("request")
        values: dict[str, int] = {"q_first": first, "q_last": last, **{o.name: ints[o.name] for o in self.int_operands}}
        if per_query is not None and query_range is not None:
            values |= {per_query.lowest.name: query_range[0], per_query.highest.name: query_range[1]}
        if per_request is not None and request_value is not None:
            values |= request_value if isinstance(request_value, Mapping) else {per_request.name: request_value}

        def number(e: sympy.Expr, otherwise: sympy.Expr) -> int:
            if any(s.name not in values for s in e.free_symbols):
                e = otherwise
            value = key_len if e == sympy.oo else python_function(e, tuple(values))(*values.values())
            return min(max(value, 0), key_len)

        bounds = self.tile_bounds()
        names = [field.name for field in dataclasses.fields(bounds)]
        lo_any, lo_all, hi_all, hi_any = (number(getattr(bounds, n), getattr(CONSERVATIVE, n)) for n in names)
        return lo_any, lo_all, hi_all, hi_any

    def visible_pairs(self, query_len: int, key_len: int, ints: Mapping[str, int]) -> int:
        """How many (query, key) pairs of a head can be visible, by shapes and ints; queries are at the end of the keys.

        Exact for one interval of positions and ints; an upper bound where there are several, or where a tensor decides.
        """
        lower, upper, _ = self._span()
        names = tuple(o.name for o in self.int_operands)
        numbers = tuple(ints[n] for n in names)
        if (lower.free_symbols | upper.free_symbols) & {o.symbol for o in self.operands if o.kind != "int"}:
            per_query = self.width_for(numbers)
            return query_len * min(key_len if per_query is None else per_query, key_len)

        def clipped(e: sympy.Expr) -> Tensor:
            value = key_len if e == sympy.oo else python_function(e, ("q", *names))(position, *numbers)
            return torch.as_tensor(value).clamp(0, key_len)

        # Inductor counts under fake tensors, which have no values.
        with _disable_current_modes():
            position = torch.arange(query_len) + max(key_len - query_len, 0)
            return int((clipped(upper) - clipped(lower)).clamp(min=0).expand(query_len).sum())

    # ------------------------------------------------------------------ drawing

    def draw_text(
        self,
        query_len: int,
        key_len: int,
        operands: Mapping[str, OperandValue] | None = None,
        tile: tuple[int, int] | None = None,
        q_start: int | Tensor | None = None,
        request: int = 0,
    ) -> str:
        """The mask as text, a row a query and a character a key; see ``custom_ops.mask_drawing.draw_text``."""
        from custom_ops import mask_drawing

        return mask_drawing.draw_text(self, query_len, key_len, operands, tile, q_start, request)

    def draw_svg(
        self,
        query_len: int,
        key_len: int,
        operands: Mapping[str, OperandValue] | None = None,
        tile: tuple[int, int] | None = None,
        q_start: int | Tensor | None = None,
        request: int = 0,
    ) -> str:
        """The mask as a picture; see ``custom_ops.mask_drawing.draw_svg``."""
        from custom_ops import mask_drawing

        return mask_drawing.draw_svg(self, query_len, key_len, operands, tile, q_start, request)


def _checked(name: str, visible: sympy.Basic, operands: tuple[Operand, ...]) -> sympy.Basic:
    """``visible`` in negation normal form; ValueError where it is no expression of the mask language."""

    def expect(condition: bool, expected: str, got: object, remedy: str) -> None:
        if not condition:
            raise ValueError(f"mask {name!r}: expected {expected}, got {got}; {remedy}")

    expect(name.isidentifier(), "an identifier as its name", repr(name), "rename it")
    expect(isinstance(visible, Boolean), "a boolean expression", visible, "compare with <, <=, sympy.Eq")
    visible = sympy.to_nnf(visible, simplify=False)
    visible = visible.xreplace({c: without_fractions(c) for c in visible.atoms(Relational)})
    unknown = sorted(map(str, visible.free_symbols - {q, k, *(o.symbol for o in operands)}))
    declared = sorted(o.name for o in operands)
    expect(
        not unknown, f"an expression over q, k and {declared}", f"also {unknown}", "declare operands, use their .symbol"
    )
    names = [
        n for o in operands for n in ((o.name, f"{o.name}_min", f"{o.name}_max") if o.kind == "query" else (o.name,))
    ]
    expect(len(names) == len(set(names)), "distinct operand names", names, "rename one")
    tensors = [o for o in operands if o.kind in ("query", "key")]
    kinds = [f"{o.kind}{' (boolean)' * o.boolean}" for o in tensors]
    one_each = len(kinds) == len(set(kinds))
    expect(one_each, "one tensor operand of a kind", f"{[o.name for o in tensors]} of kinds {kinds}", "make them one")
    relation = sympy.Dummy()
    bare = visible.xreplace(dict.fromkeys(visible.atoms(Relational), relation)).free_symbols - {relation}
    numbers = sorted(map(str, bare - {o.symbol for o in operands if o.boolean}))
    expect(not numbers, "comparisons", f"{numbers} as conditions", "compare them with a number")
    for o in operands:
        conjuncts = [c for c in sympy.And.make_args(visible) if o.boolean and o.symbol in c.free_symbols]
        hides = all(c == ~o.symbol for c in conjuncts)
        expect(hides, f"the boolean operand only as a conjunct ~{o.name}", conjuncts, "use an integer operand")
    try:
        python_text(visible)
    except ValueError as error:
        raise ValueError(f"mask {name!r}: {error}") from None
    return visible
