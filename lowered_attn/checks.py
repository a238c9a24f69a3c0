"""Checks of module and config arguments. Each message: the argument, expected, got, remedy."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor


def fail(where: str, name: str, expected: str, got: object, remedy: str) -> NoReturn:
    """Raise the ValueError of a bad argument `name` of `where`."""
    raise ValueError(f"{where}: {name}: expected {expected}, got {got}; {remedy}")


def check_int(where: str, name: str, value: object, minimum: int) -> None:
    """Raise ValueError unless `value` is an int (not a bool) of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        fail(where, name, f"an int of at least {minimum}", repr(value), f"pass {minimum} or more")


def check_size(where: str, name: str, value: object, limits: tuple[int, int]) -> None:
    """Raise ValueError unless `value` is an int from the least to the most that attention takes."""
    check_int(where, name, value, limits[0])
    if isinstance(value, int) and value > limits[1]:
        fail(where, name, f"at most {limits[1]}, what attention takes", value, f"pass {limits[1]} or less")


def check_tokens(where: str, name: str, x: Tensor, width: int, width_name: str) -> None:
    """Raise ValueError unless x is [B, S, width]."""
    if x.dim() != 3 or x.shape[2] != width:
        fail(
            where,
            name,
            f"shape [B, S, {width_name}] with {width_name} = {width}",
            f"shape {list(x.shape)}",
            f"pass {name} of width {width}, or build {where} with {width_name} = the width of {name}",
        )


def check_per_token(where: str, name: str, value: Tensor, x: Tensor, x_name: str) -> None:
    """Raise ValueError unless `value` is [B, S], one entry for each token of x [B, S, width]."""
    if value.shape != x.shape[:2]:
        fail(
            where,
            name,
            f"shape {list(x.shape[:2])}, one entry for each token of {x_name}",
            f"shape {list(value.shape)}",
            "expand or cut it: there is no broadcast",
        )


def divide_heads(where: str, name: str, width: int, n_heads: int) -> int:
    """Return width // n_heads, the head dim; ValueError where `name`, the width, does not divide."""
    if width % n_heads:
        fail(
            where,
            name,
            f"a multiple of n_heads = {n_heads}",
            width,
            f"pass another n_heads or {name}, or set head_dim",
        )
    return width // n_heads
