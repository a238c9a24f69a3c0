"""The op of a form in ``torch.ops.lowered_attn``, made whole from the form's mask.

Every form becomes one op ``(q, k, v, <operands>, *, scale=None, softcap=0.0) -> (out, lse)`` with a fake
implementation, CPU and CUDA kernels, an explicit backward, autocast and a FLOP formula. ``register`` makes it.

q is ``[B, Hq, Lq, D]``, k ``[B, Hkv, Lk, D]``, v ``[B, Hv, Lk, Dv]``, out ``[B, Hq, Lq, Dv]`` and lse ``[B, Hq, Lq]``.
Hkv divides Hq and Hv divides Hkv: query head h has KV head ``h // (Hq / Hkv)``, which has value head
``kv_head // (Hkv / Hv)``. Where heads share their values (a latent: Hv 1, Dv up to 512), nothing is copied a head.
With a soft-cap, a score ``s``, scaled, becomes ``softcap * tanh(s / softcap)`` before the softmax.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from custom_ops import cpu, flops
from custom_ops.checks import check_kernels
from custom_ops.form import NAMESPACE, Form, default_scale, empty_outputs
from custom_ops.masks import OperandValue

library = torch.library.Library(NAMESPACE, "FRAGMENT")


def register(form: Form) -> Form:
    """Define ``torch.ops.lowered_attn.<form.name>`` whole. Returns ``form``."""
    qualified = f"{NAMESPACE}::{form.name}"
    library.define(f"{form.name}{form.schema}", tags=(torch.Tag.pt2_compliant_tag,))

    names = form.operand_names

    def bind(arguments: tuple[OperandValue, ...]) -> dict[str, OperandValue]:
        missing = (None,) * (len(names) - len(arguments))  # the dispatcher drops trailing defaults
        return dict(zip(names, arguments + missing, strict=True))

    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *arguments: OperandValue,
        scale: float | None = None,
        softcap: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        operands = bind(arguments)
        form.check(query, key, value, operands, scale, softcap)
        check_kernels(form, query)
        return kernels_for(query.device).forward(
            form, query, key, value, form.slots(operands), default_scale(query, scale), softcap
        )

    def fake(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *arguments: OperandValue,
        scale: float | None = None,
        softcap: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        form.check(query, key, value, bind(arguments), scale, softcap)
        check_kernels(form, query)
        return empty_outputs(query, value)

    def setup_context(ctx: Any, inputs: tuple, keyword_only_inputs: dict, output: tuple[Tensor, Tensor]) -> None:
        query, key, value, *arguments = inputs
        slots = form.slots(bind(tuple(arguments)))
        ctx.save_for_backward(query, key, value, *output, *slots[:-1])
        ctx.ints = slots.ints
        ctx.scale = keyword_only_inputs.get("scale")
        ctx.softcap = keyword_only_inputs.get("softcap", 0.0)
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        no_gradients = (None,) * len(form.operands)
        if grad_out is None and grad_lse is None:
            return None, None, None, *no_gradients
        query, key, value, out, lse, *tensors = ctx.saved_tensors
        gradients = torch.ops.lowered_attn.attention_backward(
            grad_out,
            grad_lse,
            query,
            key,
            value,
            out,
            lse,
            *tensors,
            form.name,
            ctx.ints,
            default_scale(query, ctx.scale),
            ctx.softcap,
        )
        return *gradients, *no_gradients

    library.impl(form.name, run, "CPU")
    library.impl(form.name, run, "CUDA")
    torch.library.register_fake(qualified, fake, lib=library)
    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=library)
    for device_type in ("cpu", "cuda"):
        library.impl(form.name, _autocast(form, device_type), f"Autocast{device_type.upper()}")
    flops.register_when_counted(form)
    return form


def refuse_gradients(name: str, instead: str) -> Callable[..., NoReturn]:
    """A backward that raises: without one, autograd would trace the kernels' own Python and give wrong gradients."""

    def backward(ctx: object, *grads: object) -> NoReturn:
        raise RuntimeError(f"{NAMESPACE}::{name}: expected no gradient through this op, got one; {instead}")

    return backward


def kernels_for(device: torch.device) -> Any:
    """The module with ``forward`` and ``backward`` for tensors on ``device``.

    CUDA's is imported at its first call, with triton.
    """
    return _cuda_kernels() if device.type == "cuda" else cpu


@functools.cache
def _cuda_kernels() -> Any:
    from custom_ops.kernels import launch

    return launch


@functools.cache
def _autocast(form: Form, device_type: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Cast q, k and v to autocast's dtype, then call the op below autocast."""
    below = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device_type.upper()}"))

    def cast(
        query: Tensor, key: Tensor, value: Tensor, *arguments: OperandValue, **keywords: Any
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(below):
            q, k, v = (
                t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in (query, key, value)
            )
            return form.op(q, k, v, *arguments, **keywords)

    return cast
