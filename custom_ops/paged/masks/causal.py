"""Causal: a new token sees the cache, itself and the new tokens before it.

Query ``i`` of a request with ``context`` cached and ``valid`` real new tokens is at position ``q = context + i``::

    out[q] = sum_k softmax_k(scale * query[q] . key[k]) * value[k]
    over  k <= q  and  k < context + valid

Autoregressive decoding (one new token), prefill in chunks, and checking of drafted tokens. Source: Kwon et al.,
"Efficient Memory Management for Large Language Model Serving with PagedAttention", section 4.1,
https://arxiv.org/abs/2309.06180.

    >>> from custom_ops.paged.masks import paged_mask
    >>> print(paged_mask("causal").draw_text(6, 10, {"context": 4, "valid": 6}, q_start=4))
    █████·····
    ██████····
    ███████···
    ████████··
    █████████·
    ██████████
"""

from custom_ops.masks import k, q
from custom_ops.paged.masks.common import PagedMode

MODE = PagedMode("causal", k <= q, doc="the token itself and those before it")
