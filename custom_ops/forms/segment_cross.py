"""Cross-attention from tokens to segments, one key a segment.

Query ``i`` belongs to segment ``s = query_segments[i]`` and sees that segment's key and those of the ``lookback``
segments before it::

    out[i] = sum_k softmax_k(scale * query[i] . key[k]) * value[k]
    over  s - lookback <= k <= s  and not key_padding[k]

A query whose segment is negative, or past the last key by more than ``lookback``, sees nothing and returns 0. The
tokens-to-patches direction of Pagnoni et al., "Byte Latent Transformer", section 3.3,
https://arxiv.org/abs/2412.09871, with a lookback.

``torch.ops.lowered_attn.segment_cross(q, k, v, query_segments, lookback, key_padding=None, *, scale=None,
softcap=0.0) -> (out, lse)``
"""

from custom_ops.form import Form
from custom_ops.masks import KEY_PADDING, Mask, int_operand, k, query_operand
from custom_ops.op import register

QUERY_SEGMENTS = query_operand("query_segments")
LOOKBACK = int_operand("lookback", minimum=0)

MASK = Mask(
    "segment_cross",
    (k >= QUERY_SEGMENTS.symbol - LOOKBACK.symbol) & (k <= QUERY_SEGMENTS.symbol) & ~KEY_PADDING.symbol,
    (QUERY_SEGMENTS, LOOKBACK, KEY_PADDING),
)

FORM = register(Form(mask=MASK, self_attention=False))
