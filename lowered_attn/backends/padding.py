"""Padding for backends that multiply what they mask: 0 * NaN is NaN, so hidden keys are cleared."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from custom_ops.masks import OperandValue


def clear_hidden(k: Tensor, v: Tensor, operands: Mapping[str, OperandValue]) -> tuple[Tensor, Tensor]:
    """Return k [B, Hkv, Lk, D] and v [B, Hkv, Lk, Dv] with 0 where `key_padding` hides the key."""
    padding = operands.get("key_padding")
    if not isinstance(padding, Tensor):
        return k, v
    hidden = padding[:, None, :, None]
    return k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
