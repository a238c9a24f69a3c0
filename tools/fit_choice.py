"""The rates of `custom_ops/kernels/gluon/dense_choice.py` from results of the sweep.

    python -m tools.sweep --variants '{"two": {"shipped": 2}, "three": {"shipped": 3}}' --output out/tilings.json
    python -m tools.fit_choice out/tilings.json --points
    python -m tools.fit_choice out/tilings.json --write

A kernel's rates are those of the least squares of relative errors over the points of a head dim. Which program is the
busiest one depends on them, so they are found again until they stay. Needs no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from custom_ops.kernels.gluon import dense_choice, dense_cost
from custom_ops.kernels.gluon.dense_choice import OTHERS, kind_of, own_tiles, shapes_of, walk_of
from custom_ops.kernels.gluon.dense_cost import H200, Gpu, Rates, Sizes, key_tiles
from tools.report import load
from tools.sweep_cases import POINTS, call_of

PASSES = 12
SHORT_US = 1000.0
"""Of longer points, errors count less: clocks fall under long load. Of 100, 300 and 1000 this one's rates chose best
at the points of a run: 0.29% slower, in the mean, than the fastest kernel of each; 0.30 and 0.31%."""
LEAST_POINTS = 3
BEGIN, END = "    # rates: begin\n", "    # rates: end\n"
NONE = (False,) * 5
KERNELS = {"two": "gluon2", "three": "gluon3", "cudnn": "cudnn", "portable": "triton"}
"""By the sweep's names. `ours` counts for the tiling that its `choice` tells."""

Load = Callable[[Rates], tuple[float, float]]
"""Items and key tiles of the busiest multiprocessor, under these rates."""


def busiest_of_walk(tiles: Sequence[int], shape: Any, sizes: Sizes, gpu: Gpu, rates: Rates) -> tuple[float, float]:
    """Of the Hopper kernel, in the walk that is chosen for it."""
    costs = [rates.item + rates.tile * count for count in tiles]
    walk, load = walk_of(costs, shape, sizes, gpu)
    # What is predicted to be lost to L2 is no rate's.
    slower = load / dense_cost.busiest(costs, sizes.all_heads, walk, gpu)
    programs = min(gpu.multiprocessors, len(tiles) * sizes.all_heads)

    def loads(values: Sequence[float]) -> list[float]:
        items = dense_cost.items_of(values, sizes.all_heads, walk.group_heads)
        return dense_cost.program_loads(items, walk.snake, programs)

    items, keys = loads([1.0] * len(tiles)), loads([float(count) for count in tiles])
    most = max(zip(items, keys, strict=True), key=lambda load: rates.item * load[0] + rates.tile * load[1])
    return most[0] * slower, most[1] * slower


def busiest_of_list(tiles: Sequence[int], heads: int, gpu: Gpu, rates: Rates) -> tuple[float, float]:
    """Of a kernel with a program an item, each started where a multiprocessor is free first."""
    free = [(0.0, 0, 0)] * min(gpu.multiprocessors, len(tiles) * heads)
    for count in itertools.chain.from_iterable(itertools.repeat(tiles, heads)):
        time, items, keys = free[0]
        heapq.heapreplace(free, (time + rates.item + rates.tile * count, items + 1, keys + count))
    _, items, keys = max(free)
    return items, keys


def load_of(kernel: str, name: str, gpu: Gpu) -> Load | None:
    """The load of a kernel at a point of the sweep; None where there is no such kernel there."""
    mask, ints, sizes = call_of(POINTS[name])
    if kernel.startswith("gluon"):
        shapes = [s for s in shapes_of(mask, NONE, sizes, False) if f"gluon{s.consumers}" == kernel]
        if not shapes:
            return None
        tiles = own_tiles(mask, ints, NONE, sizes, shapes[0])
        return lambda rates: busiest_of_walk(tiles, shapes[0], sizes, gpu, rates)
    rows, keys = OTHERS[kernel]
    heads = sizes.all_heads
    if kernel == "triton":
        rows, heads = max(1, rows // (sizes.heads // sizes.kv_heads)), sizes.batch * sizes.kv_heads
    others = key_tiles(mask, ints, sizes, rows, keys, from_end=False)
    if kernel == "triton":
        others = others[::-1]
    return lambda rates: busiest_of_list(others, heads, gpu, rates)


def measured(document: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """`(kernel, point, microseconds)` of every row that has a time."""
    found = []
    for point in document["cases"]:
        for row in point["rows"]:
            kernel = KERNELS.get(row["variant"])
            if row["variant"] == "ours" and point["choice"] and point["choice"]["kernel"] == "gluon":
                kernel = f"gluon{int(point['choice']['tiling'].split()[0]) // 64}"
            if kernel is not None and row["ms"] is not None:
                found.append((kernel, point["name"], 1e3 * row["ms"]))
    return found


def fitted(points: Sequence[tuple[Load, float]]) -> Rates:
    """The rates whose predictions are nearest to the measured microseconds."""
    rates = Rates(8.0, 1.5, 1.5)
    for _ in range(PASSES):
        rows = [(1.0, *load(rates)) for load, _ in points]
        times = torch.tensor([time for _, time in points], dtype=torch.float64)[:, None]
        weights = (SHORT_US / times).clamp(max=1.0).sqrt()
        matrix = torch.tensor(rows, dtype=torch.float64) / times
        solution = torch.linalg.lstsq(matrix * weights, weights).solution[:, 0]
        new = [max(float(value), 0.05) for value in solution]
        rates = Rates(*((old + value) / 2 for old, value in zip(dataclasses.astuple(rates), new, strict=True)))
    return rates


def predicted(load: Load, rates: Rates) -> float:
    items, keys = load(rates)
    return rates.launch + rates.item * items + rates.tile * keys


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.fit_choice", description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("results", type=Path, nargs="+", help="files of python -m tools.sweep")
    parser.add_argument("--points", action="store_true", help="also print what is predicted of each point")
    parser.add_argument("--write", action="store_true", help="put the rates into dense_choice.py: others stay")
    options = parser.parse_args(list(sys.argv[1:] if arguments is None else arguments))
    by_key: dict[tuple[str, int, str], list[tuple[Load, float, str]]] = {}
    for path in options.results:
        document = load(path)
        gpu = Gpu(document["host"]["multiprocessors"], H200.l2_bytes)
        for kernel, name, time in measured(document):
            made = load_of(kernel, name, gpu)
            if made is not None:
                key = (kernel, POINTS[name].head_dim, kind_of(POINTS[name].form.mask))
                by_key.setdefault(key, []).append((made, time, name))
    rates_found = dict(dense_choice.RATES)
    for key, points in sorted(by_key.items()):
        if len(points) < LEAST_POINTS:
            print(f"# {key}: {len(points)} points are too few")
            continue
        rates = rates_found[key] = fitted([(made, time) for made, time, _ in points])
        off = [predicted(made, rates) / time for made, time, _ in points]
        print(f"{row_of(key, rates)}  # {len(off)} points, {min(off):.2f} to {max(off):.2f} of what was measured")
        if options.points:
            for (_, time, name), share in sorted(zip(points, off, strict=True), key=lambda found: found[0][1]):
                print(f"    {name:42s} {time:8.1f} us, predicted {share:.3f} of it")
    if options.write:
        source = Path(dense_choice.__file__)
        before, _, rest = source.read_text().partition(BEGIN)
        rows = "".join(f"    {row_of(key, rates)}\n" for key, rates in sorted(rates_found.items()))
        source.write_text(before + BEGIN + rows + END + rest.partition(END)[2])
    return 0


def row_of(key: tuple[str, int, str], rates: Rates) -> str:
    """A line of the table."""
    kernel, head_dim, kind = key
    return f'("{kernel}", {head_dim}, "{kind}"): Rates({rates.launch:.2f}, {rates.item:.2f}, {rates.tile:.3f}),'


if __name__ == "__main__":
    sys.exit(main())
