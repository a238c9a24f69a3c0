"""What the blocks of every form share: RoPE, projections around an attention form, SwiGLU, the block."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from custom_ops.form import Form
from custom_ops.masks import OperandValue
from lowered_attn.backends import get_backend, run_attention
from lowered_attn.checks import check_int, check_tokens, divide_heads, fail

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
    if x.shape[-1] % 2:
        fail("apply_rope", "head_dim", EVEN, x.shape[-1], "pass an even head_dim")
    dtype = torch.promote_types(x.dtype, torch.float32)
    exponents = torch.arange(0, x.shape[-1], 2, device=x.device, dtype=dtype) / x.shape[-1]
    angles = (positions[..., None].to(dtype) * base**-exponents).unsqueeze(-2)
    cos, sin = angles.cos(), angles.sin()
    first, second = x.to(dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


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
        if query_positions is not None:
            q = apply_rope(q, query_positions, self.rope_base)
        if key_positions is not None:
            k = apply_rope(k, key_positions, self.rope_base)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = run_attention(self.backend, self.form, q, k, v, operands)
        return self.o_proj(out.transpose(1, 2).flatten(2))


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
    check_int(form.name, "d_model", d_model, 1)
    check_int(form.name, "n_heads", n_heads, 1)
    if head_dim is None:
        head_dim = divide_heads(form.name, "d_model", d_model, n_heads)
    check_int(form.name, "head_dim", head_dim, 1)
    if head_dim % 2:
        fail(form.name, "head_dim", EVEN, head_dim, "pass an even head_dim, or another n_heads")
    return MultiHeadAttention(form, d_model, d_model, n_heads, n_kv_heads, head_dim, backend, rope_base)


class PreNormBlock(nn.Module):
    """A pre-norm transformer block around self-attention: x + attention(norm(x)), then x + SwiGLU(norm(x)).

    A subclass chooses the attention and its int operands; everything else is here. The SwiGLU is
    ffn_dim_multiplier * d_model wide.
    Source of the order: Xiong et al., "On Layer Normalization in the Transformer Architecture",
    https://arxiv.org/abs/2002.04745; of the norm: Zhang and Sennrich, https://arxiv.org/abs/1910.07467.
    """

    def __init__(
        self, d_model: int, ffn_dim_multiplier: int, attention: MultiHeadAttention, **int_operands: int
    ) -> None:
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
        x = x + self.attention(normed, normed, operands, positions, positions)
        return x + self.ffn(self.ffn_norm(x))
