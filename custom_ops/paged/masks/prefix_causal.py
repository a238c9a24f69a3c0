"""Prefix-causal: causal while the request is prefilling, block-causal while it is decoding.

Query ``i`` of a request with ``context`` cached and ``valid`` real new tokens is at position ``q = context + i``::

    out[q] = sum_k softmax_k(scale * query[q] . key[k]) * value[k]
    over  k < context + valid  and
          k <= q                         while prefilling (status 0)
          k < (q // block + 1) * block   while decoding (status 1)

Models that were autoregressive and were taught to denoise blocks keep the causal prompt: block diffusion (Arriola et
al., section 3, https://arxiv.org/abs/2503.09573) after a causal prefill.

    >>> from custom_ops.paged.masks import paged_mask
    >>> mask = paged_mask("prefix_causal", block_size=4)
    >>> print(mask.draw_text(4, 8, {"context": 4, "valid": 4, "status": 0}, q_start=4))
    █████···
    ██████··
    ███████·
    ████████
    >>> print(mask.draw_text(4, 8, {"context": 4, "valid": 4, "status": 1}, q_start=4))
    ████████
    ████████
    ████████
    ████████
"""

from sympy import Max

from custom_ops.masks import k, q
from custom_ops.paged.masks.common import DECODING, STATUS, PagedMode, end_of_block, where

MODE = PagedMode(
    "prefix_causal",
    k < Max(q + 1, where(DECODING, end_of_block())),
    (STATUS,),
    doc="prefilling: causal; decoding: block-causal",
)
