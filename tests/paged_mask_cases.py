"""Paged attention's masks stated a second time, pair by pair and in plain Python; and random requests for them."""

from __future__ import annotations

import dataclasses
import itertools
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from custom_ops.mask_printing import range_source
from custom_ops.masks import Mask
from custom_ops.paged.masks import paged_mask
from tests.mask_cases import tl

MODES = ("plain", "causal", "block_causal", "prefix_full", "prefix_causal", "cache_only")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is static: a mode, tokens of a block, keys of the window (None: there is none), and the hole."""

    mode: str
    block: int = 1
    window: int | None = None
    hole: bool = False

    @property
    def mask(self) -> Mask:
        return paged_mask(self.mode, block_size=self.block, window=self.window, prefix_hole=self.hole)

    @property
    def id(self) -> str:
        return f"block{self.block}-window{self.window}{'-hole' * self.hole}"


@dataclasses.dataclass(frozen=True)
class Request:
    """``n`` new tokens after ``context`` cached ones, the first ``valid`` of them real."""

    context: int
    n: int
    valid: int
    status: int = 0
    prefix: int = 0
    padded_prefix: int = 0

    def sees(self, s: Settings, a: int, b: int) -> bool:
        """Whether the new token at position ``a`` sees the key at position ``b``."""
        i, j = a - self.context, b - self.context
        if s.window is not None and a - b >= s.window:
            return False
        if j < 0:
            return not (s.hole and self.prefix <= b < self.padded_prefix)
        if j >= self.valid or s.mode == "cache_only":
            return False
        if s.mode == "plain":
            return True
        decoding = self.status == 1
        if s.mode == "causal" or (s.mode == "prefix_causal" and not decoding):
            return b <= a
        if s.mode == "prefix_full" and not decoding and i < self.padded_prefix:
            return j < (self.prefix if i < self.prefix else self.padded_prefix)
        return b < (a // s.block + 1) * s.block

    def brute_force(self, s: Settings, rows: int, keys: int) -> np.ndarray:
        """``[rows, keys]``, for as many queries and keys, real or not."""
        pairs = [[self.sees(s, self.context + i, b) for b in range(keys)] for i in range(rows)]
        return np.array(pairs, dtype=bool).reshape(rows, keys)

    def values(self, mask: Mask) -> dict[str, int]:
        """The mask's operands, in their order."""
        return {o.name: getattr(self, o.name) for o in mask.operands}

    def slots(self, mask: Mask) -> tuple[int, ...]:
        """As kernels pass them: six values, of which the mask reads the first."""
        values = tuple(self.values(mask).values())
        return (*values, *(0,) * (6 - len(values)))


def settings(mode: str, blocks: tuple[int, ...] = (1, 3, 4), windows: tuple = (None, 1, 5)) -> list[Settings]:
    """Every combination; block sizes only for modes that read one."""
    blocks = (1,) if mode in ("plain", "causal", "cache_only") else blocks
    return [Settings(mode, *rest) for rest in itertools.product(blocks, windows, (False, True))]


def random_requests(count: int, seed: int) -> Iterator[Request]:
    """Nothing cached, nothing new, nothing valid; prefixes that are empty, unpadded, and longer than the new tokens."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        context, n = (int(rng.choice([0, 1, rng.integers(0, high)])) for high in (21, 13))
        valid = int(rng.choice([n, rng.integers(0, n + 1)]))
        prefix = int(rng.choice([0, rng.integers(0, 14), rng.integers(0, 24)]))
        padded = prefix + int(rng.choice([0, rng.integers(0, 9)]))
        yield Request(context, n, valid, int(rng.integers(0, 2)), prefix, padded)


def tensors(requests: list[Request], mask: Mask) -> dict[str, torch.Tensor]:
    """The mask's operands as int32 ``[B]``."""
    values = [r.values(mask) for r in requests]
    return {o.name: torch.tensor([v[o.name] for v in values], dtype=torch.int32) for o in mask.operands}


def printed(mask: Mask, namespace: str = "tl") -> types.SimpleNamespace:
    """The device functions' text, run by Python."""
    scope: dict[str, Any] = {namespace: tl}
    exec(range_source(mask, namespace), scope)
    return types.SimpleNamespace(range=scope[f"{mask.name}_range"], visible=scope[f"{mask.name}_visible"])
