"""Which kernel takes a dense call that the Hopper kernel can take, and how that is tiled and walked for it. No triton.

By predicted time (``dense_cost``), from rates that were measured. Eager calls and the compiler ask the one ``choose``.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Literal, NamedTuple

import sympy

from custom_ops.kernels.gluon.dense_cost import (
    H200,
    Gpu,
    Rates,
    Sizes,
    Walk,
    best_walk,
    key_tiles,
    listed,
    unused_rows,
)
from custom_ops.kernels.gluon.dense_shape import DenseShape, dense_shape
from custom_ops.mask_bounds import q

if TYPE_CHECKING:
    from custom_ops.masks import Mask

Kernel = Literal["gluon", "cudnn", "triton"]
HOPPER = "gluon_dense"
"""The Hopper kernel's name among the facts of decisions."""
Present = tuple[bool, bool, bool, bool, bool]
"""Which tensor operands a call has, in the order of ``specialise.kernel_operands``."""

LEAST_GAIN = {"cudnn": 0.03, "triton": 0.05}
"""How much faster than the Hopper kernel another one has to be by prediction: predictions are that far off."""
HEAD_DIMS = (64, 96, 128, 192, 256)
"""Rates are those of the least of these that is no less than a call's head dim."""
DIM_STEP, WIDEST = 8, 256
"""cuDNN's head dims: multiples, and the widest."""


class _Tiles(NamedTuple):
    """Row and key tiles of a kernel that is not ours to tile here."""

    rows: int
    keys: int


OTHERS = {"cudnn": _Tiles(128, 64), "triton": _Tiles(128, 64)}

# NVIDIA H200, torch 2.11, triton 3.6, cuDNN 9.19, bf16, by tools/fit_choice.py. By kernel (of the Hopper one, with its
# consumers), head dim and whether the mask is a window: microseconds of a launch, of an item, of a key tile.
RATES: dict[tuple[str, int, bool], Rates] = {
    # rates: begin
    ("cudnn", 64, False): Rates(7.46, 1.02, 0.572),
    ("cudnn", 96, False): Rates(7.99, 1.90, 0.806),
    ("cudnn", 128, False): Rates(7.90, 1.52, 0.830),
    ("cudnn", 192, False): Rates(8.74, 1.56, 1.108),
    ("cudnn", 256, False): Rates(6.13, 2.96, 1.485),
    ("gluon2", 64, False): Rates(8.50, 1.30, 1.090),
    ("gluon2", 64, True): Rates(8.50, 2.30, 1.000),
    ("gluon2", 96, False): Rates(9.00, 1.50, 1.560),
    ("gluon2", 96, True): Rates(9.60, 2.45, 1.500),
    ("gluon2", 128, False): Rates(8.40, 1.80, 1.570),
    ("gluon2", 128, True): Rates(10.08, 2.50, 1.512),
    ("gluon2", 192, False): Rates(9.00, 1.80, 1.970),
    ("gluon2", 192, True): Rates(9.00, 3.00, 1.100),
    ("gluon2", 256, False): Rates(5.86, 3.74, 1.387),
    ("gluon2", 256, True): Rates(4.42, 4.49, 1.366),
    ("gluon3", 64, False): Rates(8.48, 1.42, 1.532),
    ("gluon3", 64, True): Rates(8.23, 2.76, 1.437),
    ("gluon3", 96, False): Rates(9.10, 1.64, 2.122),
    ("gluon3", 128, False): Rates(8.10, 2.31, 2.107),
    ("gluon3", 192, False): Rates(8.78, 2.46, 1.442),
    ("triton", 64, False): Rates(6.68, 2.08, 0.574),
    ("triton", 64, True): Rates(5.61, 0.23, 0.988),
    ("triton", 96, False): Rates(6.75, 3.52, 0.917),
    ("triton", 128, False): Rates(3.92, 5.90, 0.845),
    ("triton", 128, True): Rates(1.53, 3.96, 1.050),
    ("triton", 192, False): Rates(7.88, 2.02, 1.286),
    ("triton", 256, False): Rates(4.50, 9.13, 1.575),
    ("triton", 256, True): Rates(0.05, 10.41, 1.879),
    # rates: end
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Choice:
    """Who takes a call, and why."""

    kernel: Kernel
    consumers: int
    """Of the Hopper kernel, for ``dense_shape``,"""
    walk: Walk
    """and its order of items: where it does not take the call, those that it would be fastest with."""
    times: tuple[tuple[Kernel, float], ...]
    """Predicted microseconds by kernel, ``gluon`` first; others only where they could take the call."""

    @property
    def reason(self) -> str:
        """For ``explain``."""
        if len(self.times) == 1:
            return "the Hopper kernel takes every call of this kind that it can"
        ordered = sorted(self.times, key=lambda item: item[1])
        return f"predicted: {', '.join(f'{kernel} {time:.3g} us' for kernel, time in ordered)}"


@functools.lru_cache(4096)
def choose(
    mask: Mask,
    ints: tuple[int, ...],
    present: Present,
    sizes: Sizes,
    *,
    has_softcap: bool = False,
    gpu: Gpu = H200,
    cudnn: bool = True,
    triton: bool = True,
) -> Choice:
    """The fastest kernel for a call that ``dense_reasons`` finds nothing against, by prediction.

    ``mask`` is the form's for its operands, ``ints`` the values of its int operands. ``cudnn`` and ``triton``: whether
    the caller can take these instead, as far as it is not a matter of the mask and the sizes, which is asked here.
    """
    consumers, walk, own = _own(mask, ints, present, sizes, has_softcap, gpu)
    times: dict[Kernel, float] = {"gluon": own}
    if triton and is_plain(mask, present, has_softcap) and has_few_items(sizes, gpu):
        times["triton"] = _triton(mask, ints, sizes, gpu)
    if cudnn and not cudnn_reasons(mask, present, sizes, has_softcap):
        times["cudnn"] = _cudnn(mask, ints, sizes, gpu)
    worth = {name: time for name, time in times.items() if time <= own * (1 - LEAST_GAIN.get(name, 0.0))}
    return Choice(min(worth, key=worth.__getitem__), consumers, walk, tuple(times.items()))


def is_plain(mask: Mask, present: Present, has_softcap: bool) -> bool:
    """Whether the mask is an interval of positions and ints alone: other calls were not measured beside others."""
    return not any(present) and not has_softcap and mask.interval() is not None


def has_few_items(sizes: Sizes, gpu: Gpu) -> bool:
    """Whether every row tile of the portable kernel has a multiprocessor to itself: where it has its chance."""
    return sizes.all_heads * -(-sizes.query_len // OTHERS["triton"].rows) <= gpu.multiprocessors


def cudnn_reasons(mask: Mask, present: Present, sizes: Sizes, has_softcap: bool) -> list[str]:
    """Why cuDNN's attention cannot take a call; empty where it can."""
    causal = mask.interval() == (sympy.S.Zero, q + 1)
    dims = sizes.head_dim, sizes.value_dim
    checks = (
        (not any(present) and not has_softcap, "operands: expected none and no softcap"),
        (causal or sees_everything(mask), "mask: expected plain causal or unmasked attention"),
        (
            not causal or sizes.query_len == sizes.key_len,
            "lengths: expected as many queries as keys under a causal mask",
        ),
        (sizes.kv_heads == sizes.value_heads, "v: expected a value head for every KV head"),
        (
            all(dim % DIM_STEP == 0 and dim <= WIDEST for dim in dims),
            f"head dims: expected multiples of {DIM_STEP} up to {WIDEST}, got {dims[0]} and {dims[1]}",
        ),
    )
    return [reason for holds, reason in checks if not holds]


def sees_everything(mask: Mask) -> bool:
    """Whether every query sees every key that there is."""
    return mask.interval() == (sympy.S.Zero, sympy.oo)


# ------------------------------------------------------------------ predictions


def rates_of(kernel: str, head_dim: int, window: bool) -> Rates:
    """Those of the nearest kind of call that was measured."""
    dim = next((known for known in HEAD_DIMS if known >= head_dim), HEAD_DIMS[-1])
    keys = ((kernel, dim, window), (kernel, dim, False), ("gluon2", dim, window))
    return next(RATES[key] for key in keys if key in RATES)


def is_window(mask: Mask) -> bool:
    """Whether keys are hidden before those that a query sees, so that both ends of its tiles are partial."""
    return mask.tile_bounds().lo_any != 0


def shapes_of(mask: Mask, present: Present, sizes: Sizes, has_softcap: bool) -> list[DenseShape]:
    """The shipped kernels that could take a call: with three consumers, if there is one, and with two."""
    group, sharing = sizes.heads // sizes.kv_heads, sizes.kv_heads // sizes.value_heads
    dims = sizes.head_dim, sizes.value_dim
    return list(
        dict.fromkeys(
            dense_shape(mask, present, group, sharing, *dims, has_softcap, consumers) for consumers in (None, 2)
        )
    )


def own_tiles(mask: Mask, ints: tuple[int, ...], present: Present, sizes: Sizes, shape: DenseShape) -> list[int]:
    """Key tiles of each row tile of a head in the Hopper kernel."""
    skipped = unused_rows(sizes.query_len, shape.block_m)
    return key_tiles(mask, ints, sizes, shape.block_m, shape.block_n, from_end=present[0], skipped=skipped)


def walk_of(costs: list[float], shape: DenseShape, sizes: Sizes, gpu: Gpu) -> tuple[Walk, float]:
    """The walk of a kernel over row tiles of these costs, and its load."""
    bytes_a_head = sizes.key_len * (shape.head_dim + shape.loaded_value_dim) * 2
    return best_walk(costs, sizes.all_heads, shape.group, bytes_a_head, gpu)


def plan(
    mask: Mask, ints: tuple[int, ...], present: Present, sizes: Sizes, shape: DenseShape, gpu: Gpu
) -> tuple[Walk, float]:
    """The walk of one kernel for a call, and the predicted time."""
    rates = rates_of(f"gluon{shape.consumers}", sizes.head_dim, is_window(mask))
    tiles = own_tiles(mask, ints, present, sizes, shape)
    walk, load = walk_of([rates.item + rates.tile * count for count in tiles], shape, sizes, gpu)
    return walk, rates.launch + load


def _own(
    mask: Mask, ints: tuple[int, ...], present: Present, sizes: Sizes, has_softcap: bool, gpu: Gpu
) -> tuple[int, Walk, float]:
    """Consumers, walk and time of the fastest Hopper kernel for a call."""
    found = []
    for shape in shapes_of(mask, present, sizes, has_softcap):
        walk, time = plan(mask, ints, present, sizes, shape, gpu)
        found.append((time, shape.consumers, walk))
    time, consumers, walk = min(found)
    return consumers, walk, time


def _cudnn(mask: Mask, ints: tuple[int, ...], sizes: Sizes, gpu: Gpu) -> float:
    """The heads of a request one after another, the first queries first."""
    rates = rates_of("cudnn", sizes.head_dim, False)
    tiles = key_tiles(mask, ints, sizes, *OTHERS["cudnn"], from_end=False)
    return rates.launch + listed([rates.item + rates.tile * count for count in tiles], sizes.all_heads, gpu)


def _triton(mask: Mask, ints: tuple[int, ...], sizes: Sizes, gpu: Gpu) -> float:
    """The query heads of a KV head are packed: a row tile has fewer queries."""
    rates = rates_of("triton", sizes.head_dim, is_window(mask))
    rows, keys = OTHERS["triton"]
    queries = max(1, rows // (sizes.heads // sizes.kv_heads))
    tiles = key_tiles(mask, ints, sizes, queries, keys, from_end=False)[::-1]
    costs = [rates.item + rates.tile * count for count in tiles]
    return rates.launch + listed(costs, sizes.batch * sizes.kv_heads, gpu)
