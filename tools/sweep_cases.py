"""The points of the sweep: about 150 shapes of dense self-attention, small to large, of every mask and head dim.

    python -m tools.sweep --list

A point is a case (`tools.cases.Case`) whose tensors are drawn on its device: some hold a gigabyte.
"""

from __future__ import annotations

import fnmatch
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from custom_ops.kernels.gluon.dense_cost import Sizes
from custom_ops.masks import Mask, OperandValue
from tools.cases import Case
from tools.variants import Problem

ITEM_ROWS = 128
"""Rows of an item, the unit in which classes count work: about a row tile of any of the kernels."""
SHORT, MIDDLE, LONG = "S to 1k", "S to 4k", "S above 4k"
FEW, SOME, MANY = "under 1 item an SM", "to 4 items an SM", "more items"

# Mask, heads, head dims, and the points as "requests x length". The largest are about 2 TFLOP: some 3 ms of an H200.
_GRID = (
    # Causal: the heads of an 8B model, then other groups and head dims.
    (
        "causal", "32/8", "128",
        "1x128 8x128 32x128 1x512 4x512 32x512 1x1000 8x1000 1x1024 32x1024 1x2048 4x2048 16x2048 1x4001 2x4001 "
        "1x4096 4x4096 1x8192 2x8192 1x16384",
    ),
    ("causal", "8/2", "128", "1x32768"),
    ("causal", "16/16", "128", "1x512 32x256 8x1000 4x2048 1x4096 1x8192"),
    ("causal", "64/8", "128", "1x128 1x1024 4x1000 16x1024 2x4096 1x4001 1x8192"),
    ("causal", "32/32", "64", "1x128 1x512 32x512 8x1000 1x2048 16x2048 2x4001 4x4096 1x8192 1x16384"),
    ("causal", "8/8", "64", "1x32768"),
    ("causal", "32/8", "64", "1x1024 32x1024 4x4096 1x16384"),
    ("causal", "32/4", "64", "1x512 8x2048 1x4001 1x8192"),
    ("causal", "16/16", "96", "8x1000 1x4096 1x16384"),
    ("causal", "32/8", "96", "1x512 16x1024 2x4001 2x8192"),
    ("causal", "16/4", "256", "1x512 32x512 8x1000 1x2048 2x4096 1x4001 1x16384"),
    ("causal", "8/1", "256", "1x1024 4x4096 1x8192"),
    ("causal", "32/32", "192/128", "1x512 1x1024 8x1000 4x2048 1x4096 2x4001 1x8192"),
    ("causal", "128/128", "192/128", "1x2048 1x4096"),
    # Windows.
    ("sliding 1024", "32/8", "128", "1x2048 16x2048 1x4001 4x4096 1x8192 4x8192 1x16384 1x32768"),
    ("sliding 1024", "16/16", "128", "8x2048 1x4096 1x16384"),
    ("sliding 1024", "64/8", "128", "2x2048 1x8192 1x16384"),
    ("sliding 1024", "32/32", "64", "1x2048 4x4096 2x4001 1x16384"),
    ("sliding 1024", "32/8", "96", "2x4096 1x16384"),
    ("sliding 1024", "16/4", "256", "1x4001 2x4096 1x16384"),
    ("sliding 256", "32/8", "128", "32x512 8x1000 1x4096 4x4096 1x16384 1x32768"),
    ("sliding 256", "32/32", "64", "4x1024 4x4096 1x4001 1x16384"),
    ("sliding 256", "16/4", "256", "8x1024 1x8192"),
    # Every key: encoders, diffusion.
    ("full", "32/8", "128", "1x512 32x128 32x512 8x1000 1x2048 4x2048 1x4001 4x4096 1x8192"),
    ("full", "16/4", "128", "1x16384"),
    ("full", "16/16", "128", "32x256 4x1024 2x4096 1x8192"),
    ("full", "64/8", "128", "1x1024 1x4001 1x8192"),
    ("full", "16/16", "64", "1x512 32x256 32x512 8x1000 1x4096 4x4096 2x4001 1x16384"),
    ("full", "32/8", "64", "1x2048 4x4096"),
    ("full", "16/16", "96", "1x1024 8x1000 2x4096 1x8192"),
    ("full", "16/4", "256", "1x512 8x1000 2x4096 1x8192"),
    ("full", "32/32", "192/128", "1x1000 4x2048 1x4096 1x8192"),
)  # fmt: skip


def _points() -> list[Case]:
    points = []
    for mask, heads, dims, sizes in _GRID:
        kind, _, window = mask.partition(" ")
        query_heads, kv_heads = (int(text) for text in heads.split("/"))
        head_dim, _, value_dim = dims.partition("/")
        for size in sizes.split():
            batch, length = (int(text) for text in size.split("x"))
            points.append(
                Case(
                    name=f"{kind}{window}_d{dims.replace('/', 'v')}_h{query_heads}g{kv_heads}_b{batch}_s{length}",
                    form_name={"causal": "full_self", "sliding": "sliding_self", "full": "bidirectional"}[kind],
                    description="a point of the sweep",
                    batch=batch,
                    query_heads=query_heads,
                    kv_heads=kv_heads,
                    query_len=length,
                    key_len=length,
                    head_dim=int(head_dim),
                    value_dim=int(value_dim or head_dim),
                    window=int(window) if window else None,
                )
            )
    return points


def _spread(points: Sequence[Case]) -> list[Case]:
    """Shuffled with a fixed seed, every mask with every head dim once before any twice: a run may be cut off."""
    shuffled = random.Random(0).sample(points, len(points))
    seen: dict[tuple[str, str], int] = {}
    rank = {}
    for point in shuffled:
        kind = mask_of(point), dims_of(point)
        rank[point.name] = seen[kind] = seen.get(kind, 0) + 1
    return sorted(shuffled, key=lambda point: rank[point.name])


def mask_of(case: Case) -> str:
    """`"causal"`, `"full"` or `"sliding 1024"`."""
    if case.window is not None:
        return f"sliding {case.window}"
    return "full" if case.form_name == "bidirectional" else "causal"


def dims_of(case: Case) -> str:
    """`"128"`, or `"192/128"` where values are narrower than keys."""
    return str(case.head_dim) if case.head_dim == case.value_dim else f"{case.head_dim}/{case.value_dim}"


def call_of(case: Case) -> tuple[Mask, tuple[int, ...], Sizes]:
    """The point's mask, the values of its int operands, and its sizes, as predictions of kernels take them."""
    sizes = Sizes(
        case.batch, case.query_heads, case.kv_heads, case.kv_heads, case.query_len, case.key_len, case.head_dim,
        case.value_dim,
    )  # fmt: skip
    return case.form.mask.specialise([]), () if case.window is None else (case.window,), sizes


def items_of(case: Case) -> int:
    """Row tiles of the call, over all query heads and requests."""
    return case.batch * case.query_heads * -(-case.query_len // ITEM_ROWS)


def class_of(case: Case, multiprocessors: int) -> tuple[str, str, str, str]:
    """Mask, head dims, length and work of a point: points of one class ask the same of a kernel."""
    length = case.query_len
    an_sm = items_of(case) / multiprocessors
    return (
        mask_of(case),
        dims_of(case),
        SHORT if length <= 1024 else MIDDLE if length <= 4096 else LONG,
        FEW if an_sm < 1 else SOME if an_sm <= 4 else MANY,
    )


def scores_of(case: Case) -> int:
    """Scores that the float32 result takes, hidden ones counted."""
    return case.batch * case.query_heads * case.query_len * case.key_len


def chosen(patterns: str | None) -> list[Case]:
    """The points that any of the patterns matches (`*` and `?`, separated by commas), in the order of the sweep.

    Raises ValueError where a pattern matches none.
    """
    if patterns is None:
        return list(POINTS.values())
    wanted: set[str] = set()
    for pattern in (text.strip() for text in patterns.split(",")):
        found = fnmatch.filter(POINTS, pattern)
        if not found:
            names = ", ".join(list(POINTS)[:3])
            raise ValueError(f"--only: expected patterns of points such as {names}, got {pattern!r}; see --list")
        wanted.update(found)
    return [point for name, point in POINTS.items() if name in wanted]


def problem_of(case: Case, device: torch.device | str, seed: int) -> Problem:
    """The point's tensors, standard normal, token-major in memory, drawn on `device`."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(heads: int, length: int, dim: int) -> Tensor:
        shape = (case.batch, length, heads, dim)
        return torch.randn(shape, generator=generator, dtype=case.dtype, device=device).transpose(1, 2)

    operands: dict[str, OperandValue] = {} if case.window is None else {"window": case.window}
    return Problem(
        case.form,
        draw(case.query_heads, case.query_len, case.head_dim),
        draw(case.kv_heads, case.key_len, case.head_dim),
        draw(case.kv_heads, case.key_len, case.value_dim),
        operands,
        case.scale,
    )


POINTS: dict[str, Case] = {case.name: case for case in _spread(_points())}
"""Every point by name, in the order measured."""
