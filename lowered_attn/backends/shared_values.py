"""Values that several KV heads share, for torch's attention, which wants a value head for every KV head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def by_value_head(attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return `attend(q, k, v)`, [B, Hq, Lq, Dv], where v [B, Hv, Lk, Dv] may have fewer heads than k.

    `attend` sees one value head at a time with the query and KV heads that share it, v as a view with a head
    stride of 0: no value is copied here. What torch's kernels copy inside is theirs.
    """
    if v.shape[1] == k.shape[1]:
        return attend(q, k, v)
    parts = zip(*(t.tensor_split(v.shape[1], dim=1) for t in (q, k, v)), strict=True)
    outs = [attend(q_part, k_part, v_part.expand(-1, k_part.shape[1], -1, -1)) for q_part, k_part, v_part in parts]
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
