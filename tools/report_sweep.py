"""The sweep's part of the report: what the eager dispatch takes beside FlashAttention-3 and cuDNN, by class of shapes.

A ratio is the other's time over ours: above 1, ours is faster. Ratios of several points are geometric means.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tools.report import Document, is_timed, rows_of

MARKERS = ("<!-- sweep:begin -->", "<!-- sweep:end -->")
OURS, PORTABLE = "ours", "portable"
PEERS = {"fa3": "FlashAttention-3", "cudnn": "cuDNN"}
"""Who we are held against: entry and heading."""
AT_LEAST = 0.95
"""Of the better peer's speed: what every point has to reach."""
MASKS = ("causal", "sliding 1024", "sliding 256", "full")

Point = Mapping[str, Any]
"""A case of the results file."""


def times(point: Point) -> dict[str, float]:
    """ms by entry, of right results alone."""
    return {name: row["ms"] for name, row in rows_of(point).items() if is_timed(row)}


def ratio(point: Point, other: str) -> float | None:
    """`other`'s time over ours; None where one of them has none."""
    ms = times(point)
    return ms[other] / ms[OURS] if OURS in ms and other in ms else None


def standing(point: Point) -> float | None:
    """The better peer's time over ours; None without a peer. 0 where a peer has a time and we have none."""
    ms = times(point)
    peers = [ms[peer] for peer in PEERS if peer in ms]
    if not peers:
        return None
    return min(peers) / ms[OURS] if OURS in ms else 0.0


def below(points: Iterable[Point]) -> list[Point]:
    """The points that do not reach `AT_LEAST`, worst first."""
    missed = [(held, point) for point in points if (held := standing(point)) is not None and held < AT_LEAST]
    return [point for _, point in sorted(missed, key=lambda pair: pair[0])]


def mean(ratios: Iterable[float | None]) -> float | None:
    """Geometric mean of those that there are."""
    known = [math.log(r) for r in ratios if r]
    return math.exp(sum(known) / len(known)) if known else None


def by_class(points: Sequence[Point], depth: int = 4) -> dict[tuple[str, ...], list[Point]]:
    """Points by the first `depth` of mask, head dims, length and work, in the order of masks and dims."""
    found: dict[tuple[str, ...], list[Point]] = {}
    for point in sorted(points, key=lambda point: (_order(point), point["items"])):
        found.setdefault(tuple(point["class"][:depth]), []).append(point)
    return found


def _order(point: Point) -> tuple[int, list[int], str]:
    mask, dims, length, _ = point["class"]
    return MASKS.index(mask), [int(dim) for dim in dims.split("/")], f"{point['q'][2] > 1024}{point['q'][2] > 4096}"


def failures(points: Sequence[Point]) -> list[tuple[str, str, str, int]]:
    """Entry, status, reason and number of points, of everything that has no time."""
    lost = Counter(
        (row["variant"], row["status"], row["reason"])
        for point in points
        for row in point["rows"]
        if not is_timed(row)
    )
    return [(*what, count) for what, count in lost.items()]


# ------------------------------------------------------------------ the terminal


def line(point: Point) -> str:
    """A point in one line."""
    held = standing(point)
    error = max((row["error"] for row in point["rows"] if row["ours"] and is_timed(row)), default=None)
    cells = [
        f"{row['variant']} {1e3 * row['ms']:.1f}" if is_timed(row) else f"{row['variant']} {row['status'].upper()}"
        for row in point["rows"]
    ]
    kernel = point["choice"]["kernel"] if point["choice"] else "?"
    text = f"{point['name']:42s} {kernel:6s} {'     ' if held is None else f'{held:.3f}'}{_flag(held)} us: "
    text += ", ".join(cells) + ("" if error is None else f"; error {error:.1e} ({point['compared_with']})")
    broken = [row for row in point["rows"] if row["status"] in ("failed", "wrong")]
    return "\n".join([text, *(f"      {row['variant']} {row['status']}: {row['reason'][:200]}" for row in broken)])


def _flag(held: float | None) -> str:
    return " LOW" if held is not None and held < AT_LEAST else "    "


def summary(document: Document) -> str:
    """Ratios by class, then what is too slow and what did not run."""
    points = document["cases"]
    lines = [f"{'class':62s} points {'/FA3':>6s} {'/cuDNN':>6s} {'/Triton':>7s} {'best peer: mean, least':>24s}"]
    for key, members in by_class(points).items():
        held = [h for h in map(standing, members) if h is not None]
        least = f"{min(held):.3f}{_flag(min(held))}" if held else "-"
        mask, dims, length, work = key
        lines.append(
            f"{mask:13s}D{dims:8s}{length:12s}{work:27s} {len(members):6d} "
            f"{_text(_mean_to(members, 'fa3')):>6s} {_text(_mean_to(members, 'cudnn')):>6s} "
            f"{_text(_mean_to(members, PORTABLE)):>7s} {_text(mean(held)):>10s} {least:>13s}"
        )
    slow = below(points)
    lines.append(f"{len(slow)} of {len(points)} points below {AT_LEAST}x the better of FlashAttention-3 and cuDNN:")
    lines += [f"  {standing(point):.3f} {point['name']}" for point in slow]
    lines += [f"  {count:3d} points: {who} {status}: {why}" for who, status, why, count in failures(points)]
    if document.get("skipped"):
        lines += [f"  {name}: not measured: {why}" for name, why in document["skipped"].items()]
    if document.get("not_reached"):
        lines.append(f"  {len(document['not_reached'])} points not reached")
    return "\n".join(lines)


def _mean_to(points: Sequence[Point], other: str) -> float | None:
    return mean(ratio(point, other) for point in points)


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def choices(document: Document) -> str:
    """What a table of choices needs: by class, how near each candidate comes to the fastest at each point.

    Candidates are all entries but FlashAttention-3, which is not ours to call.
    """
    points = document["cases"]
    lines = ["choices: share of the fastest candidate's speed, mean (least), and how often it is the fastest"]
    for key, members in by_class(points).items():
        shares: dict[str, list[float]] = {}
        for ms in map(_candidates, members):
            for name, taken in ms.items():
                shares.setdefault(name, []).append(min(ms.values()) / taken)
        ordered = sorted(shares.items(), key=lambda item: (-len(item[1]), -(mean(item[1]) or 0)))
        cells = [
            f"{name} {mean(found):.3f} ({min(found):.3f}) {found.count(1.0)}/{len(found)}" for name, found in ordered
        ]
        lines.append(f"{' '.join([key[0], 'D' + key[1], *key[2:]]):62s} {', '.join(cells)}")
    lines.append("points where what the dispatch takes is over 2% slower than the fastest candidate:")
    for point in sorted(points, key=_order):
        ms = _candidates(point)
        fastest = min(ms, key=ms.__getitem__, default=None)
        if fastest is not None and (OURS not in ms or ms[OURS] > 1.02 * ms[fastest]):
            own = f"{ms[OURS] / ms[fastest]:.3f}x as long" if OURS in ms else "no time"
            kernel = point["choice"]["kernel"] if point["choice"] else "?"
            lines.append(f"  {point['name']:42s} {fastest} {1e3 * ms[fastest]:.1f} us; ours ({kernel}) {own}")
    return "\n".join(lines)


def _candidates(point: Point) -> dict[str, float]:
    return {name: ms for name, ms in times(point).items() if name != "fa3"}


# ------------------------------------------------------------------ README


def plotted(document: Document) -> list[Point]:
    """The points that the plot shows: those with a ratio."""
    return [point for point in document["cases"] if standing(point)]


def block(document: Document, plot: str | None) -> str:
    """What stands between the markers, from `python -m tools.sweep --output sweep.json`."""
    points, host = document["cases"], document["host"]
    picture = [f"![The better peer's time over ours at every point of the sweep]({plot})", ""] if plot else []
    lines = [
        *picture,
        f"What an eager call takes at {len(points)} shapes: the other's time over ours, mean (least).",
        "",
        "| mask | D | points | kernel | " + " | ".join(PEERS.values()) + " | better of the two | portable Triton "
        f"| below {AT_LEAST}x |",
        "|---|---|---|---|" + "---|" * (len(PEERS) + 3),
    ]
    for (group, dims), members in by_class(points, depth=2).items():
        others: list[Callable[[Point], float | None]] = [
            *(lambda point, peer=peer: ratio(point, peer) for peer in PEERS), standing,  # type: ignore[misc]
            lambda point: ratio(point, PORTABLE),
        ]  # fmt: skip
        kernels = Counter(point["choice"]["kernel"] for point in members if point["choice"])
        kernel = ", ".join(n if count == len(members) else f"{n} {count}" for n, count in sorted(kernels.items()))
        cells = [_cell([other(point) for point in members]) for other in others]
        cells.append(str(len(below(members))))
        lines.append(f"| {group} | {dims} | {len(members)} | {kernel} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_caption(document, points, host)])


def _cell(ratios: Sequence[float | None]) -> str:
    known = [r for r in ratios if r is not None]
    return "–" if not known else f"{mean(known) or 0:.2f} ({min(known):.2f})"


def _caption(document: Document, points: Sequence[Point], host: Mapping[str, Any]) -> list[str]:
    slow = below(points)
    lines = []
    if slow:
        named = "; ".join(f"{point['title']} {standing(point):.3f}" for point in slow)
        lines += [f"Below {AT_LEAST}x the better of the two: {named}.", ""]
    lost = [
        f"{who} at {count} points ({status}: {why or 'no reason given'})"
        for who, status, why, count in failures(points)
    ]
    if lost:
        lines += [f"Without a time: {'; '.join(lost)}.", ""]
    ours = [(row["error"], point) for point in points for row in point["rows"] if row["ours"] and is_timed(row)]
    if ours:
        exact = [error for error, point in ours if point["compared_with"] == "float32"]
        beside = [error for error, point in ours if point["compared_with"] != "float32"]
        text = f"The largest relative error against float32 is {max(exact):.1e}" if exact else ""
        if beside:
            also = "; at the longest points, " if exact else "At the longest points, "
            text += f"{also}which are compared with a peer instead, the largest difference is {max(beside):.1e}"
        lines.append(text + ".")
    rounds = document["settings"]["rounds"]
    lines.append(
        f"Medians of {rounds} interleaved rounds of CUDA-graph replays, L2 flushed before each. {host['gpu']}, torch "
        f"{host['torch']}, triton {host['triton']}, CUDA {host['cuda']}, cuDNN {host['cudnn']}, {host['date']}"
        + (f", commit {host['git_commit'][:12]}" if host["git_commit"] else "") + "."
    )  # fmt: skip
    if not document["complete"]:
        lines.append(f"The run ended with {len(points)} of its {document['points']} points measured.")
    return [*lines, "", "```", host["command"], "```"]
