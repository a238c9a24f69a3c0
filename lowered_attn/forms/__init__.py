"""The module classes of every form family. A new family is its folder and its line in FAMILIES."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from lowered_attn.backends import BACKENDS
from lowered_attn.forms import mla, regular
from lowered_attn.forms.mla.latent import BACKEND_ALIASES

__all__ = ["FAMILIES", "Family", "mla", "regular"]


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
    backends: tuple[str, ...] = tuple(BACKENDS)
    """Names that the constructors take as `backend`."""


FAMILIES: dict[str, Family] = {
    "regular": Family(
        full_self=regular.full_self.FullSelf,
        sliding_self=regular.sliding_self.SlidingSelf,
        segment_cross=regular.segment_cross.SegmentCross,
        options=("head_dim",),
    ),
    "mla": Family(
        full_self=mla.full_self.FullSelf,
        sliding_self=mla.sliding_self.SlidingSelf,
        segment_cross=mla.segment_cross.SegmentCross,
        options=("head_dim", "kv_comp_dim", "q_comp_dim", "retr_dim"),
        backends=(*BACKENDS, *BACKEND_ALIASES),
    ),
}
