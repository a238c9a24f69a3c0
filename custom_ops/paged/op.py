"""What every op of attention over a paged cache is made of: kernels by device, fakes, a reference twin, no gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from custom_ops.form import NAMESPACE
from custom_ops.op import library, refuse_gradients
from custom_ops.paged.call import PagedCall, empty_outputs
from custom_ops.paged.schedule import check_schedule_of


def register_attention(name: str, arguments: str, checked_call: Callable[..., PagedCall]) -> None:
    """Define ``torch.ops.lowered_attn.<name>`` and its twin ``<name>_reference``, which graphs hold whole.

    ``arguments``: the schema's, in parentheses. ``checked_call(op, *arguments, **keywords)`` makes the call that they
    describe, or raises the ValueError of the op ``op``.
    """
    reference_name = f"{name}_reference"

    def on_cpu(*arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
        from custom_ops.paged import cpu

        return cpu.attention(checked_call(name, *arguments, **keywords))

    def on_cuda(*arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
        from custom_ops.kernels import paged_launch

        call = checked_call(name, *arguments, **keywords)
        check_schedule_of(call)
        return paged_launch.attention(call)

    def fake(*arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
        call = checked_call(name, *arguments, **keywords)
        check_schedule_of(call)
        return empty_outputs(call)

    def reference(*arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
        from custom_ops.paged.reference import reference_attention_of

        return reference_attention_of(checked_call(reference_name, *arguments, **keywords))

    def reference_fake(*arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
        return empty_outputs(checked_call(reference_name, *arguments, **keywords))

    for op, cpu, cuda, of_shapes in (
        (name, on_cpu, on_cuda, fake),
        # An op of its own, so that graphs hold it whole: it reads lengths on the host.
        (reference_name, reference, reference, reference_fake),
    ):
        library.define(f"{op}{arguments} -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(op, cpu, "CPU")
        library.impl(op, cuda, "CUDA")
        torch.library.register_fake(f"{NAMESPACE}::{op}", of_shapes, lib=library)
        refuse = refuse_gradients(op, "paged attention serves: run it under torch.no_grad(), or train with a form op")
        torch.library.register_autograd(f"{NAMESPACE}::{op}", refuse, lib=library)
