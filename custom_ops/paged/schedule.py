"""``torch.ops.lowered_attn.paged_schedule``: who computes what in a step, worked out once on the device for all layers.

It reads lengths on the device and writes one int32 tensor, whose size follows from capacities alone
(``custom_ops.paged.schedule_layout``): ``R`` requests and ``num_tokens`` rows of q, padding included. Attention takes
it as ``schedule``, in every layer of the step, and does not change it. A CPU needs none and gets an empty tensor.

Schedule and attention must tile alike, so both ask ``config_of``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from custom_ops.checks import fail
from custom_ops.form import NAMESPACE
from custom_ops.kernels.gluon import unsupported_reasons
from custom_ops.kernels.paged_config import PagedConfig, paged_config, resolve_shape_class
from custom_ops.kernels.specialise import architecture
from custom_ops.masks import Mask
from custom_ops.op import library
from custom_ops.paged.call import PagedCall, mask_of, no_none_for_a_list
from custom_ops.paged.checks import check_schedule


@dataclasses.dataclass(frozen=True, eq=False)
class ScheduleCall:
    """The arguments of ``torch.ops.lowered_attn.paged_schedule``; the letters are ``custom_ops.paged.call``'s."""

    cu_seqlens_q: Tensor
    context_lens: Tensor
    valid_lens: Tensor | None
    request_values: Sequence[Tensor]
    num_tokens: int
    """T, the rows of q."""
    num_heads: int
    """Hq."""
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: torch.dtype
    """Of q."""
    cache_dtype: torch.dtype
    direct: bool
    """Whether new keys are read from k and v."""
    mode: str = "causal"
    block_size: int = 1
    window: int = 0
    prefix_hole: bool = False
    layout: str = "unified"
    impl: str = "triton_grouped"
    shape_class: str = "auto"
    value_dim: int | None = None
    """Elements of a value where the cache holds latents, see ``PagedCall``."""

    def __post_init__(self) -> None:
        no_none_for_a_list(self)

    @classmethod
    def of(cls, call: PagedCall) -> ScheduleCall:
        """The call that makes the schedule of ``call``."""
        sizes = call.cache_sizes
        return cls(
            call.cu_seqlens_q, call.context_lens, call.valid_lens, call.request_values,
            num_tokens=call.q.shape[0],
            # Kernels are made for these: where shapes are symbolic, guarded on.
            num_heads=int(call.q.shape[1]),
            num_kv_heads=int(sizes.kv_heads),
            head_dim=int(sizes.head_dim),
            page_size=int(sizes.page_size),
            dtype=call.q.dtype,
            cache_dtype=call.k_cache.dtype,
            direct=call.direct,
            **{
                name: getattr(call, name)
                for name in (
                    "mode", "block_size", "window", "prefix_hole", "layout", "impl", "shape_class", "value_dim"
                )
            },
        )  # fmt: skip

    @property
    def requests(self) -> int:
        """R."""
        return self.context_lens.shape[0]

    @property
    def mask(self) -> Mask:
        """What the schedule cuts into tiles, that of the attention that follows."""
        return mask_of(self)

    @property
    def device(self) -> torch.device:
        return self.context_lens.device

    @property
    def size(self) -> int:
        """Elements of the schedule: 0 but on CUDA."""
        if self.device.type != "cuda":
            return 0
        return config_of(self).schedule_layout(self.requests, self.num_tokens).size


def config_of(call: ScheduleCall) -> PagedConfig:
    """How the kernels tile a call on its CUDA device, by its shapes, dtypes and names."""
    against_gluon = unsupported_reasons(
        architecture=architecture(call.device), impl=call.impl, dtype=call.dtype, cache_dtype=call.cache_dtype,
        group=call.num_heads // call.num_kv_heads, head_dim=call.head_dim, page_size=call.page_size,
        layout=call.layout, value_dim=call.value_dim,
    )  # fmt: skip
    return paged_config(
        architecture(call.device),
        torch.cuda.get_device_properties(call.device).multi_processor_count,
        call.impl,
        resolve_shape_class(call.shape_class, call.num_tokens, call.requests),
        call.dtype,
        call.cache_dtype,
        call.num_heads,
        call.num_kv_heads,
        call.head_dim,
        call.page_size,
        call.layout,
        gluon=not against_gluon,
        requests=call.requests,
        value_dim=call.value_dim,
    )


def check_schedule_of(call: PagedCall) -> None:
    """Raise ValueError where ``call.schedule`` cannot be of this call; CPUs do not read theirs."""
    if call.schedule is None or not call.q.is_cuda:
        return
    size = ScheduleCall.of(call).size
    if call.schedule.shape[0] != size:
        fail(
            call.op, "schedule", f"{size} elements", f"{call.schedule.shape[0]}",
            "pass what paged_schedule returned for the same sizes, dtypes, mode, impl and shape_class",
        )  # fmt: skip


def _check(call: ScheduleCall) -> None:
    arguments = dict(vars(call))
    del arguments["direct"]
    check_schedule(**arguments)


def _on_cpu(*arguments: Any, **keywords: Any) -> Tensor:
    call = ScheduleCall(*arguments, **keywords)
    _check(call)
    return _empty(call)


def _on_cuda(*arguments: Any, **keywords: Any) -> Tensor:
    from custom_ops.kernels import paged_launch

    call = ScheduleCall(*arguments, **keywords)
    _check(call)
    return paged_launch.schedule(call)


def _empty(call: ScheduleCall) -> Tensor:
    return call.context_lens.new_empty(call.size)


def _by_names(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run_by_names(*arguments: Any, dtype: str, cache_dtype: str, **keywords: Any) -> Tensor:
        return run(*arguments, dtype=getattr(torch, dtype), cache_dtype=getattr(torch, cache_dtype), **keywords)

    return run_by_names


_ARGUMENTS = (
    "(Tensor cu_seqlens_q, Tensor context_lens, Tensor? valid_lens, Tensor[]? request_values, *, "
    "SymInt num_tokens, int num_heads, int num_kv_heads, int head_dim, int page_size, ScalarType dtype, "
    "ScalarType cache_dtype, bool direct, str mode='causal', int block_size=1, int window=0, bool prefix_hole=False, "
    "str layout='unified', str impl='triton_grouped', str shape_class='auto', int? value_dim=None) -> Tensor"
)

for _name, _arguments, _on in (
    ("paged_schedule", _ARGUMENTS, lambda run: run),
    # Dtypes as "bfloat16": internal, for AOTInductor, whose calls from C++ get a ScalarType wrong in torch 2.11.
    ("paged_schedule_by_names", _ARGUMENTS.replace("ScalarType", "str"), _by_names),
):
    library.define(f"{_name}{_arguments}", tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(_name, _on(_on_cpu), "CPU")
    library.impl(_name, _on(_on_cuda), "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _on(_on_cpu), lib=library)
