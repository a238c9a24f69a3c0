"""Padded keys, cleared for code that multiplies what it masks: 0 * NaN is NaN."""

from __future__ import annotations

from torch import Tensor


def clear_padded(key: Tensor, value: Tensor, key_padding: Tensor | None) -> tuple[Tensor, Tensor]:
    """``key [B, Hkv, Lk, D]`` and ``value [B, Hv, Lk, Dv]`` with 0 where ``key_padding [B, Lk]`` hides the key."""
    if key_padding is None:
        return key, value
    hidden = key_padding[:, None, :, None]
    return key.masked_fill(hidden, 0), value.masked_fill(hidden, 0)
