"""Full causal self-attention.

A query at position ``q`` sees every key at or before it::

    out[q] = sum_k softmax_k(scale * query[q] . key[k]) * value[k]
    over  k <= q  and not key_padding[k]

Source: Vaswani et al., "Attention Is All You Need", section 3.2.3, https://arxiv.org/abs/1706.03762.

``torch.ops.lowered_attn.full_self(q, k, v, key_padding=None, q_start=None, *, scale=None, softcap=0.0) -> (out,
lse)``
"""

from custom_ops.form import Form
from custom_ops.masks import KEY_PADDING, Mask, k, q
from custom_ops.op import register

MASK = Mask("full_self", (k <= q) & ~KEY_PADDING.symbol, (KEY_PADDING,))

FORM = register(Form(mask=MASK, self_attention=True))
