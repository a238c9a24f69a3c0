"""The masks of paged attention: dense, printed and by tiles, against a statement in plain Python on random requests."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import expecttest
import numpy as np
import pytest
import sympy
import torch
from sympy import Eq, Max, Min, Mod, floor

from custom_ops.mask_bounds import rises
from custom_ops.mask_drawing import tile_classes
from custom_ops.mask_printing import range_source, triton_source
from custom_ops.masks import Mask, int_operand, k, q, query_operand, request_operand
from custom_ops.paged import masks
from custom_ops.paged.masks import (
    BLOCK,
    CONTEXT,
    VALID,
    PagedMode,
    end_of_block,
    paged_mask,
    register_mode,
    request_operand_names,
)
from tests.paged_mask_cases import MODES, Request, Settings, printed, random_requests, settings, tensors

ROWS, KEYS = 15, 36
"""More queries and keys than any random request has."""

each_mode = pytest.mark.parametrize("mode", MODES)


@pytest.fixture
def modes() -> Iterator[dict[str, PagedMode]]:
    """The registry, as it was afterwards."""
    before = dict(masks.MODES)
    yield masks.MODES
    masks.MODES.clear()
    masks.MODES.update(before)


# ---------------------------------------------------------------------- what is seen


@each_mode
def test_dense_agrees_with_the_definition(mode: str) -> None:
    """2700 and more requests a mode, a batch at a time; every pair of them."""
    for seed, s in enumerate(settings(mode)):
        requests = list(random_requests(2700 // len(settings(mode)), seed))
        operands = tensors(requests, s.mask)
        positions = operands["context"][:, None] + torch.arange(ROWS)
        dense = s.mask.dense(positions, torch.arange(KEYS), operands).numpy()
        expected = np.stack([r.brute_force(s, ROWS, KEYS) for r in requests])
        np.testing.assert_array_equal(dense, expected, err_msg=s.id)


@each_mode
@pytest.mark.parametrize("namespace", ["tl", "gl"])
def test_printed_functions_agree_with_the_definition(mode: str, namespace: str) -> None:
    """A row's range holds all that the row sees, and nothing else unless there is a hole."""
    for seed, s in enumerate(settings(mode)):
        functions = printed(s.mask, namespace)
        for r in random_requests(40, seed):
            a, b = r.context + np.arange(ROWS), np.arange(KEYS)
            lower, upper = functions.range(a, r.slots(s.mask))
            assert lower.shape == upper.shape == a.shape
            assert (np.diff(lower) >= 0).all() and (np.diff(upper) >= 0).all()
            inside = (lower[:, None] <= b) & (b < upper[:, None])
            seen = r.brute_force(s, ROWS, KEYS)
            visible = np.broadcast_to(functions.visible(a[:, None], b[None], r.slots(s.mask)), seen.shape)
            np.testing.assert_array_equal(visible, seen)
            assert not (seen & ~inside).any()
            if not s.hole:
                np.testing.assert_array_equal(inside, seen)


@each_mode
def test_the_range_of_a_tile_is_read_off_its_first_and_last_query(mode: str) -> None:
    """It holds what any of its queries sees, and without a hole it begins and ends with a key that one sees."""
    rng, empty = np.random.default_rng(3), 0
    for seed, s in enumerate(settings(mode)):
        functions = printed(s.mask)
        for r in random_requests(60, 100 + seed):
            if r.valid == 0:
                continue
            first = int(rng.integers(0, r.valid))
            last = int(rng.integers(first, r.valid))
            lower = max(functions.range(r.context + first, r.slots(s.mask))[0], 0)
            upper = functions.range(r.context + last, r.slots(s.mask))[1]
            assert upper <= r.context + r.valid
            keys = np.flatnonzero(r.brute_force(s, last + 1, KEYS)[first:].any(0))
            assert all(lower <= key < upper for key in keys)
            if not s.hole:
                assert (lower, upper) == (keys[0], keys[-1] + 1) if len(keys) else lower >= upper
                empty += not len(keys)
    assert empty > 0 or mode != "cache_only"


@each_mode
def test_only_the_hole_needs_the_predicate(mode: str) -> None:
    for s in settings(mode):
        assert (s.mask.interval() is None) == s.hole
        assert s.mask.interval() in (None, s.mask.key_range())


@each_mode
def test_tiles_are_what_they_are_called(mode: str) -> None:
    """What kernels of dense forms, and drawings, take for empty and full."""
    tile = (4, 5)
    for seed, s in enumerate(settings(mode, (1, 4), (None, 5))):
        for r in random_requests(12, 200 + seed):
            n, keys = max(r.n, 1), max(r.context + r.n, 1)
            classes = tile_classes(s.mask, n, keys, r.values(s.mask), tile, r.context)
            seen = r.brute_force(s, n, keys)
            for row, kinds in enumerate(classes):
                for column, kind in enumerate(kinds):
                    part = seen[row * tile[0] : (row + 1) * tile[0], column * tile[1] : (column + 1) * tile[1]]
                    assert kind != "empty" or not part.any()
                    assert kind != "full" or (part.all() and not s.hole)


@each_mode
def test_as_flex_mask_mod(mode: str) -> None:
    s = Settings(mode, block=4, window=5, hole=True)
    requests = list(random_requests(5, 7))
    operands = tensors(requests, s.mask)
    mask_mod = s.mask.flex_mask_mod(operands, operands["context"])
    b, i, j = torch.meshgrid(torch.arange(len(requests)), torch.arange(ROWS), torch.arange(KEYS), indexing="ij")
    expected = np.stack([r.brute_force(s, ROWS, KEYS) for r in requests])
    np.testing.assert_array_equal(mask_mod(b, torch.zeros_like(b), i, j).numpy(), expected)


def test_far_positions_fit_int32() -> None:
    """Of a prompt of a million tokens, in every mode; numpy would warn of an overflow, which is an error here."""
    positions = np.array([2**20, 2**20 + 5, 2**29], dtype=np.int32)
    with np.errstate(over="raise"):
        for mode in MODES:
            for status in (0, 1):
                r = Request(2**20, 2**29, 2**29, status, 4, 2**20)
                slots = tuple(np.array(value, dtype=np.int32) for value in r.slots(paged_mask(mode, block_size=4)))
                functions = printed(paged_mask(mode, block_size=4))
                _, upper = functions.range(positions, slots)
                assert upper.dtype == np.int32
                for a, end in zip(positions.tolist(), upper.tolist(), strict=True):
                    assert r.sees(Settings(mode, 4), a, end - 1)
                    assert not r.sees(Settings(mode, 4), a, end)


# ---------------------------------------------------------------------- drawing and text


class TestText(expecttest.TestCase):
    """Expected text; EXPECTTEST_ACCEPT=1 rewrites it."""

    def test_a_request_of_a_batch(self) -> None:
        requests = [Request(2, 4, 4), Request(8, 6, 5, prefix=2, padded_prefix=4)]
        mask = paged_mask("block_causal", block_size=4, prefix_hole=True)
        operands = tensors(requests, mask)
        text = mask.draw_text(6, 14, operands, q_start=operands["context"], request=1)
        self.assertEqual(text, mask.draw_text(6, 14, requests[1].values(mask), q_start=8))
        self.assertExpectedInline(
            text,
            """\
██··████████··
██··████████··
██··████████··
██··████████··
██··█████████·
██··█████████·""",
        )

    def test_tiles(self) -> None:
        mask = paged_mask("causal", window=10)
        self.assertExpectedInline(
            mask.draw_text(8, 14, {"context": torch.tensor([6]), "valid": torch.tensor([8])}, (4, 4), 6),
            """\
┌────┬────┬────┬──┐
│████│▓▓▓·│····│  │
│████│▓▓▓▓│····│  │
│████│▓▓▓▓│▓···│  │
│████│▓▓▓▓│▓▓··│  │
├────┼────┼────┼──┤
│·▓▓▓│████│▓▓▓·│··│
│··▓▓│████│▓▓▓▓│··│
│···▓│████│▓▓▓▓│▓·│
│····│████│▓▓▓▓│▓▓│
└────┴────┴────┴──┘
    2 full: █, no predicate
    5 partial: ▓, predicate applied
    1 empty: blank, skipped""",
        )

    def test_printed_source(self) -> None:
        self.assertExpectedInline(
            range_source(paged_mask("causal", prefix_hole=True), "gl"),
            """\
def paged_causal_hole_range(q, requests):
    lower = q * 0 + (0)
    upper = gl.minimum(requests[0] + requests[1], q + 1)
    return lower, upper


def paged_causal_hole_visible(q, k, requests):
    return (k <= q) & ((k >= requests[0]) | (k >= requests[3]) | (k < requests[2])) & (k < requests[0] + requests[1])
""",
        )


def test_titles_of_drawings_name_the_request() -> None:
    svg = paged_mask("causal").draw_svg(3, 5, {"context": torch.tensor([2]), "valid": torch.tensor([3])}, q_start=2)
    assert "<title>paged_causal, context 2, valid 3, q_start 2</title>" in svg


@pytest.mark.parametrize("name", [m.name for m in pkgutil.iter_modules(masks.__path__)])
def test_the_picture_of_a_mode_is_true(name: str) -> None:
    outcome = doctest.testmod(importlib.import_module(f"{masks.__name__}.{name}"))
    assert outcome.failed == 0
    assert outcome.attempted >= 2 or name == "common"


def test_the_example_of_an_own_mode_is_true(modes: dict[str, PagedMode]) -> None:
    outcome = doctest.testmod(masks)
    assert outcome.failed == 0 and outcome.attempted >= 5
    assert "own_block" in modes


# ---------------------------------------------------------------------- the registry


def test_modes_and_what_they_read() -> None:
    assert tuple(masks.MODES) == MODES
    assert {m: request_operand_names(m) for m in MODES} == {
        "plain": (),
        "causal": (),
        "block_causal": (),
        "prefix_full": ("status", "prefix", "padded_prefix"),
        "prefix_causal": ("status",),
        "cache_only": (),
    }
    assert request_operand_names("causal", True) == ("prefix", "padded_prefix")
    assert request_operand_names("prefix_full", prefix_hole=True) == ("status", "prefix", "padded_prefix")
    assert request_operand_names("prefix_causal", prefix_hole=True) == ("status", "prefix", "padded_prefix")
    for mode in MODES:
        names = [o.name for o in paged_mask(mode, prefix_hole=True).operands]
        assert names == ["context", "valid", *request_operand_names(mode, True)]
        assert masks.MODES[mode].doc


def test_a_mask_is_made_once_and_its_name_tells_which() -> None:
    assert paged_mask("causal") is paged_mask("causal", block_size=32, window=0)
    assert paged_mask("block_causal", block_size=1).visible != paged_mask("block_causal", block_size=2).visible
    every = [s.mask for mode in MODES for s in settings(mode)]
    assert len({m.name for m in every}) == len(every)
    assert paged_mask("block_causal", block_size=4, window=9, prefix_hole=True).name == (
        "paged_block_causal_block4_window9_hole"
    )


def test_an_own_mode(modes: dict[str, PagedMode]) -> None:
    """Two blocks back and an operand of one's own: an interval with both ends, and block, window and hole as ever."""
    shown = request_operand("shown")
    visible = (k < end_of_block()) & (k >= end_of_block() - 3 * BLOCK.symbol) & (k < CONTEXT.symbol + shown.symbol)
    mode = register_mode(PagedMode("near_blocks", visible, (shown,), "the last three blocks"))
    assert modes["near_blocks"] is mode
    assert request_operand_names("near_blocks", prefix_hole=True) == ("shown", "prefix", "padded_prefix")
    mask = paged_mask("near_blocks", block_size=4)
    assert mask.interval() is not None
    functions = printed(mask)
    for context in (0, 7, 20):
        a, b = context + np.arange(9)[:, None], np.arange(32)[None]
        expected = (b // 4 <= a // 4) & (b // 4 >= a // 4 - 2) & (b < context + 6)
        lower, upper = functions.range(a, (context, 8, 6))
        np.testing.assert_array_equal((lower <= b) & (b < upper), expected)
        np.testing.assert_array_equal(functions.visible(a, b, (context, 8, 6)), expected)


def five_operands() -> tuple[Any, ...]:
    return tuple(request_operand(f"x{i}") for i in range(5))


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: paged_mask("casual"),
        "lowered_attn::paged_attention: mode: expected one of plain, causal, block_causal, prefix_full, prefix_causal, "
        "cache_only, got 'casual'; use one of them, or register_mode your own",
    ),
    (lambda: request_operand_names("casual"), "mode: expected one of plain, causal, block_causal"),
    (lambda: paged_mask("causal", block_size=0), "block_size: expected at least 1, got 0; it counts the tokens of a"),
    (lambda: paged_mask("causal", window=-1), "window: expected at least 1, or 0 for none, got -1; it counts the keys"),
    (
        lambda: paged_mask("prefix_full").dense(torch.arange(3), torch.arange(3), {"context": 0, "valid": 3}),
        "mask 'paged_prefix_full_block1': status: expected a value, got None; pass status",
    ),
    (
        lambda: tile_classes(paged_mask("causal"), 3, 3, {"context": 0}),
        "mask 'paged_causal': valid: expected a value, got None; pass valid",
    ),
    (
        lambda: register_mode(PagedMode("causal", k < q)),
        "mode: expected a new name, got 'causal', which is taken; rename the mode",
    ),
    (
        lambda: register_mode(PagedMode("mirror", k + q < BLOCK.symbol)),
        "mask 'paged_mirror_block2': expected an end that cannot fall as q grows, got the upper "
        "Min(2 - q, context + valid); write it with +, Max, Min and floor of q, and with no negative factor",
    ),
    (
        lambda: register_mode(PagedMode("opening", k >= 8 - q)),
        "mask 'paged_opening': expected an end that cannot fall as q grows, got the lower Max(0, 8 - q)",
    ),
    (
        lambda: register_mode(PagedMode("mine", k < request_operand("other").symbol)),
        "mask 'paged_mine': expected an expression over q, k and ['context', 'valid'], got also ['other']",
    ),
    (lambda: PagedMode("my mode", k <= q), "paged mode 'my mode': expected an identifier as its name, got 'my mode'"),
    (
        lambda: PagedMode("mine", k <= q, (int_operand("n"), query_operand("segment"))),
        "paged mode 'mine': expected per-request operands that are not optional, got ['n (int)', 'segment (query)']",
    ),
    (lambda: PagedMode("mine", k <= q, (CONTEXT,)), "expected operands besides context and valid, got ['context']"),
    (
        lambda: PagedMode("mine", k <= q, five_operands()),
        "paged mode 'mine': expected at most 4 operands, got ['x0', 'x1', 'x2', 'x3', 'x4']; fold some into one",
    ),
    (
        lambda: range_source(Mask("m", k <= q + BLOCK.symbol, (BLOCK,))),
        "mask 'm': expected per-request operands only, got ['block (int)']; make them numbers",
    ),
    (
        lambda: range_source(Mask("m", k >= CONTEXT.symbol, (CONTEXT,))),
        "mask 'm': expected an upper end of the keys, got none; add k < something",
    ),
    (
        lambda: triton_source(paged_mask("causal")),
        "mask 'paged_causal': expected one per-request operand, got ['context', 'valid']; print it by range_source",
    ),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=range(len(REFUSED)))
def test_refusals_say_what_to_do(make: Callable[[], Any], message: str) -> None:
    before = dict(masks.MODES)
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)
    assert before == masks.MODES


def test_the_hole_needs_room_for_its_operands(modes: dict[str, PagedMode]) -> None:
    register_mode(PagedMode("four", k < sum(o.symbol for o in five_operands()[:4]), five_operands()[:4]))
    assert len(paged_mask("four").operands) == 6
    with pytest.raises(ValueError, match="prefix_hole: expected at most 4 values a request, got .'x0', .*; fold two"):
        paged_mask("four", prefix_hole=True)


@pytest.mark.parametrize(
    ("e", "does"),
    [
        (q, True),
        (VALID.symbol, True),
        (Max(q + 1, 3 * floor(q / 3) + CONTEXT.symbol), True),
        (Min(CONTEXT.symbol * q, 7), True),
        (2 - q, False),
        (q - 3 * floor(q / 3), False),
        (Mod(q, 3), False),
        (q**2, False),
        (sympy.Symbol("any", integer=True) * q, False),
        (Max(q - 7, -2 * floor(q / 3)), False),
    ],
    ids=str,
)
def test_what_rises_by_its_structure(e: sympy.Expr, does: bool) -> None:
    assert rises(e) == does


def test_a_mode_that_is_no_interval_prints_its_predicate(modes: dict[str, PagedMode]) -> None:
    register_mode(PagedMode("own_token", (k < CONTEXT.symbol) | Eq(k, q)))
    mask = paged_mask("own_token")
    assert mask.interval() is None
    a, b = 5 + np.arange(4)[:, None], np.arange(9)[None]
    np.testing.assert_array_equal(printed(mask).visible(a, b, (5, 3)), ((b < 5) | (a == b)) & (b < 8))
