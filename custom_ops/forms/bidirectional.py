"""Attention in both directions: every query sees every key.

::

    out[q] = sum_k softmax_k(scale * query[q] . key[k]) * value[k]
    over  all k  with  not key_padding[k]

Nothing depends on positions, so there may be any number of queries and of keys, and there is no ``q_start``: an
encoder's self-attention and a decoder's cross-attention are both this form. All tiles are full, but for the last keys.

Source: Vaswani et al., "Attention Is All You Need", section 3.2.3, https://arxiv.org/abs/1706.03762 (the encoder).

``torch.ops.lowered_attn.bidirectional(q, k, v, key_padding=None, *, scale=None, softcap=0.0) -> (out, lse)``
"""

from custom_ops.form import Form
from custom_ops.masks import KEY_PADDING, Mask
from custom_ops.op import register

MASK = Mask("bidirectional", ~KEY_PADDING.symbol, (KEY_PADDING,))

FORM = register(Form(mask=MASK, self_attention=False))
