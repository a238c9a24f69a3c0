"""Causal self-attention that begins at a key of each query's own.

A query at position ``q`` sees the keys from its start through its own::

    out[q] = sum_k softmax_k(scale * query[q] . key[k]) * value[k]
    over  query_starts[q] <= k <= q  and  not key_padding[k]

``query_starts`` int ``[B, Lq]`` are positions of keys. Sequences that are packed side by side start at their first
token, windows of any width at the oldest key that they reach, chunks at their first token; where several hold, at the
largest of these. A start past the query leaves nothing to see: such a row returns 0. Starts are bounded by their
minimum and maximum over a tile of queries, so that tiles of keys before a packed sequence are skipped; comparing ids
(``document_causal``) skips none of them.

Source: Krell et al., "Efficient Sequence Packing without Cross-contamination", section 3.2.3,
https://arxiv.org/abs/2107.02027, made causal.

``torch.ops.lowered_attn.causal_from(q, k, v, query_starts, key_padding=None, q_start=None, *, scale=None, softcap=0.0)
-> (out, lse)``
"""

from custom_ops.form import Form
from custom_ops.masks import KEY_PADDING, Mask, k, q, query_operand
from custom_ops.op import register

QUERY_STARTS = query_operand("query_starts")

MASK = Mask("causal_from", (k <= q) & (k >= QUERY_STARTS.symbol) & ~KEY_PADDING.symbol, (QUERY_STARTS, KEY_PADDING))

FORM = register(Form(mask=MASK, self_attention=True))
