"""Cross-attention from tokens to the latents of segments: a query sees its own segment and a few before it."""

from __future__ import annotations

from torch import Tensor

from custom_ops.forms import FORMS
from lowered_attn.forms.mla.cache import LatentCache
from lowered_attn.forms.mla.latent import Absorbable, LatentSizes, MultiHeadLatentAttention
from lowered_attn.layers import ROPE_BASE, PreNormCross, cleared, cross_head_dim


class SegmentCross(Absorbable, PreNormCross):
    """Cross-attention sub-layer, ([B, Lq, q_dim], [B, Lk, kv_dim]) to [B, Lq, q_dim], over `segment_cross`.

    RMSNorm on both inputs, latent attention, output projection; no residual: the caller adds it, so that a padded
    query gives exactly 0. Query i of segment s = query_segments[i] sees keys s - lookback <= k <= s, one key a segment,
    that are not padded; a query that sees none gives 0. `head_dim`, when given, must equal d_attn // n_heads; the other
    arguments are FullSelf's, and `retr_dim` may be odd where no positions are given.
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
        head_dim: int | None = None,
        kv_comp_dim: int | None = None,
        q_comp_dim: int | None = None,
        retr_dim: int | None = None,
        rope_base: float = ROPE_BASE,
    ) -> None:
        where = "SegmentCross"
        head_dim = cross_head_dim(where, q_dim, kv_dim, d_attn, n_heads, lookback, head_dim)
        sizes = LatentSizes.of(where, n_heads, head_dim, kv_comp_dim, q_comp_dim, retr_dim)
        attention = MultiHeadLatentAttention(FORMS["segment_cross"], q_dim, kv_dim, sizes, backend, rope_base)
        super().__init__(q_dim, kv_dim, lookback, attention)

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
        cache: LatentCache | None = None,
    ) -> Tensor:
        """Return [B, Lq, q_dim] for queries q [B, Lq, q_dim] and one key a segment, kv [B, Lk, kv_dim].

        The arguments are the regular SegmentCross's. With a cache (see `make_cache`; positions=True where keys have
        positions), kv, key_padding and key_positions are those of the segments that come next, which may be none
        (Lk = 0): their latents are appended, and the queries attend to all stored ones, query_segments counting from
        the stream's first. ValueError where a shape or dtype does not fit, or the cache is full.
        """
        if cache is None:
            return super().forward(
                q,
                kv,
                query_segments=query_segments,
                key_padding=key_padding,
                query_positions=query_positions,
                key_positions=key_positions,
                query_padding=query_padding,
            )
        self._check(q, kv, query_positions, key_positions, query_padding)
        cache.append(self.attention.kv_down(self.kv_norm(kv)), key_padding, key_positions)
        operands = {"query_segments": query_segments, "lookback": self.lookback, "key_padding": cache.key_padding}
        out = self.attention.attend(self.q_norm(q), cache.data, operands, query_positions, cache.positions)
        return cleared(out, query_padding)  # no gradient here, so padded queries need no clearing before
