"""Prefix-full: while prefilling, the prefix (a prompt) sees all of itself; what follows is block-causal.

Query ``i`` of a request with ``context`` cached and ``valid`` real new tokens is at position ``q = context + i``. The
first ``prefix`` new tokens are the prompt, which is padded to ``padded_prefix`` tokens, a whole number of blocks::

    out[q] = sum_k softmax_k(scale * query[q] . key[k]) * value[k]
    over  k < context + valid  and
          k < context + prefix           while prefilling, where i < prefix
          k < context + padded_prefix    while prefilling, where prefix <= i < padded_prefix
          k < (q // block + 1) * block   elsewhere, and while decoding

``status`` is 0 while prefilling and 1 while decoding. Source: block diffusion (Arriola et al., section 3,
https://arxiv.org/abs/2503.09573) after a prompt that is seen both ways, the prefix language model of Raffel et al.,
"T5", section 3.2.1, https://arxiv.org/abs/1910.10683.

    >>> from custom_ops.paged.masks import paged_mask
    >>> request = {"context": 0, "valid": 8, "status": 0, "prefix": 3, "padded_prefix": 4}
    >>> print(paged_mask("prefix_full", block_size=2).draw_text(8, 8, request))
    ███·····
    ███·····
    ███·····
    ████····
    ██████··
    ██████··
    ████████
    ████████
"""

from sympy import Max

from custom_ops.masks import k
from custom_ops.paged.masks.common import (
    CONTEXT,
    DECODING,
    FAR,
    PADDED_PREFIX,
    PREFIX,
    STATUS,
    PagedMode,
    end_of_block,
    from_query,
)

# While decoding, both ends are far before the first key, and every query is past them.
_prefix_end = CONTEXT.symbol + PREFIX.symbol - FAR * DECODING
_padded_end = CONTEXT.symbol + PADDED_PREFIX.symbol - FAR * DECODING
_end = Max(_prefix_end, from_query(_prefix_end, _padded_end), from_query(_padded_end, end_of_block()))

MODE = PagedMode(
    "prefix_full",
    k < _end,
    (STATUS, PREFIX, PADDED_PREFIX),
    doc="prefilling: the prefix sees the prefix, its padding sees both, the rest is block-causal, as decoding is",
)
