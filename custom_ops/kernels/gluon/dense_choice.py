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

LEAST_GAIN = {"cudnn": 0.02, "triton": 0.05}
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
# consumers), head dim and kind of mask: microseconds of a launch, of an item, of a key tile.
RATES: dict[tuple[str, int, str], Rates] = {
    # rates: begin
    ("cudnn", 64, "causal"): Rates(7.60, 1.05, 0.571),
    ("cudnn", 64, "full"): Rates(6.86, 0.98, 0.579),
    ("cudnn", 96, "causal"): Rates(8.51, 1.08, 0.864),
    ("cudnn", 96, "full"): Rates(7.05, 2.87, 0.769),
    ("cudnn", 128, "causal"): Rates(7.66, 1.46, 0.877),
    ("cudnn", 128, "full"): Rates(7.94, 1.15, 0.850),
    ("cudnn", 192, "causal"): Rates(8.06, 1.32, 1.161),
    ("cudnn", 192, "full"): Rates(7.05, 3.58, 1.081),
    ("cudnn", 256, "causal"): Rates(5.86, 2.45, 1.553),
    ("cudnn", 256, "full"): Rates(6.03, 2.11, 1.592),
    ("gluon2", 64, "causal"): Rates(8.48, 1.84, 1.154),
    ("gluon2", 64, "full"): Rates(7.95, 2.29, 1.123),
    ("gluon2", 64, "window"): Rates(10.97, 2.98, 1.079),
    ("gluon2", 96, "causal"): Rates(9.24, 2.20, 1.401),
    ("gluon2", 96, "full"): Rates(10.91, 2.19, 1.442),
    ("gluon2", 96, "window"): Rates(1.20, 3.47, 1.327),
    ("gluon2", 128, "causal"): Rates(8.40, 2.32, 1.477),
    ("gluon2", 128, "full"): Rates(9.20, 2.20, 1.483),
    ("gluon2", 128, "window"): Rates(7.41, 2.79, 1.505),
    ("gluon2", 192, "causal"): Rates(8.52, 4.28, 1.745),
    ("gluon2", 192, "full"): Rates(8.83, 4.34, 1.713),
    ("gluon2", 256, "causal"): Rates(4.93, 3.88, 1.319),
    ("gluon2", 256, "full"): Rates(5.69, 4.17, 1.337),
    ("gluon2", 256, "window"): Rates(0.53, 5.06, 1.266),
    ("gluon3", 64, "causal"): Rates(8.56, 1.89, 1.461),
    ("gluon3", 64, "full"): Rates(8.56, 2.18, 1.458),
    ("gluon3", 64, "window"): Rates(9.45, 2.82, 1.395),
    ("gluon3", 96, "causal"): Rates(9.33, 1.97, 1.851),
    ("gluon3", 96, "full"): Rates(9.70, 2.05, 1.825),
    ("gluon3", 96, "window"): Rates(2.57, 6.92, 0.718),
    ("gluon3", 128, "causal"): Rates(8.62, 1.90, 2.193),
    ("gluon3", 128, "full"): Rates(9.99, 1.66, 2.220),
    ("gluon3", 128, "window"): Rates(10.08, 1.43, 1.095),
    ("gluon3", 192, "causal"): Rates(8.58, 2.79, 1.319),
    ("gluon3", 192, "full"): Rates(5.09, 4.09, 1.315),
    ("triton", 64, "causal"): Rates(6.13, 2.12, 0.629),
    ("triton", 64, "full"): Rates(6.89, 2.01, 0.574),
    ("triton", 64, "window"): Rates(4.89, 0.05, 1.050),
    ("triton", 96, "causal"): Rates(5.22, 4.50, 0.888),
    ("triton", 96, "full"): Rates(5.74, 3.02, 1.070),
    ("triton", 96, "window"): Rates(0.05, 0.05, 1.349),
    ("triton", 128, "causal"): Rates(3.88, 5.13, 0.938),
    ("triton", 128, "full"): Rates(6.17, 5.09, 1.002),
    ("triton", 128, "window"): Rates(0.05, 3.67, 1.127),
    ("triton", 192, "causal"): Rates(5.22, 3.15, 1.302),
    ("triton", 192, "full"): Rates(0.05, 6.61, 1.352),
    ("triton", 256, "causal"): Rates(2.48, 7.54, 1.863),
    ("triton", 256, "full"): Rates(4.68, 3.33, 2.258),
    ("triton", 256, "window"): Rates(0.05, 10.90, 1.914),
    # rates: end
}  # fmt: skip


class Plan(NamedTuple):
    """What the Hopper kernel is fastest with for a call."""

    time: float
    """Predicted microseconds."""
    consumers: int
    """For ``dense_shape``."""
    walk: Walk
    """The order of items."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """Who takes a call, and why."""

    kernel: Kernel
    times: tuple[tuple[Kernel, float], ...]
    """Predicted microseconds by kernel, ``gluon`` first; others only where they could take the call."""

    @property
    def reason(self) -> str:
        """For ``explain``."""
        if len(self.times) == 1:
            return "the Hopper kernel takes every call of this kind that it can"
        ordered = sorted(self.times, key=lambda item: item[1])
        return f"predicted: {', '.join(f'{kernel} {time:.3g} us' for kernel, time in ordered)}"


def choose(
    mask: Mask,
    ints: tuple[int, ...],
    present: Present,
    sizes: Sizes,
    *,
    has_softcap: bool = False,
    gpu: Gpu = H200,
    cudnn: bool = True,
) -> Choice:
    """The fastest kernel for a call that ``dense_reasons`` finds nothing against, by prediction.

    ``mask`` is the form's for its operands, ``ints`` the values of its int operands. ``cudnn``: whether the caller can
    take that instead, as far as it is not a matter of the mask and the sizes, which is asked here.
    """
    own = best_plan(mask, ints, present, sizes, has_softcap, gpu).time
    times: dict[Kernel, float] = {"gluon": own}
    if is_plain(mask, present, has_softcap) and has_few_items(sizes, gpu):
        times["triton"] = _triton(mask, ints, sizes, gpu)
    if cudnn and not cudnn_reasons(mask, present, sizes, has_softcap):
        times["cudnn"] = _cudnn(mask, ints, sizes, gpu)
    worth = {name: time for name, time in times.items() if time <= own * (1 - LEAST_GAIN.get(name, 0.0))}
    return Choice(min(worth, key=worth.__getitem__), tuple(times.items()))


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


def rates_of(kernel: str, head_dim: int, kind: str) -> Rates:
    """Those of the nearest kind of call that was measured."""
    dim = next((known for known in HEAD_DIMS if known >= head_dim), HEAD_DIMS[-1])
    # Head dims of 72 to 128 have the same tiles of keys; causal calls and windows may not.
    wider = 128 if dim == 96 else dim
    keys = (
        *((kernel, dim, kind), (kernel, wider, kind), (kernel, dim, "causal")),
        *(("gluon2", dim, kind), ("gluon2", dim, "causal")),
    )
    return next(RATES[key] for key in keys if key in RATES)


def kind_of(mask: Mask) -> str:
    """By which ends of a row tile's key tiles are partial: "full", neither; "causal", the last; "window", both."""
    if mask.tile_bounds().lo_any != 0:
        return "window"
    return "full" if sees_everything(mask) else "causal"


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
    rates = rates_of(f"gluon{shape.consumers}", sizes.head_dim, kind_of(mask))
    tiles = own_tiles(mask, ints, present, sizes, shape)
    walk, load = walk_of([rates.item + rates.tile * count for count in tiles], shape, sizes, gpu)
    return walk, rates.launch + load


@functools.lru_cache(4096)
def best_plan(
    mask: Mask, ints: tuple[int, ...], present: Present, sizes: Sizes, has_softcap: bool = False, gpu: Gpu = H200
) -> Plan:
    """The fastest Hopper kernel for a call. Kept: who takes a call asks for its time, and then who launches it."""
    found = []
    for shape in shapes_of(mask, present, sizes, has_softcap):
        walk, time = plan(mask, ints, present, sizes, shape, gpu)
        found.append(Plan(time, shape.consumers, walk))
    return min(found)


def _cudnn(mask: Mask, ints: tuple[int, ...], sizes: Sizes, gpu: Gpu) -> float:
    """The heads of a request one after another, the first queries first."""
    rates = rates_of("cudnn", sizes.head_dim, kind_of(mask))
    tiles = key_tiles(mask, ints, sizes, *OTHERS["cudnn"], from_end=False)
    return rates.launch + listed([rates.item + rates.tile * count for count in tiles], sizes.all_heads, gpu)


def _triton(mask: Mask, ints: tuple[int, ...], sizes: Sizes, gpu: Gpu) -> float:
    """The query heads of a KV head are packed: a row tile has fewer queries."""
    rates = rates_of("triton", sizes.head_dim, kind_of(mask))
    rows, keys = OTHERS["triton"]
    queries = max(1, rows // (sizes.heads // sizes.kv_heads))
    tiles = key_tiles(mask, ints, sizes, queries, keys, from_end=False)[::-1]
    costs = [rates.item + rates.tile * count for count in tiles]
    return rates.launch + listed(costs, sizes.batch * sizes.kv_heads, gpu)
