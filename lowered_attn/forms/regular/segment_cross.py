"""Cross-attention from tokens to segments: a query sees its own segment and a few before it."""

from __future__ import annotations

from torch import Tensor, nn

from custom_ops.forms import FORMS
from lowered_attn.checks import check_int, check_per_token, check_tokens, divide_heads, fail
from lowered_attn.layers import NORM_EPS, ROPE_BASE, MultiHeadAttention


class SegmentCross(nn.Module):
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
        super().__init__()
        where = "SegmentCross"
        sizes = {"q_dim": q_dim, "kv_dim": kv_dim, "d_attn": d_attn, "n_heads": n_heads}
        for name, value in sizes.items():
            check_int(where, name, value, 1)
        check_int(where, "lookback", lookback, 0)
        divided = divide_heads(where, "d_attn", d_attn, n_heads)
        if head_dim not in (None, divided):
            fail(
                where,
                "head_dim",
                f"d_attn // n_heads = {divided}",
                head_dim,
                "leave it out, or change d_attn",
            )
        self.q_dim = q_dim
        self.kv_dim = kv_dim
        self.lookback = lookback
        self.q_norm = nn.RMSNorm(q_dim, eps=NORM_EPS)
        self.kv_norm = nn.RMSNorm(kv_dim, eps=NORM_EPS)
        self.attention = MultiHeadAttention(
            FORMS["segment_cross"], q_dim, kv_dim, n_heads, n_kv_heads, divided, backend, rope_base
        )

    def extra_repr(self) -> str:
        """Show the lookback."""
        return f"lookback={self.lookback}"

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        *,
        query_segments: Tensor,
        key_padding: Tensor | None = None,
        query_positions: Tensor | None = None,
        key_positions: Tensor | None = None,
        query_padding: Tensor | None = None,
    ) -> Tensor:
        """Return [B, Lq, q_dim] for queries q [B, Lq, q_dim] and one key a segment, kv [B, Lk, kv_dim].

        query_segments int [B, Lq]: the segment of each query, an index into kv. key_padding bool [B, Lk],
        True = hidden. query_positions [B, Lq] and key_positions [B, Lk], in one unit, feed RoPE (which needs
        an even head dim); without both there is no RoPE, and one without the other is an error. query_padding
        bool [B, Lq], True = a padded query: its output is exactly 0, and whatever it holds, NaN too, reaches
        no output and no gradient. ValueError where a shape or dtype does not fit.
        """
        where = "SegmentCross"
        check_tokens(where, "q", q, self.q_dim, "q_dim")
        check_tokens(where, "kv", kv, self.kv_dim, "kv_dim")
        if (query_positions is None) != (key_positions is None):
            given, missing = ("query_positions", "key_positions")
            if query_positions is None:
                given, missing = missing, given
            fail(where, missing, f"positions, since {given} is given", None, f"pass both, or leave out {given}")
        if query_positions is not None and key_positions is not None:
            check_per_token(where, "query_positions", query_positions, q, "q")
            check_per_token(where, "key_positions", key_positions, kv, "kv")
        if query_padding is not None:
            check_per_token(where, "query_padding", query_padding, q, "q")
            # Cleared before as well as after: 0 * NaN is NaN in the gradients of the weights. The segments
            # stay as they are, since a -1 there would widen its whole tile's range of keys.
            q = q.masked_fill(query_padding.unsqueeze(-1), 0)
        operands = {"query_segments": query_segments, "lookback": self.lookback, "key_padding": key_padding}
        out = self.attention(self.q_norm(q), self.kv_norm(kv), operands, query_positions, key_positions)
        return out if query_padding is None else out.masked_fill(query_padding.unsqueeze(-1), 0)
