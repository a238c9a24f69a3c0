"""The masks' device functions, in Triton's interpreter, against the dense mask, the bounds and the drawing's tiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from custom_ops.forms import FORMS
from custom_ops.kernels.mask_functions import decorated_source, mask_functions, reads_keys
from custom_ops.kernels.tile import key_tiles, load_key_operands, row_operands
from custom_ops.mask_drawing import tile_classes
from custom_ops.masks import Mask
from tests.mask_cases import BY_NAME, Call, random_calls

TILE = (16, 8)


@triton.jit
def describe_tile(
    VISIBLE_OUT, KEY_VISIBLE_OUT, BOUNDS_OUT, TILES_OUT, Q_START, QUERY_VALUES, REQUEST_VALUES, KEY_VALUES, KEY_PADDING,
    query_len, key_len, ints,
    VISIBLE: tl.constexpr, KEY_VISIBLE: tl.constexpr, BOUNDS: tl.constexpr,
    HAS_QUERY_VALUES: tl.constexpr, HAS_REQUEST_VALUES: tl.constexpr, HAS_KEY_VALUES: tl.constexpr,
    HAS_KEY_PADDING: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What the tile loop asks a mask, written down: a program a tile of queries, as in the forward kernel for G = 1."""
    first = tl.program_id(0) * BLOCK_M
    query = first + tl.arange(0, BLOCK_M)
    row_valid = query < query_len
    shift, request_value, query_value, query_min, query_max = row_operands(
        query, row_valid, tl.program_id(1), query_len, Q_START, QUERY_VALUES, REQUEST_VALUES, True, HAS_QUERY_VALUES,
        HAS_REQUEST_VALUES, HAS_KEY_VALUES,
    )  # fmt: skip
    last = tl.minimum(first + BLOCK_M - 1, query_len - 1)
    lo_any, lo_all, hi_all, hi_any = BOUNDS(
        first + shift, last + shift, key_len, ints, request_value, query_min, query_max
    )
    tl.store(BOUNDS_OUT + tl.program_id(0) * 4, lo_any)
    tl.store(BOUNDS_OUT + tl.program_id(0) * 4 + 1, lo_all)
    tl.store(BOUNDS_OUT + tl.program_id(0) * 4 + 2, hi_all)
    tl.store(BOUNDS_OUT + tl.program_id(0) * 4 + 3, hi_any)
    start, full_start, full_end, end = key_tiles(lo_any, lo_all, hi_all, hi_any, BLOCK_N)
    tl.store(TILES_OUT + tl.program_id(0) * 4, start)
    tl.store(TILES_OUT + tl.program_id(0) * 4 + 1, full_start)
    tl.store(TILES_OUT + tl.program_id(0) * 4 + 2, full_end)
    tl.store(TILES_OUT + tl.program_id(0) * 4 + 3, end)
    for tile in range(tl.cdiv(key_len, BLOCK_N)):
        key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = row_valid[:, None] & (key < key_len)[None, :]
        key_value, key_padding, _ = load_key_operands(
            key, key < key_len, KEY_VALUES, KEY_PADDING, HAS_KEY_VALUES, HAS_KEY_PADDING
        )
        visible = VISIBLE(
            (query + shift)[:, None], key[None, :], ints, request_value, query_value[:, None], key_value[None, :],
            key_padding[None, :],
        )  # fmt: skip
        key_visible = KEY_VISIBLE(
            (query + shift)[:, None], key[None, :], ints, request_value, query_value[:, None], key_value[None, :],
            key_padding[None, :],
        )  # fmt: skip
        at = query[:, None] * key_len + key[None, :]
        tl.store(VISIBLE_OUT + at, tl.where(visible, 1, 0), mask=inside)
        tl.store(KEY_VISIBLE_OUT + at, tl.where(key_visible, 1, 0), mask=inside)


def describe(mask: Mask, call: Call) -> tuple[torch.Tensor, torch.Tensor, list[list[int]], list[list[int]]]:
    """``banded`` and ``per_key``, ``[Lq, Lk]``; for each tile of queries four bounds, and four ends in tiles."""
    functions = mask_functions(mask)
    slots = {
        (kind, boolean): call.operands[o.name] if (o := mask.operand(kind, boolean)) else None  # type: ignore[arg-type]
        for kind, boolean in (("query", False), ("request", False), ("key", False), ("key", True))
    }
    query, request, key, padding = slots.values()
    nothing = torch.zeros(1, dtype=torch.int32)
    programs = triton.cdiv(call.query_len, TILE[0])
    banded, per_key = (torch.full((call.query_len, call.key_len), -1, dtype=torch.int32) for _ in range(2))
    bounds, tiles = (torch.full((programs, 4), -1, dtype=torch.int32) for _ in range(2))
    describe_tile[(programs, 1)](
        banded, per_key, bounds, tiles, torch.tensor([call.q_start], dtype=torch.int32),
        *(nothing if t is None else t for t in (query, request, key, padding)), call.query_len, call.key_len,
        tuple(call.operands[o.name] for o in mask.int_operands) or (0,),
        VISIBLE=functions.visible, KEY_VISIBLE=functions.key_visible, BOUNDS=functions.bounds,
        HAS_QUERY_VALUES=query is not None, HAS_REQUEST_VALUES=request is not None, HAS_KEY_VALUES=key is not None,
        HAS_KEY_PADDING=padding is not None, BLOCK_M=TILE[0], BLOCK_N=TILE[1],
    )  # fmt: skip
    return banded.bool(), per_key.bool(), bounds.tolist(), tiles.tolist()


def expected_bounds(mask: Mask, call: Call) -> list[list[int]]:
    per_query, per_request = mask.operand("query"), mask.operand("request")
    request = None if per_request is None else int(call.operands[per_request.name])
    rows = []
    for first in range(0, call.query_len, TILE[0]):
        last = min(first + TILE[0], call.query_len) - 1
        values = None if per_query is None else call.operands[per_query.name][0, first : last + 1]
        query_range = None if values is None else (int(values.min()), int(values.max()))
        positions = (first + call.q_start, last + call.q_start)
        rows.append(list(mask.evaluate_bounds(*positions, call.key_len, call.ints, query_range, request)))
    return rows


def kinds(tiles: list[int], count: int) -> list[str]:
    """A row of tiles by class, from the ends that the kernel's two loops run between."""
    start, full_start, full_end, end = tiles
    assert start <= full_start <= full_end <= end
    return [
        "empty" if not start <= tile < end else "full" if full_start <= tile < full_end else "partial"
        for tile in range(count)
    ]


FORM_MASKS = [form.mask for form in FORMS.values()]
MASKS = [
    *(pytest.param(mask, id=f"{mask.name}-padded") for mask in FORM_MASKS),
    *(pytest.param(mask.specialise([]), id=mask.name) for mask in FORM_MASKS),
    *(pytest.param(BY_NAME[name], id=name) for name in ("block_causal", "sink_and_window")),
]


@pytest.mark.parametrize("mask", MASKS)
def test_device_functions_agree_with_dense_bounds_and_drawing(mask: Mask) -> None:
    for call in [*random_calls(mask, 6, seed=9), *random_calls(mask, 1, seed=9, lengths=(5, 0))]:
        banded, per_key, bounds, tiles = describe(mask, call)
        dense = mask.dense(call.positions, torch.arange(call.key_len), call.operands)[0]
        np.testing.assert_array_equal(banded & per_key, dense)
        assert bounds == expected_bounds(mask, call)
        assert reads_keys(mask) or bool(per_key.all())
        if call.key_len:
            drawn = tile_classes(mask, call.query_len, call.key_len, call.operands, TILE, call.q_start)
            assert [kinds(row, len(drawn[0])) for row in tiles] == drawn


def test_device_functions_are_made_once_and_can_be_read() -> None:
    mask = BY_NAME["sliding_self"]
    functions = mask_functions(mask)
    assert functions is mask_functions(mask)
    assert functions is not mask_functions(mask.specialise([]))
    assert decorated_source(mask).count("@triton.jit\ndef sliding_self_") == 3
