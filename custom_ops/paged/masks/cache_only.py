"""Cache only: a new token sees the cached keys and no new one, not even its own.

Query ``i`` of a request with ``context`` cached tokens is at position ``q = context + i``::

    out[q] = sum_k softmax_k(scale * query[q] . key[k]) * value[k]
    over  k < context

The cached half of an attention whose other half, over keys that are not cached, is computed elsewhere: the two are
joined by their log-sum-exps, as in Ye et al., "FlashInfer", https://arxiv.org/abs/2501.01005. A request
with nothing cached gets 0, with log-sum-exp -inf.

    >>> from custom_ops.paged.masks import paged_mask
    >>> print(paged_mask("cache_only").draw_text(3, 7, {"context": 4, "valid": 3}, q_start=4))
    ████···
    ████···
    ████···
"""

from custom_ops.masks import k
from custom_ops.paged.masks.common import CONTEXT, PagedMode

MODE = PagedMode("cache_only", k < CONTEXT.symbol, doc="the cached keys, no new ones")
