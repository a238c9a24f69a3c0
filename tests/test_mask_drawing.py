"""Drawings of masks: literal text, SVG that parses, and tiles that are what they are called."""

from __future__ import annotations

import re
from collections import Counter
from xml.etree import ElementTree

import expecttest
import numpy as np
import pytest
import torch

from custom_ops.forms import FORMS
from custom_ops.mask_drawing import tile_classes
from custom_ops.masks import Mask, k, q
from tests.mask_cases import BY_NAME, Case, on_cases, random_calls

SLIDING = FORMS["sliding_self"].mask
SVG = "{http://www.w3.org/2000/svg}"


class TestText(expecttest.TestCase):
    """Expected text; EXPECTTEST_ACCEPT=1 rewrites it."""

    def test_cells(self) -> None:
        self.assertExpectedInline(
            SLIDING.draw_text(6, 6, {"window": 3}),
            """\
█·····
██····
███···
·███··
··███·
···███""",
        )

    def test_tiles(self) -> None:
        self.assertExpectedInline(
            SLIDING.draw_text(8, 10, {"window": 6}, tile=(4, 3), q_start=2),
            """\
┌───┬───┬───┬─┐
│███│···│   │ │
│███│▓··│   │ │
│███│▓▓·│   │ │
│███│▓▓▓│   │ │
├───┼───┼───┼─┤
│·▓▓│▓▓▓│▓··│·│
│··▓│▓▓▓│▓▓·│·│
│···│▓▓▓│▓▓▓│·│
│···│·▓▓│▓▓▓│▓│
└───┴───┴───┴─┘
    1 full: █, no predicate
    5 partial: ▓, predicate applied
    2 empty: blank, skipped""",
        )

    def test_padding_in_full_tiles(self) -> None:
        padding = torch.tensor([[False] * 4, [True, False, False, False]])
        self.assertExpectedInline(
            FORMS["full_self"].mask.draw_text(4, 4, {"key_padding": padding}, tile=(2, 2), request=1),
            """\
┌──┬──┐
│··│  │
│·▓│  │
├──┼──┤
│·█│▓·│
│·█│▓▓│
└──┴──┘
    1 full: █, per-key predicate only
    2 partial: ▓, predicate applied
    1 empty: blank, skipped""",
        )


@on_cases
def test_tiles_are_what_they_are_called(case: Case) -> None:
    """Empty is hidden from all, full is seen by all as far as the bounds speak; ends of the sequence are partial."""
    rng = np.random.default_rng(0)
    for call in random_calls(case.mask, 40, seed=6):
        if call.key_len == 0:
            continue
        tile = (int(rng.choice([1, 2, 4, 16])), int(rng.choice([1, 3, 4, 8, 32])))
        classes = tile_classes(case.mask, call.query_len, call.key_len, call.operands, tile, call.q_start)
        assert len(classes) == -(-call.query_len // tile[0])
        banded, visible = call.brute_force(case.banded or case.seen), call.brute_force(case.seen)
        for i, row in enumerate(classes):
            assert len(row) == -(-call.key_len // tile[1])
            for j, kind in enumerate(row):
                at = np.s_[i * tile[0] : (i + 1) * tile[0], j * tile[1] : (j + 1) * tile[1]]
                if kind == "empty":
                    assert not visible[at].any()
                if kind == "full":
                    assert banded[at].all()
                    assert (j + 1) * tile[1] <= call.key_len


def parsed(svg: str) -> tuple[ElementTree.Element, dict[str, list[ElementTree.Element]]]:
    """The picture, and its tiles by class."""
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    groups = {(g.get("class") or "").split()[0]: list(g) for g in root.iter(f"{SVG}g") if g.get("class")}
    return root, {kind: groups.get(kind, []) for kind in ("empty", "full", "partial")}


def texts(root: ElementTree.Element) -> list[str]:
    return [t.text or "" for t in root.iter(f"{SVG}text")]


def subpaths(root: ElementTree.Element, name: str) -> int:
    return sum((p.get("d") or "").count("M") for p in root.iter(f"{SVG}path") if p.get("class") == name)


@pytest.mark.parametrize("name", ["sliding_self", "prefix_lm", "sink_and_window", "segment_cross", "nothing"])
def test_svg_has_every_tile_in_its_class_and_every_visible_cell(name: str) -> None:
    mask = BY_NAME[name]
    call = next(c for c in random_calls(mask, 50, seed=8) if c.query_len > 20 and c.key_len > 20)
    lengths = (call.query_len, call.key_len)
    root, tiles = parsed(mask.draw_svg(*lengths, call.operands, (4, 8), call.q_start))
    counts = Counter(kind for row in tile_classes(mask, *lengths, call.operands, (4, 8), call.q_start) for kind in row)
    assert {kind: len(drawn) for kind, drawn in tiles.items()} == {kind: counts[kind] for kind in tiles}
    for kind in tiles:
        assert any(text.startswith(f"{counts[kind]} {kind}: ") for text in texts(root))
    keys = torch.arange(call.key_len)
    visible = int(mask.dense(call.positions, keys, call.operands).sum())
    assert subpaths(root, "seen") + subpaths(root, "seen-partial") == visible
    assert f"{visible} of {call.query_len * call.key_len} pairs visible" in texts(root)
    assert {"query", "key"} <= set(texts(root))


def test_svg_names_and_describes_itself() -> None:
    root, _ = parsed(SLIDING.draw_svg(8, 8, {"window": 3}, q_start=torch.tensor([5])))
    assert root.get("role") == "img"
    assert root.findtext(f"{SVG}title") == "sliding_self, window 3, q_start 5"
    description = (root.findtext(f"{SVG}desc") or "").replace("\u00a0", " ")
    assert description == "Query q sees key k where k ≤ q and q - k < window."
    ticks = [t.text for t in root.iter(f"{SVG}text") if t.get("class") == "tick"]
    assert ticks[-1] == str(5 + 6)  # every other position, from q_start on


def test_svg_draws_cells_alone_where_no_tile_is_asked_for() -> None:
    root, tiles = parsed(SLIDING.draw_svg(8, 8, {"window": 3}))
    assert not any(tiles.values())
    assert subpaths(root, "seen") == 21
    assert subpaths(root, "hidden") == 64 - 21


def test_svg_of_long_sequences_shows_tiles_only() -> None:
    svg = SLIDING.draw_svg(8192, 8192, {"window": 2048}, (128, 64))
    root, _ = parsed(svg)
    assert len(svg) < 50_000
    assert not list(root.iter(f"{SVG}path"))
    # Skipped below the window and above the diagonal; 64 * 128 tiles in all.
    assert [t for t in texts(root) if re.match(r"\d+ (full|partial|empty)", t)] == [
        "1680 full: no predicate",
        "224 partial: predicate applied",
        "6288 empty: skipped",
    ]
    assert "tile: 32 queries × 32 keys" in texts(parsed(SLIDING.draw_svg(2048, 2048, {"window": 100}))[0])


def test_svg_stays_inside_its_canvas() -> None:
    """Also where one side is much shorter than the other."""
    for lengths in ((1, 1), (3, 64), (64, 3), (8192, 16), (16, 8192)):
        root, tiles = parsed(SLIDING.draw_svg(*lengths, {"window": 7}, (4, 4)))
        width, height = float(root.get("width", 0)), float(root.get("height", 0))
        for rectangle in (r for drawn in tiles.values() for r in drawn):
            x, y, w, h = (float(rectangle.get(name, "nan")) for name in ("x", "y", "width", "height"))
            assert w > 0
            assert h > 0
            assert 72 + x + w < width
            assert 40 + y + h < height


def test_drawings_refuse_what_they_cannot_show() -> None:
    with pytest.raises(ValueError, match=r"mask 'causal': key_len: expected at least 1, got 0; nothing can be drawn"):
        Mask("causal", k <= q).draw_text(3, 0)
    with pytest.raises(ValueError, match=r"tile: expected \(queries, keys\) of at least 1, got \(0, 4\)"):
        Mask("causal", k <= q).draw_svg(3, 3, tile=(0, 4))
    with pytest.raises(ValueError, match="window: expected a value, got None; pass window"):
        SLIDING.draw_text(3, 3)
