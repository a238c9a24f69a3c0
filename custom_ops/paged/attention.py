"""``torch.ops.lowered_attn.paged_attention``: attention of new tokens over a paged cache, many requests at once.

Of request r (letters in ``custom_ops.paged.call``), query ``i`` is at position ``a = c + i`` and sees what its mode
says of the keys ``b < c + n_valid`` (``custom_ops.paged.masks``)::

    s[b] = scale * q[a] . key[b],  softcap * tanh(s / softcap) where there is a cap
    out  = sum_b exp(s[b] - lse) * value[b],   lse = log(sum_b exp(s[b]) + exp(sink) where there are sinks)

Keys at ``b < c`` lie in the cache, where the page table says; new keys are rows of k and v, or lie in the cache too
where k and v are None. Rows that see nothing, rows ``i >= n_valid`` and rows past ``cu_seqlens_q[-1]`` return 0 with
lse -inf. What no row sees never reaches an output, be it NaN, and page ids past a request's length are never read.

The mechanism is that of Kwon et al., "Efficient Memory Management for Large Language Model Serving with
PagedAttention", https://arxiv.org/abs/2309.06180.

Inference only. No FLOP formula: lengths live on the device, a formula sees shapes alone, and a page table's capacity
says next to nothing about what is in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from custom_ops.form import NAMESPACE
from custom_ops.op import library, refuse_gradients
from custom_ops.paged.call import PagedCall, empty_outputs
from custom_ops.paged.checks import check_attention
from custom_ops.paged.schedule import check_schedule_of

_ARGUMENTS = (
    "(Tensor q, Tensor? k, Tensor? v, Tensor k_cache, Tensor v_cache, Tensor cu_seqlens_q, Tensor context_lens, "
    "Tensor page_tables, Tensor? valid_lens, Tensor[] request_values, Tensor? schedule=None, Tensor? sinks=None, "
    "Tensor? k_scale=None, Tensor? v_scale=None, *, str mode='causal', int block_size=1, int window=0, "
    "bool prefix_hole=False, str layout='unified', float softcap=0.0, float? scale=None, str impl='triton_grouped', "
    "str shape_class='auto')"
)


def _on_cpu(*arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
    from custom_ops.paged import cpu

    call = PagedCall(*arguments, **keywords)
    check_attention(call)
    return cpu.attention(call)


def _on_cuda(*arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
    from custom_ops.kernels import paged_launch

    call = PagedCall(*arguments, **keywords)
    check_attention(call)
    check_schedule_of(call)
    return paged_launch.attention(call)


def _fake(*arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
    call = PagedCall(*arguments, **keywords)
    check_attention(call)
    check_schedule_of(call)
    return empty_outputs(call.q)


def _reference(*arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
    from custom_ops.paged.reference import reference_paged_attention

    out, lse = reference_paged_attention(*arguments, **keywords)
    return out, lse


def _reference_fake(*arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
    call = PagedCall(*arguments, **keywords)
    check_attention(call, "paged_attention_reference")
    return empty_outputs(call.q)


for _name, _cpu, _cuda, _of_shapes in (
    ("paged_attention", _on_cpu, _on_cuda, _fake),
    # The reference as an op of its own, so that graphs hold it whole: it reads lengths on the host.
    ("paged_attention_reference", _reference, _reference, _reference_fake),
):
    library.define(f"{_name}{_ARGUMENTS} -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(_name, _cpu, "CPU")
    library.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _of_shapes, lib=library)
    _refuse = refuse_gradients(_name, "paged attention serves: run it under torch.no_grad(), or train with a form op")
    torch.library.register_autograd(f"{NAMESPACE}::{_name}", _refuse, lib=library)
