"""Causal self-attention inside documents.

Sequences are packed side by side; a query at position ``q`` sees the keys of its own document at or before it::

    out[q] = sum_k softmax_k(scale * query[q] . key[k]) * value[k]
    over  k <= q  and  query_documents[q] == key_documents[k]  and not key_padding[k]

``query_documents`` int ``[B, Lq]`` and ``key_documents`` int ``[B, Lk]`` are ids: any integers, in any order. Where
there are as many queries as keys and no ``q_start``, both may be one tensor. Ids are read key by key, so tile bounds
are those of causal attention: tiles after the queries are skipped, tiles of earlier documents are visited and compared.

Source: Grattafiori et al., "The Llama 3 Herd of Models", section 3.2, https://arxiv.org/abs/2407.21783.

``torch.ops.lowered_attn.document_causal(q, k, v, query_documents, key_documents, key_padding=None, q_start=None, *,
scale=None, softcap=0.0) -> (out, lse)``
"""

from custom_ops.form import Form
from custom_ops.forms.document import KEY_DOCUMENTS, QUERY_DOCUMENTS, SAME_DOCUMENT
from custom_ops.masks import KEY_PADDING, Mask, k, q
from custom_ops.op import register

MASK = Mask(
    "document_causal", (k <= q) & SAME_DOCUMENT & ~KEY_PADDING.symbol, (QUERY_DOCUMENTS, KEY_DOCUMENTS, KEY_PADDING)
)

FORM = register(Form(mask=MASK, self_attention=True))
