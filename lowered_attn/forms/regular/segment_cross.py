"""Cross-attention from tokens to segments: a query sees its own segment and a few before it."""

from __future__ import annotations

from custom_ops.forms import FORMS
from lowered_attn.layers import ROPE_BASE, MultiHeadAttention, PreNormCross, cross_head_dim


class SegmentCross(PreNormCross):
    """Cross-attention sub-layer, ([B, Lq, q_dim], [B, Lk, kv_dim]) to [B, Lq, q_dim], over `segment_cross`.

    RMSNorm on both inputs, projections to `d_attn` = n_heads * head_dim, attention, output projection. No
    residual: the caller adds it, so that a padded query gives exactly 0. Query i of segment s =
    query_segments[i] sees keys s - lookback <= k <= s, one key a segment, that are not padded; a query that
    sees none gives 0. `head_dim`, when given, must equal d_attn // n_heads; `n_kv_heads` (default n_heads)
    divides n_heads.
    """

    def __init__(
        self,
        q_dim: int,
        kv_dim: int,
        d_attn: int,
        n_heads: int,
        lookback: int = 0,
        backend: str = "lowered",
        *,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_base: float = ROPE_BASE,
    ) -> None:
        head_dim = cross_head_dim("SegmentCross", q_dim, kv_dim, d_attn, n_heads, lookback, head_dim)
        attention = MultiHeadAttention(
            FORMS["segment_cross"], q_dim, kv_dim, n_heads, n_kv_heads, head_dim, backend, rope_base
        )
        super().__init__(q_dim, kv_dim, lookback, attention)
