"""Block-causal: a new token sees its own block to the end and all blocks before it.

Query ``i`` of a request with ``context`` cached and ``valid`` real new tokens is at position ``q = context + i``, and
blocks of ``block`` tokens are counted from the request's start::

    out[q] = sum_k softmax_k(scale * query[q] . key[k]) * value[k]
    over  k < (q // block + 1) * block  and  k < context + valid

Block diffusion: blocks follow one another, and the tokens of one are denoised together. Source: Arriola et al., "Block
Diffusion: Interpolating Between Autoregressive and Diffusion Language Models", section 3,
https://arxiv.org/abs/2503.09573. With ``block`` 1 it is ``causal``.

    >>> from custom_ops.paged.masks import paged_mask
    >>> print(paged_mask("block_causal", block_size=4).draw_text(7, 11, {"context": 4, "valid": 7}, q_start=4))
    ████████···
    ████████···
    ████████···
    ████████···
    ███████████
    ███████████
    ███████████
"""

from custom_ops.masks import k
from custom_ops.paged.masks.common import PagedMode, end_of_block

MODE = PagedMode("block_causal", k < end_of_block(), doc="the token's own block and the blocks before it")
