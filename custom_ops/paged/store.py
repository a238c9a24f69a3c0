"""``torch.ops.lowered_attn.store_kv_cache``: new keys and values into the pages of a cache.

Row ``t`` of k and v goes to slot ``slot_mapping[t]``, which is ``page * page_size + offset``. A slot of -1 (any slot
below 0 or past the cache) is not written. Caches of k's dtype take the bits as they are; fp8 caches take
``k / k_scale`` (``v / v_scale``) in fp32, rounded to nearest even, what is out of range as the largest value of its
sign.

No slot may come twice in one call: which row would win is not defined. Gradients do not pass through a cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from custom_ops.form import NAMESPACE
from custom_ops.op import library
from custom_ops.paged.checks import check_store

_ARGUMENTS = (
    "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, Tensor? k_scale=None, "
    "Tensor? v_scale=None, *, str layout='unified')"
)


def register_store(
    name: str, arguments: str, on_cpu: Callable[..., None], on_cuda: Callable[..., None], fake: Callable[..., None]
) -> None:
    """Define ``torch.ops.lowered_attn.<name>``, which writes into caches; ``arguments``: the schema's."""

    def below_autograd(keys: torch._C.DispatchKeySet, *arguments: Any, **keywords: Any) -> None:
        """Store without recording: a cache that required grad would keep every step's graph alive."""
        with torch._C._AutoDispatchBelowAutograd():
            below = keys & torch._C._after_autograd_keyset
            getattr(torch.ops.lowered_attn, name).default.redispatch(below, *arguments, **keywords)

    library.define(f"{name}{arguments} -> ()", tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, below_autograd, "Autograd", with_keyset=True)
    library.impl(name, on_cpu, "CPU")
    library.impl(name, on_cuda, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)


def _on_cpu(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None, *, layout: str = "unified",
) -> None:  # fmt: skip
    from custom_ops.paged import cpu

    check_store(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale, layout)
    cpu.store(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale, layout)


def _on_cuda(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None, *, layout: str = "unified",
) -> None:  # fmt: skip
    from custom_ops.kernels import paged_launch

    check_store(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale, layout)
    paged_launch.store(
        k=k, v=v, k_cache=k_cache, v_cache=v_cache, slot_mapping=slot_mapping, k_scale=k_scale, v_scale=v_scale,
        layout=layout,
    )  # fmt: skip


def _fake(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None, *, layout: str = "unified",
) -> None:  # fmt: skip
    check_store(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale, layout)


register_store("store_kv_cache", _ARGUMENTS, _on_cpu, _on_cuda, _fake)
