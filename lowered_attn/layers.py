"""What the blocks of every form share: RoPE, projections around an attention form, SwiGLU, the block."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from custom_ops.form import Form
from custom_ops.masks import OperandValue
from lowered_attn.backends import get_backend, run_attention
from lowered_attn.checks import check_int, check_per_token, check_tokens, divide_heads, fail

# RMSNorm's own default is the dtype's machine epsilon, 0.0078 in bf16, which would change the result with the
# dtype.
NORM_EPS = 1e-6
ROPE_BASE = 10000.0
EVEN = "an even number (RoPE turns pairs)"


def apply_rope(x: Tensor, positions: Tensor, base: float = ROPE_BASE) -> Tensor:
    """Turn each pair (x[..., i], x[..., i + D / 2]) by positions * base ** (-2 i / D) radians.

    x [B, S, H, D] with D even; positions [S] or [B, S], in tokens. Angles and products are fp32 (fp64 for
    fp64 x); the result has x's shape and dtype. Frequencies are computed here and not kept in a buffer, which
    `module.to(bfloat16)` would round. Source: Su et al., "RoFormer", https://arxiv.org/abs/2104.09864, in the
    half-split layout of GPT-NeoX and Llama.
    """
    return torch.cat(turned_halves(x, positions, base), dim=-1)


def turned_halves(x: Tensor, positions: Tensor, base: float = ROPE_BASE) -> tuple[Tensor, Tensor]:
    """The halves of `apply_rope`'s result, for who concatenates them with more: Inductor writes a nested cat twice."""
    if x.shape[-1] % 2:
        fail("apply_rope", "head_dim", EVEN, x.shape[-1], "pass an even head_dim")
    dtype = torch.promote_types(x.dtype, torch.float32)
    exponents = torch.arange(0, x.shape[-1], 2, device=x.device, dtype=dtype) / x.shape[-1]
    angles = (positions[..., None].to(dtype) * base**-exponents).unsqueeze(-2)
    cos, sin = angles.cos(), angles.sin()
    first, second = x.to(dtype).chunk(2, dim=-1)
    return (first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype)


def turn_and_attend(
    backend: str,
    form: Form,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Mapping[str, OperandValue],
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    rope_base: float,
    scale: float | None = None,
) -> Tensor:
    """Turn q and k by RoPE, run `form`, and return [B, Lq, Hq, Dv].

    q [B, Lq, Hq, D], k [B, Lk, Hkv, D], v [B, Lk, Hv, Dv]: token-major, as projections give them, so that heads are
    split and merged by views. Positions [S] or [B, S], None leaves RoPE out on that side.
    """
    if query_positions is not None:
        q = apply_rope(q, query_positions, rope_base)
    if key_positions is not None:
        k = apply_rope(k, key_positions, rope_base)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return run_attention(backend, form, q, k, v, operands, scale).transpose(1, 2)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), [B, S, d_model] to [B, S, d_model], no biases.

    Source: Shazeer, "GLU Variants Improve Transformer", https://arxiv.org/abs/2002.05202.
    """

    def __init__(self, d_model: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, hidden_dim, bias=False)
        self.up_proj = nn.Linear(d_model, hidden_dim, bias=False)
        self.down_proj = nn.Linear(hidden_dim, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the feed-forward output [B, S, d_model]."""
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class MultiHeadAttention(nn.Module):
    """Projections and RoPE around one attention form, run on one backend. No norm, no residual, no biases.

    Everything stays token-major in memory: heads are split and merged by views, so nothing is copied between
    the projections and an attention that takes and gives strided [B, H, S, D].
    """

    def __init__(
        self,
        form: Form,
        q_dim: int,
        kv_dim: int,
        n_heads: int,
        n_kv_heads: int | None,
        head_dim: int,
        backend: str,
        rope_base: float,
    ) -> None:
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        check_int(form.name, "n_kv_heads", n_kv_heads, 1)
        if n_heads % n_kv_heads:
            fail(
                form.name,
                "n_kv_heads",
                f"a divisor of n_heads = {n_heads}",
                n_kv_heads,
                "each KV head serves a group",
            )
        get_backend(backend)
        self.form = form
        self.backend = backend
        self.head_dim = head_dim
        self.rope_base = rope_base
        self.q_proj = nn.Linear(q_dim, n_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(kv_dim, n_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(kv_dim, n_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(n_heads * head_dim, q_dim, bias=False)

    def extra_repr(self) -> str:
        """Show what the submodules do not: the form and where it runs."""
        return f"form={self.form.name!r}, backend={self.backend!r}, head_dim={self.head_dim}"

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(2, (-1, self.head_dim))

    def forward(
        self,
        q_tokens: Tensor,
        kv_tokens: Tensor,
        operands: Mapping[str, OperandValue],
        query_positions: Tensor | None,
        key_positions: Tensor | None,
    ) -> Tensor:
        """Attend from q_tokens [B, Lq, q_dim] to kv_tokens [B, Lk, kv_dim]; return [B, Lq, q_dim].

        `operands` are the form's, by name; positions [S] or [B, S] feed RoPE on their side, None leaves it
        out.
        """
        q = self._heads(self.q_proj(q_tokens))
        k = self._heads(self.k_proj(kv_tokens))
        v = self._heads(self.v_proj(kv_tokens))
        positions = (query_positions, key_positions)
        out = turn_and_attend(self.backend, self.form, q, k, v, operands, *positions, self.rope_base)
        return self.o_proj(out.flatten(2))


def self_head_dim(where: str, d_model: int, n_heads: int, head_dim: int | None) -> int:
    """Return the head dim of self-attention; None means d_model // n_heads. ValueError on bad sizes."""
    check_int(where, "d_model", d_model, 1)
    check_int(where, "n_heads", n_heads, 1)
    if head_dim is None:
        return divide_heads(where, "d_model", d_model, n_heads)
    check_int(where, "head_dim", head_dim, 1)
    return head_dim


def self_attention(
    form: Form,
    d_model: int,
    n_heads: int,
    backend: str,
    n_kv_heads: int | None,
    head_dim: int | None,
    rope_base: float,
) -> MultiHeadAttention:
    """Return a block's self-attention; head_dim None means d_model // n_heads. ValueError on bad sizes."""
    head_dim = self_head_dim(form.name, d_model, n_heads, head_dim)
    if head_dim % 2:
        fail(form.name, "head_dim", EVEN, head_dim, "pass an even head_dim, or another n_heads")
    return MultiHeadAttention(form, d_model, d_model, n_heads, n_kv_heads, head_dim, backend, rope_base)


class PreNormBlock(nn.Module):
    """A pre-norm transformer block around self-attention: x + attention(norm(x)), then x + SwiGLU(norm(x)).

    A subclass chooses the attention, a module called as MultiHeadAttention is, and its int operands; everything
    else is here. The SwiGLU is ffn_dim_multiplier * d_model wide.
    Source of the order: Xiong et al., "On Layer Normalization in the Transformer Architecture",
    https://arxiv.org/abs/2002.04745; of the norm: Zhang and Sennrich, https://arxiv.org/abs/1910.07467.
    """

    def __init__(self, d_model: int, ffn_dim_multiplier: int, attention: nn.Module, **int_operands: int) -> None:
        super().__init__()
        check_int(type(self).__name__, "ffn_dim_multiplier", ffn_dim_multiplier, 1)
        self.d_model = d_model
        self.int_operands = int_operands
        self.attention_norm = nn.RMSNorm(d_model, eps=NORM_EPS)
        self.attention = attention
        self.ffn_norm = nn.RMSNorm(d_model, eps=NORM_EPS)
        self.ffn = SwiGLU(d_model, ffn_dim_multiplier * d_model)

    def extra_repr(self) -> str:
        """Show the form's ints, such as the window."""
        return ", ".join(f"{name}={value}" for name, value in self.int_operands.items())

    def forward(self, x: Tensor, *, key_padding: Tensor | None = None) -> Tensor:
        """Return the block's output [B, S, d_model] for x [B, S, d_model].

        key_padding bool [B, S], True = hidden from every query; a token that sees nothing gets the residual
        alone. Positions are 0..S-1: the block attends to its own tokens and RoPE depends on distances, so
        another start would change nothing. ValueError where a shape or dtype does not fit.
        """
        check_tokens(type(self).__name__, "x", x, self.d_model, "d_model")
        positions = torch.arange(x.shape[1], device=x.device)
        normed = self.attention_norm(x)
        operands = {**self.int_operands, "key_padding": key_padding}
        return self._add(x, self.attention(normed, normed, operands, positions, positions))

    def _add(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + attended
        return x + self.ffn(self.ffn_norm(x))


def cross_head_dim(
    where: str, q_dim: int, kv_dim: int, d_attn: int, n_heads: int, lookback: int, head_dim: int | None
) -> int:
    """Return the head dim of cross-attention, d_attn // n_heads; `head_dim` may repeat it. ValueError on bad sizes."""
    for name, value in {"q_dim": q_dim, "kv_dim": kv_dim, "d_attn": d_attn, "n_heads": n_heads}.items():
        check_int(where, name, value, 1)
    check_int(where, "lookback", lookback, 0)
    divided = divide_heads(where, "d_attn", d_attn, n_heads)
    if head_dim not in (None, divided):
        fail(where, "head_dim", f"d_attn // n_heads = {divided}", head_dim, "leave it out, or change d_attn")
    return divided


class PreNormCross(nn.Module):
    """Cross-attention from tokens to segments, RMSNorm on both inputs, no residual: what every family's shares.

    A subclass chooses the attention and checks sizes with `cross_head_dim`.
    """

    def __init__(self, q_dim: int, kv_dim: int, lookback: int, attention: nn.Module) -> None:
        super().__init__()
        self.q_dim = q_dim
        self.kv_dim = kv_dim
        self.lookback = lookback
        self.q_norm = nn.RMSNorm(q_dim, eps=NORM_EPS)
        self.kv_norm = nn.RMSNorm(kv_dim, eps=NORM_EPS)
        self.attention = attention

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
        self._check(q, kv, query_positions, key_positions, query_padding)
        q = cleared(q, query_padding)
        operands = {"query_segments": query_segments, "lookback": self.lookback, "key_padding": key_padding}
        out = self.attention(self.q_norm(q), self.kv_norm(kv), operands, query_positions, key_positions)
        return cleared(out, query_padding)

    def _check(
        self,
        q: Tensor,
        kv: Tensor,
        query_positions: Tensor | None,
        key_positions: Tensor | None,
        query_padding: Tensor | None,
    ) -> None:
        where = type(self).__name__
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


def cleared(tokens: Tensor, padding: Tensor | None) -> Tensor:
    """`tokens` [B, S, width] with 0 where `padding` bool [B, S] is True; None pads nothing.

    Queries are cleared before attention as well as after: 0 * NaN is NaN in the gradients of the weights. Their
    segments stay as they are, since a -1 there would widen its whole tile's range of keys.
    """
    return tokens if padding is None else tokens.masked_fill(padding.unsqueeze(-1), 0)
