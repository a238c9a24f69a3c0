"""``lowered_attn::attention_with_epilogue``: attention and what is computed elementwise from its output, in one op.

Internal, as the grouped ops are: a compiler pass makes it where the Hopper kernel would be called anyway.

It takes the arguments of ``grouped_attention``, an epilogue (see ``custom_ops/epilogue.py``) and its extra, where it
reads one: ``[B, Hq, Lq, Dv]`` in q's dtype. It gives ``result [B, Hq, Lq, Dv]``, token-major in memory, in q's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from custom_ops import epilogue as epilogues
from custom_ops.epilogue import Epilogue
from custom_ops.form import NAMESPACE, Slots, empty_outputs
from custom_ops.forms import FORMS
from custom_ops.op import kernels_for, library, refuse_gradients

NAME = "attention_with_epilogue"
library.define(
    f"{NAME}(Tensor q, Tensor k, Tensor v, Tensor? key_padding, Tensor? q_start, Tensor? query_value, "
    "Tensor? key_value, Tensor? request_value, str form, SymInt[]? ints, float scale, float softcap, str epilogue, "
    "Tensor? extra) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def check_epilogue(epilogue: Epilogue, query: Tensor, value: Tensor, extra: Tensor | None) -> None:
    """Raise ValueError where an epilogue, or the extra, is none of this call's."""
    if epilogue.dtype != query.dtype:
        raise ValueError(f"epilogue: expected a cast to q's dtype {query.dtype} at the end, got {epilogue}")
    if (extra is not None) != epilogue.reads_extra:
        expected, got = ("a tensor", "none") if epilogue.reads_extra else ("none", "a tensor")
        raise ValueError(f"extra: expected {expected}, as {epilogue} reads it, got {got}")
    if extra is None:
        return
    sizes = (*query.shape[:3], value.shape[3])
    if extra.shape != sizes or extra.dtype != query.dtype or extra.device != query.device:
        raise ValueError(
            f"extra: expected [B, Hq, Lq, Dv] {list(sizes)} of {query.dtype} on {query.device}, as attention's output "
            f"is, got {list(extra.shape)} of {extra.dtype} on {extra.device}; leave others outside of the epilogue"
        )


def _run(
    q: Tensor, k: Tensor, v: Tensor,
    key_padding: Tensor | None, q_start: Tensor | None, query_value: Tensor | None, key_value: Tensor | None,
    request_value: Tensor | None, form: str, ints: Sequence[int] | None, scale: float, softcap: float,
    epilogue: str, extra: Tensor | None,
) -> Tensor:  # fmt: skip
    parsed = epilogues.parse(epilogue)
    check_epilogue(parsed, q, v, extra)
    slots = Slots(key_padding, q_start, query_value, key_value, request_value, tuple(ints or ()))
    if q.is_cuda:
        from custom_ops.kernels import launch

        result = launch.forward_with_epilogue(FORMS[form], q, k, v, slots, scale, softcap, parsed, extra)
        if result is not None:
            return result
    out, _ = kernels_for(q.device).forward(FORMS[form], q, k, v, slots, scale, softcap)
    return out.copy_(epilogues.apply(parsed, out, extra))


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    check_epilogue(epilogues.parse(rest[-2]), q, v, rest[-1])
    return empty_outputs(q, v)[0]


library.impl(NAME, _run, "CPU")
library.impl(NAME, _run, "CUDA")
torch.library.register_fake(f"{NAMESPACE}::{NAME}", _fake, lib=library)
torch.library.register_autograd(
    f"{NAMESPACE}::{NAME}",
    refuse_gradients(NAME, "call the form op: compiler passes make this one after autograd"),
    lib=library,
)
OP = torch.ops.lowered_attn.attention_with_epilogue.default
