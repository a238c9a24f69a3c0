"""Pictures of a mask: which keys a query sees, and what a kernel makes of each tile.

Tiles are classified from the tile bounds, as kernels do it: an *empty* tile is skipped, a *full* one is computed
without the mask's predicate, a *partial* one with it. Per-key operands (padding) are applied in all that are not empty.
"""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple
from xml.sax.saxutils import escape

import sympy
import torch
from sympy.core.relational import Relational
from sympy.printing.str import StrPrinter
from torch import Tensor

from custom_ops.masks import Mask, Operand, OperandValue

TileClass = Literal["empty", "full", "partial"]

CELLS_UP_TO = 64
"""Longest side that is drawn cell by cell; longer ones show tiles only."""
PLOT = 576
"""The longer side of a plot, in pixels."""
NO_BREAK = "\u00a0"
_OUTLINED = 7.0
"""Least side of a tile, in pixels, that is outlined."""

# Blue and orange differ in lightness too, and stay apart in every common colour blindness. Tiles without cells in them
# are stronger. Every rule is under the picture's own class, so that a page which includes it keeps its style.
_STYLE = """
.mask-drawing text { font: 12px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
.mask-drawing .title { font-size: 17px; font-weight: 600 }
.mask-drawing .formula { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; fill: #57606a }
.mask-drawing .axis { font-size: 13px; font-weight: 600 }
.mask-drawing .tick, .mask-drawing .note { font-size: 11px; fill: #57606a }
.mask-drawing .card { fill: #ffffff; stroke: #d0d7de }
.mask-drawing .empty { fill: #f6f8fa; stroke: #d0d7de }
.mask-drawing .full { fill: #b9d8ef; stroke: #0072b2 }
.mask-drawing .partial { fill: #fdeccb; stroke: #c47f00 }
.mask-drawing .solid .full { fill: #6aaede }
.mask-drawing .solid .partial { fill: #f5b84f }
.mask-drawing .merged { stroke: none; shape-rendering: crispEdges }
.mask-drawing .seen { fill: #0072b2 }
.mask-drawing .seen-partial { fill: #d98c00 }
.mask-drawing .hidden { fill: none; stroke: #8c959f; stroke-opacity: .7; stroke-width: 2; stroke-linecap: round }"""


class _Scene(NamedTuple):
    """One request of a call of the mask."""

    mask: Mask
    query_len: int
    key_len: int
    operands: dict[str, OperandValue]
    """Tensors cut to the request, with a batch of 1."""
    q_start: int

    def visible(self) -> list[list[bool]]:
        positions = torch.arange(self.q_start, self.q_start + self.query_len)
        return self.mask.dense(positions, torch.arange(self.key_len), self.operands)[0].tolist()

    def row(self, first: int, last: int, block_n: int) -> list[TileClass]:
        """The classes of the tiles of queries ``first..last``, as the kernels' ``key_tiles`` has them."""
        ints = {n: v for n, v in self.operands.items() if isinstance(v, int)}
        per_query = self.query_values()
        values = None if per_query is None else per_query[0, first : last + 1]
        query_range = None if values is None else (int(values.min()), int(values.max()))
        request_values = {o.name: self.number(o) for o in self.mask.request_operands}
        lo_any, lo_all, hi_all, hi_any = self.mask.evaluate_bounds(
            first + self.q_start, last + self.q_start, self.key_len, ints, query_range, request_values
        )
        start, end = lo_any // block_n, max(_cdiv(hi_any, block_n), lo_any // block_n)
        full_start = min(max(_cdiv(lo_all, block_n), start), end)
        full_end = min(max(hi_all // block_n, full_start), end)
        return [
            "empty" if not start <= tile < end else "full" if full_start <= tile < full_end else "partial"
            for tile in range(_cdiv(self.key_len, block_n))
        ]

    def number(self, operand: Operand) -> int:
        """The value of an int operand or of a per-request one."""
        value = self.operands[operand.name]
        assert value is not None, operand.name  # Mask.for_call has seen to that
        return int(value)

    def query_values(self) -> Tensor | None:
        operand = self.mask.operand("query")
        value = None if operand is None else self.operands[operand.name]
        return value if isinstance(value, Tensor) else None


def _scene(
    mask: Mask,
    query_len: int,
    key_len: int,
    operands: Mapping[str, OperandValue] | None,
    q_start: int | Tensor | None,
    request: int,
) -> _Scene:
    for name, length in (("query_len", query_len), ("key_len", key_len)):
        if length < 1:
            raise ValueError(f"mask {mask.name!r}: {name}: expected at least 1, got {length}; nothing can be drawn")
    given = dict(operands or {})
    present = mask.for_call(given)
    cut = {n: v[request][None] if isinstance(v, Tensor) else v for n, v in given.items()}
    start = int(q_start[request]) if isinstance(q_start, Tensor) else q_start or 0
    return _Scene(present, query_len, key_len, cut, start)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def tile_classes(
    mask: Mask,
    query_len: int,
    key_len: int,
    operands: Mapping[str, OperandValue] | None = None,
    tile: tuple[int, int] = (128, 64),
    q_start: int | Tensor | None = None,
    request: int = 0,
) -> list[list[TileClass]]:
    """What a kernel with tiles of ``tile = (queries, keys)`` does with each: a list of rows of tiles.

    The other arguments are as in ``draw_text``. A kernel that packs ``G`` heads has ``BLOCK_M / G`` queries a tile.
    """
    return _classes(_scene(mask, query_len, key_len, operands, q_start, request), tile)


def _classes(scene: _Scene, tile: tuple[int, int]) -> list[list[TileClass]]:
    if min(tile) < 1:
        raise ValueError(f"tile: expected (queries, keys) of at least 1, got {tile}; pass for example (128, 64)")
    rows = range(0, scene.query_len, tile[0])
    return [scene.row(first, min(first + tile[0], scene.query_len) - 1, tile[1]) for first in rows]


# ---------------------------------------------------------------------- text


def draw_text(
    mask: Mask,
    query_len: int,
    key_len: int,
    operands: Mapping[str, OperandValue] | None = None,
    tile: tuple[int, int] | None = None,
    q_start: int | Tensor | None = None,
    request: int = 0,
) -> str:
    """The mask as text: a row a query, a character a key, ``█`` visible and ``·`` hidden.

    ``operands`` are those of the mask's op, by name, tensors with their batch, of which ``request`` is drawn; a
    per-request one may also be an int. Query ``i`` is at position ``q_start + i``, for an int or a tensor ``[B]``. With
    ``tile = (queries, keys)``, lines part the tiles, ``▓`` is visible in a partial tile, an empty tile is blank, and a
    legend counts them. Raises ValueError where there is nothing to draw, and where an operand is missing.
    """
    scene = _scene(mask, query_len, key_len, operands, q_start, request)
    visible = scene.visible()
    if tile is None:
        return "\n".join("".join("█" if sees else "·" for sees in row) for row in visible)
    classes = _classes(scene, tile)
    spans = [range(start, min(start + tile[1], key_len)) for start in range(0, key_len, tile[1])]

    def line(left: str, cross: str, right: str) -> str:
        return left + cross.join("─" * len(span) for span in spans) + right

    def row(sees: list[bool], kinds: list[TileClass]) -> str:
        marks = {"empty": "  ", "full": "·█", "partial": "·▓"}
        tiles = ("".join(marks[kind][sees[key]] for key in span) for span, kind in zip(spans, kinds, strict=True))
        return f"│{'│'.join(tiles)}│"

    lines = [line("┌", "┬", "┐")]
    for i, sees in enumerate(visible):
        if i and i % tile[0] == 0:
            lines.append(line("├", "┼", "┤"))
        lines.append(row(sees, classes[i // tile[0]]))
    lines.append(line("└", "┴", "┘"))
    counts = Counter(kind for kinds in classes for kind in kinds)
    signs: dict[TileClass, str] = {"full": "█", "partial": "▓", "empty": "blank"}
    lines += [f"{counts[kind]:>5} {kind}: {sign}, {_meaning(scene.mask, kind)}" for kind, sign in signs.items()]
    return "\n".join(lines)


def _meaning(mask: Mask, kind: TileClass) -> str:
    full = "no predicate" if mask.per_key == sympy.true else "per-key predicate only"
    return {"full": full, "partial": "predicate applied", "empty": "skipped"}[kind]


# ---------------------------------------------------------------------- SVG


def draw_svg(
    mask: Mask,
    query_len: int,
    key_len: int,
    operands: Mapping[str, OperandValue] | None = None,
    tile: tuple[int, int] | None = None,
    q_start: int | Tensor | None = None,
    request: int = 0,
) -> str:
    """The mask as a self-contained SVG picture: queries down, keys to the right, tiles in the colours of their class.

    Arguments as in ``draw_text``. Sides of more than ``CELLS_UP_TO`` show tiles only; where ``tile`` is None, the least
    power of two that gives at most 64 tiles a side is taken for them.
    """
    scene = _scene(mask, query_len, key_len, operands, q_start, request)
    cells = max(query_len, key_len) <= CELLS_UP_TO
    if tile is None and not cells:
        tile = (_power_of_two(query_len / 64), _power_of_two(key_len / 64))
    classes = None if tile is None else _classes(scene, tile)
    unit = min(20.0, PLOT / max(query_len, key_len)) if cells else PLOT / max(query_len, key_len)
    # A side much shorter than the other is stretched, or nobody could see its tiles.
    unit_x, unit_y = (unit if cells else max(unit, PLOT / 4 / length) for length in (key_len, query_len))
    width, height = key_len * unit_x, query_len * unit_y
    legend = list(_legend(scene, classes, tile, cells))
    title = _title(scene)
    canvas_width = math.ceil(max(72 + width + 32 + 228, 48 + 10 * len(title)))
    formula = textwrap.wrap(_formula(scene.mask), int((canvas_width - 48) / 7.4))
    style = "cells" if cells else "solid"
    left, top = 72, 46 + 17 * len(formula) + 46
    canvas_height = math.ceil(top + max(height, 24.0 * len(legend)) + 24)
    body = [
        f'<rect class="card" x=".5" y=".5" width="{canvas_width - 1}" height="{canvas_height - 1}" rx="8"/>',
        _text(24, 34, title, "title"),
        *(_text(24, 56 + 17 * i, line, "formula") for i, line in enumerate(formula)),
        f'<g class="{style}" transform="translate({left} {top})">',
        *_axes(scene, tile, unit_x, unit_y, cells),
        *(_tiles(scene, tile, classes, unit_x, unit_y) if tile and classes else ()),
        *(_cells(scene, tile, classes, unit) if cells else ()),
        "</g>",
        f'<g class="{style}" transform="translate({left + width + 32:.6g} {top})">',
        *legend,
        "</g>",
    ]
    head = (
        f'<svg class="mask-drawing" xmlns="http://www.w3.org/2000/svg" width="{canvas_width}" height="{canvas_height}" '
        f'viewBox="0 0 {canvas_width} {canvas_height}" role="img">'
    )
    described = f"<title>{escape(title)}</title>\n<desc>Query q sees key k where {escape(_formula(scene.mask))}.</desc>"
    return "\n".join([head, described, f"<style>{_STYLE}\n</style>", *body, "</svg>\n"])


def _power_of_two(least: float) -> int:
    return 1 << math.ceil(math.log2(max(least, 1)))


def _text(x: float, y: float, text: str, kind: str = "", more: str = "") -> str:
    return f'<text class="{kind}" x="{x:.6g}" y="{y:.6g}"{more}>{escape(text)}</text>'


def _title(scene: _Scene) -> str:
    ints = [f"{o.name} {scene.number(o)}" for o in (*scene.mask.int_operands, *scene.mask.request_operands)]
    start = [f"q_start {scene.q_start}"] if scene.q_start else []
    return ", ".join([scene.mask.name, *ints, *start])


def _formula(mask: Mask) -> str:
    """The mask's condition, for people: what hides keys comes last, and lines break between relations."""

    def side(e: sympy.Expr) -> str:
        text = str(e)
        return StrPrinter({"order": "rev-lex"}).doprint(e) if text.startswith("-") else text

    def phrase(e: sympy.Basic) -> str:
        if isinstance(e, Relational):
            sign = {"<=": "≤", ">=": "≥", "==": "=", "!=": "≠"}.get(e.rel_op, e.rel_op)
            return f"{side(e.lhs)} {sign} {side(e.rhs)}".replace(" ", NO_BREAK)
        if isinstance(e, sympy.Not):
            return f"not{NO_BREAK}{phrase(e.args[0])}"
        if isinstance(e, (sympy.And, sympy.Or)):
            parts = sorted(e.args, key=lambda a: (isinstance(a, sympy.Not), sympy.default_sort_key(a)))
            phrases = (f"({phrase(a)})" if isinstance(a, (sympy.And, sympy.Or)) else phrase(a) for a in parts)
            return (" and " if isinstance(e, sympy.And) else " or ").join(phrases)
        return {sympy.true: "every key", sympy.false: "no key"}.get(e, str(e))

    return phrase(mask.visible)


def _ticks(length: int, step: int, least_pixels: float, unit: float) -> range:
    """Multiples of ``step`` (a tile), doubled until labels have room."""
    while step * unit < least_pixels and step < length:
        step *= 2
    return range(0, length, step)


def _axes(scene: _Scene, tile: tuple[int, int] | None, unit_x: float, unit_y: float, cells: bool) -> Iterator[str]:
    width, height = scene.key_len * unit_x, scene.query_len * unit_y
    step_y, step_x = tile or (1, 1)
    # In a drawing of cells a label names a cell, in one of tiles the line where one starts.
    shift_x, shift_y = (unit_x / 2, unit_y / 2) if cells else (0.0, 0.0)
    for key in _ticks(scene.key_len, step_x, 12 + 7 * len(str(scene.key_len)), unit_x):
        yield _text(key * unit_x + shift_x, -8, str(key), "tick", ' text-anchor="middle"')
    for query in _ticks(scene.query_len, step_y, 22, unit_y):
        position = str(query + scene.q_start)
        yield _text(-8, query * unit_y + shift_y + 4, position, "tick", ' text-anchor="end"')
    yield _text(width / 2, -28, "key", "axis", ' text-anchor="middle"')
    yield _text(0, 0, "query", "axis", f' text-anchor="middle" transform="translate(-50 {height / 2:.6g}) rotate(-90)"')


def _tiles(
    scene: _Scene, tile: tuple[int, int], classes: list[list[TileClass]], unit_x: float, unit_y: float
) -> Iterator[str]:
    """A rectangle a tile, or a strip a run of tiles where tiles are too small to be told apart."""
    outlined = min(tile[0] * unit_y, tile[1] * unit_x) >= _OUTLINED
    gap = 1.0 if outlined else 0.0
    rectangles: dict[TileClass, list[str]] = {"empty": [], "full": [], "partial": []}
    for i, kinds in enumerate(classes):
        top, bottom = i * tile[0], min((i + 1) * tile[0], scene.query_len)
        for start, stop in _runs(kinds, merge=not outlined):
            first, last = start * tile[1], min(stop * tile[1], scene.key_len)
            rectangles[kinds[start]].append(
                f'<rect x="{first * unit_x + gap:.6g}" y="{top * unit_y + gap:.6g}" '
                f'width="{(last - first) * unit_x - 2 * gap:.6g}" height="{(bottom - top) * unit_y - 2 * gap:.6g}"/>'
            )
    for kind, drawn in rectangles.items():
        yield f'<g class="{kind}{"" if outlined else " merged"}">{"".join(drawn)}</g>'


def _runs(kinds: list[TileClass], merge: bool) -> Iterator[tuple[int, int]]:
    start = 0
    for i in range(1, len(kinds) + 1):
        if i == len(kinds) or not merge or kinds[i] != kinds[start]:
            yield start, i
            start = i


def _cells(
    scene: _Scene, tile: tuple[int, int] | None, classes: list[list[TileClass]] | None, unit: float
) -> Iterator[str]:
    """A square a visible cell, a dot a cell that was looked at and is hidden, nothing in tiles that are skipped."""
    squares: dict[str, list[str]] = {"seen": [], "seen-partial": []}
    dots: list[str] = []
    inset = max(1.0, unit * 0.18)
    side = unit - 2 * inset
    for i, row in enumerate(scene.visible()):
        for j, sees in enumerate(row):
            kind = classes[i // tile[0]][j // tile[1]] if tile and classes else None
            if sees:
                x, y = j * unit + inset, i * unit + inset
                square = f"M{x:.6g} {y:.6g}h{side:.6g}v{side:.6g}h{-side:.6g}z"
                squares["seen-partial" if kind == "partial" else "seen"].append(square)
            elif kind != "empty":
                dots.append(f"M{(j + 0.5) * unit:.6g} {(i + 0.5) * unit:.6g}h0")
    for name, paths in squares.items():
        if paths:
            yield f'<path class="{name}" d="{"".join(paths)}"/>'
    if dots:
        yield f'<path class="hidden" d="{"".join(dots)}"/>'


def _legend(
    scene: _Scene, classes: list[list[TileClass]] | None, tile: tuple[int, int] | None, cells: bool
) -> Iterator[str]:
    lines: list[tuple[str, str]] = []
    if classes is not None and tile is not None:
        counts = Counter(kind for kinds in classes for kind in kinds)
        for kind in ("full", "partial", "empty"):
            lines.append((kind, f"{counts[kind]} {kind}: {_meaning(scene.mask, kind)}"))
        lines.append(("", f"tile: {_count(tile[0], 'query', 'queries')} × {_count(tile[1], 'key', 'keys')}"))
    if cells:
        seen = sum(map(sum, scene.visible()))
        if classes is None:
            lines.append(("seen", "visible"))
        lines.append(("", f"{seen} of {scene.query_len * scene.key_len} pairs visible"))
    return _legend_lines(lines)


def _legend_lines(lines: Iterable[tuple[str, str]]) -> Iterator[str]:
    for i, (swatch, text) in enumerate(lines):
        y = 24 * i
        if swatch:
            yield f'<rect class="{swatch}" x=".5" y="{y + 0.5}" width="15" height="15"/>'
        yield _text(26 if swatch else 0, y + 12.5, text, "" if swatch else "note")


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
