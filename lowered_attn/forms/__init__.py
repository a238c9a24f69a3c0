"""The module classes of every form family. A new family is its folder and its line in FAMILIES."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from lowered_attn.forms import regular

__all__ = ["FAMILIES", "Family", "regular"]


@dataclass(frozen=True)
class Family:
    """The three classes of a family, and which fields of AttentionConfig their constructors take."""

    full_self: Callable[..., nn.Module]
    """Class of (d_model, n_heads, ffn_dim_multiplier, backend=, **options)."""
    sliding_self: Callable[..., nn.Module]
    """Class of (d_model, n_heads, window_size, ffn_dim_multiplier, backend=, **options)."""
    segment_cross: Callable[..., nn.Module]
    """Class of (q_dim, kv_dim, d_attn, n_heads, lookback, backend=, **options)."""
    options: tuple[str, ...]
    """Names of the AttentionConfig fields that become keywords of the constructors when they are not None."""


FAMILIES: dict[str, Family] = {
    "regular": Family(
        full_self=regular.full_self.FullSelf,
        sliding_self=regular.sliding_self.SlidingSelf,
        segment_cross=regular.segment_cross.SegmentCross,
        options=("head_dim",),
    ),
}
