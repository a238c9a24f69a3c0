"""Self-attention in both directions over a prefix, and causal after it.

A query at position ``q`` sees every key of its request's prefix, and every key at or before it::

    out[q] = sum_k softmax_k(scale * query[q] . key[k]) * value[k]
    over  (k <= q or k < prefix_lens)  and not key_padding[k]

``prefix_lens`` int32 ``[B]`` counts the keys of each request's prefix; 0 is causal attention.

Source: Raffel et al., "Exploring the Limits of Transfer Learning", section 3.2.1, https://arxiv.org/abs/1910.10683.

``torch.ops.lowered_attn.prefix_lm(q, k, v, prefix_lens, key_padding=None, q_start=None, *, scale=None, softcap=0.0) ->
(out, lse)``
"""

from custom_ops.form import Form
from custom_ops.masks import KEY_PADDING, Mask, k, q, request_operand
from custom_ops.op import register

PREFIX_LENS = request_operand("prefix_lens")

MASK = Mask("prefix_lm", ((k <= q) | (k < PREFIX_LENS.symbol)) & ~KEY_PADDING.symbol, (PREFIX_LENS, KEY_PADDING))

FORM = register(Form(mask=MASK, self_attention=True))
