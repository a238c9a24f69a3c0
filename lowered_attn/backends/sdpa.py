"""torch's `scaled_dot_product_attention`, with the form's mask as a tensor where `is_causal` is not enough.

The mask is bool [B or 1, 1, Lq, Lk] and is built at every call: at long lengths it costs more than the
attention.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from custom_ops.form import Form
from custom_ops.masks import OperandValue
from custom_ops.padding import clear_padded
from custom_ops.reference import query_positions
from lowered_attn.backends.shared_values import by_value_head

NAME = "sdpa"


def unsupported_reasons(
    form: Form, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, OperandValue], softcap: float = 0.0
) -> list[str]:
    """Only a soft-cap: SDPA has a path for every device, dtype, head dim and mask that a form accepts."""
    return [f"scaled_dot_product_attention has no soft-cap, got softcap={softcap:g}"] if softcap else []


def run(
    form: Form,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Mapping[str, OperandValue],
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Return [B, Hq, Lq, Dv] in q's dtype; rows that see nothing are 0, with zero gradients."""
    grouped = q.shape[1] != k.shape[1]
    if form.name == "full_self" and all(value is None for value in operands.values()):
        causal = functools.partial(scaled_dot_product_attention, is_causal=True, scale=scale, enable_gqa=grouped)
        return by_value_head(causal, q, k, v)
    k, v = clear_padded(k, v, operands.get("key_padding"))  # type: ignore[arg-type]
    keys = torch.arange(k.shape[2], device=k.device)
    visible = form.mask.dense(query_positions(q, operands), keys, operands).unsqueeze(1)
    # What SDPA makes of a row of all False depends on the kernel: 0 in some, an average of v in others (torch 2.11
    # on an H200), and nothing promises that it is not NaN. Such a row is let see everything, then cleared:
    # masked_fill also stops its gradients.
    empty = ~visible.any(dim=-1, keepdim=True)
    masked = functools.partial(scaled_dot_product_attention, attn_mask=visible | empty, scale=scale, enable_gqa=grouped)
    return by_value_head(masked, q, k, v).masked_fill(empty, 0)
