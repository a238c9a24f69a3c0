"""Plain: every new token of a request sees all of its keys.

Query ``i`` of a request with ``context`` cached and ``valid`` real new tokens is at position ``q = context + i``::

    out[q] = sum_k softmax_k(scale * query[q] . key[k]) * value[k]
    over  k < context + valid

For what is denoised as a whole: every token of the new chunk sees the cache and the chunk. The cache is read in pages
in every mode: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention",
section 4.1, https://arxiv.org/abs/2309.06180. The bidirectional chunk is that of Nie et al., "Large Language Diffusion
Models", section 2, https://arxiv.org/abs/2502.09992.

    >>> from custom_ops.paged.masks import paged_mask
    >>> print(paged_mask("plain").draw_text(6, 10, {"context": 4, "valid": 5}, q_start=4))
    █████████·
    █████████·
    █████████·
    █████████·
    █████████·
    █████████·
"""

import sympy

from custom_ops.paged.masks.common import PagedMode

MODE = PagedMode("plain", sympy.true, doc="every key")
