"""What tests that launch the paged kernels share: outputs that hold NaN at first, and the kernels' tilings."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from custom_ops.kernels.paged_config import PagedConfig, paged_config
from custom_ops.paged.call import PagedCall, empty_outputs
from custom_ops.paged.schedule import ScheduleCall, config_of


def poison_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every launch start from outputs of NaN: what a kernel forgets to write shows."""
    from custom_ops.kernels import paged_launch

    def poisoned(call: PagedCall) -> tuple[Tensor, ...]:
        return tuple(t.fill_(math.nan) for t in empty_outputs(call))

    monkeypatch.setattr(paged_launch, "empty_outputs", poisoned)


def interpreted_config(call: PagedCall, head_blocks: int | None = None, **changes: Any) -> PagedConfig:
    """The interpreter's tiling of ``call``, changed where asked; ``head_blocks`` as the shipped tilings cut them."""
    sizes = call.cache_sizes
    heads = call.q.shape[1]
    found = paged_config(
        0, 1, call.impl, "decode", call.q.dtype, call.k_cache.dtype, heads, sizes.kv_heads, sizes.head_dim,
        sizes.page_size, call.layout, value_dim=call.value_dim,
    )  # fmt: skip
    if head_blocks is not None:
        padded = 1 << (-(-heads // sizes.kv_heads // head_blocks) - 1).bit_length()
        changes.update(head_blocks=head_blocks, counters_per_program=head_blocks, padded_group=padded)
        changes["block_m"] = max(padded, changes.get("block_m", 16))
    return dataclasses.replace(found, **changes)


def hopper_config(call: PagedCall) -> PagedConfig:
    """The Hopper kernel's tiling of ``call``; skips the test on another GPU."""
    if torch.cuda.get_device_capability(call.q.device) != (9, 0):
        pytest.skip("needs a Hopper GPU")
    config = config_of(ScheduleCall.of(call))
    assert config.kernel == "gluon"
    return config


def attend_on_hopper(call: PagedCall, **changes: Any) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` of the Hopper kernel, its tiling changed where asked."""
    from custom_ops.kernels import paged_launch

    return paged_launch.attention(call, dataclasses.replace(hopper_config(call), **changes))
