"""Causal self-attention over a sliding window.

A query at position ``q`` sees the ``window`` latest keys, its own included::

    out[q] = sum_k softmax_k(scale * query[q] . key[k]) * value[k]
    over  k <= q  and  q - k < window  and not key_padding[k]

Source: Beltagy et al., "Longformer", section 3.1, https://arxiv.org/abs/2004.05150; the causal window of Jiang et
al., "Mistral 7B", section 2, https://arxiv.org/abs/2310.06825.

``torch.ops.lowered_attn.sliding_self(q, k, v, window, key_padding=None, q_start=None, *, scale=None, softcap=0.0)
-> (out, lse)``
"""

from custom_ops.form import Form
from custom_ops.masks import KEY_PADDING, Mask, int_operand, k, q
from custom_ops.op import register

WINDOW = int_operand("window", minimum=1)

MASK = Mask("sliding_self", (k <= q) & (q - k < WINDOW.symbol) & ~KEY_PADDING.symbol, (WINDOW, KEY_PADDING))

FORM = register(Form(mask=MASK, self_attention=True))
