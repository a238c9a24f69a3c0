"""The grouped ops: every form in one normal form, by slot instead of by operand name.

Compiler passes rewrite form ops to ``lowered_attn::grouped_attention``, so that one lowering and one template serve
all forms; all query heads of one KV head share a tile there. Every form's autograd calls
``lowered_attn::attention_backward``. Both take the operands of ``custom_ops.form.Slots`` and the form's name. They
are internal: users call the form ops.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from custom_ops import flops
from custom_ops.form import NAMESPACE, Slots, empty_gradients, empty_outputs
from custom_ops.forms import FORMS
from custom_ops.op import kernels_for, library, refuse_gradients

_SLOTS = (
    "Tensor? key_padding, Tensor? q_start, Tensor? query_value, Tensor? key_value, Tensor? request_value, "
    "str form, SymInt[]? ints, float scale, float softcap=0.0"
)
# An empty list arrives as None where AOTInductor's C++ calls the op, so None is allowed for ints.

library.define(
    f"grouped_attention(Tensor q, Tensor k, Tensor v, {_SLOTS}) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    "attention_backward(Tensor? grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_SLOTS}) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _forward(
    q: Tensor, k: Tensor, v: Tensor,
    key_padding: Tensor | None, q_start: Tensor | None, query_value: Tensor | None, key_value: Tensor | None,
    request_value: Tensor | None, form: str, ints: Sequence[int] | None, scale: float, softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    slots = Slots(key_padding, q_start, query_value, key_value, request_value, tuple(ints or ()))
    return kernels_for(q.device).forward(FORMS[form], q, k, v, slots, scale, softcap)


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *slots: object) -> tuple[Tensor, Tensor]:
    return empty_outputs(q, v)


def _backward(
    grad_out: Tensor | None, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    key_padding: Tensor | None, q_start: Tensor | None, query_value: Tensor | None, key_value: Tensor | None,
    request_value: Tensor | None, form: str, ints: Sequence[int] | None, scale: float, softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    slots = Slots(key_padding, q_start, query_value, key_value, request_value, tuple(ints or ()))
    return kernels_for(q.device).backward(FORMS[form], grad_out, grad_lse, q, k, v, out, lse, slots, scale, softcap)


def _backward_fake(
    grad_out: Tensor | None, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(q, k, v)


for _name, _run, _fake, _instead in (
    ("grouped_attention", _forward, _forward_fake, "call the form op: compiler passes make this one after autograd"),
    ("attention_backward", _backward, _backward_fake, "there is no second derivative: backend='reference' has one"),
):
    library.impl(_name, _run, "CPU")
    library.impl(_name, _run, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake, lib=library)
    torch.library.register_autograd(f"{NAMESPACE}::{_name}", refuse_gradients(_name, _instead), lib=library)

flops.register_grouped_when_counted(FORMS)
