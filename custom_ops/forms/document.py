"""Attention inside documents, in both directions.

Sequences are packed side by side; a query sees the keys of its own document, before and after it::

    out[i] = sum_k softmax_k(scale * query[i] . key[k]) * value[k]
    over  query_documents[i] == key_documents[k]  and not key_padding[k]

``query_documents`` int ``[B, Lq]`` and ``key_documents`` int ``[B, Lk]`` are ids: any integers, in any order, and a
query whose id no key has sees nothing and returns 0. Nothing depends on positions, so queries and keys may differ in
number. Ids are read key by key, so tile bounds leave every tile in: each is visited and compared, none is skipped
(``document_causal`` skips what lies after its queries).

Source: Krell et al., "Efficient Sequence Packing without Cross-contamination", section 3.2,
https://arxiv.org/abs/2107.02027.

``torch.ops.lowered_attn.document(q, k, v, query_documents, key_documents, key_padding=None, *, scale=None,
softcap=0.0) -> (out, lse)``
"""

import sympy

from custom_ops.form import Form
from custom_ops.masks import KEY_PADDING, Mask, key_operand, query_operand
from custom_ops.op import register

QUERY_DOCUMENTS = query_operand("query_documents")
KEY_DOCUMENTS = key_operand("key_documents")
SAME_DOCUMENT = sympy.Eq(QUERY_DOCUMENTS.symbol, KEY_DOCUMENTS.symbol)

MASK = Mask("document", SAME_DOCUMENT & ~KEY_PADDING.symbol, (QUERY_DOCUMENTS, KEY_DOCUMENTS, KEY_PADDING))

FORM = register(Form(mask=MASK, self_attention=False))
