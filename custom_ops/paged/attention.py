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

from custom_ops.paged.call import PagedCall
from custom_ops.paged.checks import check_attention
from custom_ops.paged.op import register_attention

_ARGUMENTS = (
    "(Tensor q, Tensor? k, Tensor? v, Tensor k_cache, Tensor v_cache, Tensor cu_seqlens_q, Tensor context_lens, "
    "Tensor page_tables, Tensor? valid_lens, Tensor[]? request_values, Tensor? schedule=None, Tensor? sinks=None, "
    "Tensor? k_scale=None, Tensor? v_scale=None, *, str mode='causal', int block_size=1, int window=0, "
    "bool prefix_hole=False, str layout='unified', float softcap=0.0, float? scale=None, str impl='triton_grouped', "
    "str shape_class='auto')"
)


def _checked_call(op: str, *arguments: Any, **keywords: Any) -> PagedCall:
    call = PagedCall(*arguments, **keywords)
    check_attention(call, op)
    return call


register_attention("paged_attention", _ARGUMENTS, _checked_call)
