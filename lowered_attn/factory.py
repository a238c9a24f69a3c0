"""Build a block of the form, on the backend and with the sizes that an AttentionConfig names."""

from __future__ import annotations

from torch import nn

from lowered_attn.checks import fail
from lowered_attn.config import AttentionConfig
from lowered_attn.forms import FAMILIES


def make_full_self_block(
    dim: int, num_heads: int, ffn_dim_multiplier: int = 4, cfg: AttentionConfig | None = None
) -> nn.Module:
    """Return a pre-norm block [B, S, dim] to [B, S, dim] with full causal self-attention."""
    cfg = cfg or AttentionConfig()
    build = FAMILIES[cfg.form].full_self
    return build(dim, num_heads, ffn_dim_multiplier, backend=cfg.backend, **cfg.options())


def make_sliding_self_block(
    dim: int,
    num_heads: int,
    window_size: int,
    ffn_dim_multiplier: int = 4,
    cfg: AttentionConfig | None = None,
) -> nn.Module:
    """Return a pre-norm block [B, S, dim] to [B, S, dim] where a token sees the window_size latest."""
    cfg = cfg or AttentionConfig()
    build = FAMILIES[cfg.form].sliding_self
    return build(dim, num_heads, window_size, ffn_dim_multiplier, backend=cfg.backend, **cfg.options())


def make_segment_cross(
    q_dim: int, kv_dim: int, d_attn: int, n_heads: int, lookback: int = 0, cfg: AttentionConfig | None = None
) -> nn.Module:
    """Return a cross-attention sub-layer from [B, Lq, q_dim] to [B, Lk, kv_dim]; no residual inside.

    The lookback is the argument's or cfg's; ValueError where both are given, the argument not 0, and they
    differ.
    """
    cfg = cfg or AttentionConfig()
    if cfg.lookback is not None:
        if lookback not in (0, cfg.lookback):
            fail(
                "make_segment_cross",
                "lookback",
                f"cfg.lookback = {cfg.lookback}, or 0 to leave it to cfg",
                lookback,
                "pass it in one place",
            )
        lookback = cfg.lookback
    build = FAMILIES[cfg.form].segment_cross
    return build(q_dim, kv_dim, d_attn, n_heads, lookback, backend=cfg.backend, **cfg.options())
