"""Multi-head latent attention as a sub-layer: keys and values from one latent a token, scores in a retrieval space.

Each token has one latent ``c`` of ``kv_comp_dim`` elements, shared by all heads, and that is all a cache stores::

    c[j]      = kv_down x[j]
    key[j]    = RoPE(k_up_h c[j])                    [retr_dim], a head's own
    query[i]  = RoPE(q_up_h q_down x[i])             [retr_dim], through q_comp_dim
    o_h[i]    = sum_j softmax_j(query[i] . key[j] / sqrt(retr_dim)) * c[j]
    out[i]    = o_proj [v_up_1 o_1[i], ..., v_up_H o_H[i]]

Values are the latent itself, so attention reads them once for all heads and no head has a copy; projecting up after
attention instead of before gives the same, since both are linear. After DeepSeek-AI, "DeepSeek-V2", section 2.1,
https://arxiv.org/abs/2405.04434, with RoPE on the whole key instead of on a part of its own, and without norms between
the projections, so that they can be folded.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from custom_ops.checks import HEAD_DIMS, VALUE_DIMS
from custom_ops.form import Form
from custom_ops.masks import OperandValue
from lowered_attn.backends import BACKENDS
from lowered_attn.checks import check_int, check_size, fail
from lowered_attn.forms.mla.cache import LatentCache
from lowered_attn.layers import EVEN, turn_and_attend

if TYPE_CHECKING:
    from typing_extensions import Self

BACKEND_ALIASES = {"fallback": "reference"}
"""Names that this family takes besides those of BACKENDS, and what they are there."""


def resolve_backend(where: str, name: str) -> str:
    """Return the name in BACKENDS of the backend that this family calls `name`; ValueError if it has none."""
    resolved = BACKEND_ALIASES.get(name, name)
    if resolved not in BACKENDS:
        names = ", ".join(map(repr, (*BACKENDS, *BACKEND_ALIASES)))
        fail(where, "backend", f"one of {names}", repr(name), "pass an available backend")
    return resolved


@dataclass(frozen=True)
class LatentSizes:
    """Sizes of the sub-layer, in elements."""

    n_heads: int
    head_dim: int
    """Width of one head's output, before o_proj merges the heads."""
    kv_comp_dim: int
    """Width of the latent, which is the value of every head and what a cache stores of a token: at most 512."""
    q_comp_dim: int
    """Width that queries are compressed to."""
    retr_dim: int
    """Width of a query and of a key: at most 256, and even where RoPE turns it."""

    @classmethod
    def of(
        cls,
        where: str,
        n_heads: int,
        head_dim: int,
        kv_comp_dim: int | None,
        q_comp_dim: int | None,
        retr_dim: int | None,
    ) -> LatentSizes:
        """Fill in sizes that are None and check all; ValueError, naming `where`.

        The ratios are DeepSeek-V2's (section 3.1.2 of https://arxiv.org/abs/2405.04434: heads of 128, a latent of
        512, compressed queries of 1536): kv_comp_dim is 4 heads wide, at most 512, and q_comp_dim 12 heads. retr_dim
        is one head, since scores live wholly in the retrieval space.
        """
        sizes = cls(
            n_heads,
            head_dim,
            min(4 * head_dim, VALUE_DIMS[1]) if kv_comp_dim is None else kv_comp_dim,
            12 * head_dim if q_comp_dim is None else q_comp_dim,
            head_dim if retr_dim is None else retr_dim,
        )
        check_size(where, "kv_comp_dim", sizes.kv_comp_dim, VALUE_DIMS)
        check_int(where, "q_comp_dim", sizes.q_comp_dim, 1)
        check_size(where, "retr_dim", sizes.retr_dim, HEAD_DIMS)
        return sizes

    def check_rope(self, where: str) -> None:
        """Raise ValueError where RoPE cannot turn the keys."""
        if self.retr_dim % 2:
            fail(where, "retr_dim", EVEN, self.retr_dim, "pass an even retr_dim")


class PerHeadLinear(nn.Module):
    """A linear map of each head's own, without bias: [B, S, H, in_dim] to [B, S, H, out_dim]."""

    def __init__(self, n_heads: int, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_heads, out_dim, in_dim))
        nn.init.uniform_(self.weight, -(in_dim**-0.5), in_dim**-0.5)  # as nn.Linear does

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, S, H, out_dim]."""
        return torch.einsum("bshi,hoi->bsho", x, self.weight)


class LatentHeads(nn.Module):
    """Keys and attention over latents; a subclass says how queries and the output are projected."""

    kv_down: nn.Linear
    k_up: nn.Linear

    def __init__(self, form: Form, sizes: LatentSizes, backend: str, rope_base: float) -> None:
        super().__init__()
        self.form = form
        self.sizes = sizes
        self.backend = backend
        self.rope_base = rope_base

    def extra_repr(self) -> str:
        """Show what the submodules do not: the form, where it runs, the sizes."""
        return f"form={self.form.name!r}, backend={self.backend!r}, {self.sizes}"

    def queries(self, tokens: Tensor) -> Tensor:
        """Return queries [B, Lq, H, retr_dim] of tokens [B, Lq, q_dim]."""
        raise NotImplementedError

    def keys(self, q: Tensor, latents: Tensor, turned: bool) -> tuple[Tensor, Tensor]:
        """Return queries, as they are to meet the keys, and keys [B, Lk, Hk, D] of latents [B, Lk, kv_comp_dim]."""
        return q, self.k_up(latents).unflatten(2, (-1, self.sizes.retr_dim))

    def output(self, attended: Tensor) -> Tensor:
        """Return [B, Lq, q_dim] of what the heads attended to, [B, Lq, H, kv_comp_dim]."""
        raise NotImplementedError

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
        return self.attend(q_tokens, self.kv_down(kv_tokens), operands, query_positions, key_positions)

    def attend(
        self,
        q_tokens: Tensor,
        latents: Tensor,
        operands: Mapping[str, OperandValue],
        query_positions: Tensor | None,
        key_positions: Tensor | None,
    ) -> Tensor:
        """`forward` for latents [B, Lk, kv_comp_dim] that are there already, such as a cache's."""
        q, k = self.keys(self.queries(q_tokens), latents, key_positions is not None)
        values = latents.unsqueeze(2)  # one value head, which all KV heads share
        positions = (query_positions, key_positions)
        # The scale is that of retr_dim, also where the keys are latents.
        scale = self.sizes.retr_dim**-0.5
        out = turn_and_attend(self.backend, self.form, q, k, values, operands, *positions, self.rope_base, scale)
        return self.output(out)


class MultiHeadLatentAttention(LatentHeads):
    """The sub-layer, with its parameters. No norm, no residual, no biases."""

    def __init__(self, form: Form, q_dim: int, kv_dim: int, sizes: LatentSizes, backend: str, rope_base: float) -> None:
        super().__init__(form, sizes, resolve_backend(form.name, backend), rope_base)
        self.q_down = nn.Linear(q_dim, sizes.q_comp_dim, bias=False)
        self.q_up = nn.Linear(sizes.q_comp_dim, sizes.n_heads * sizes.retr_dim, bias=False)
        self.kv_down = nn.Linear(kv_dim, sizes.kv_comp_dim, bias=False)
        self.k_up = nn.Linear(sizes.kv_comp_dim, sizes.n_heads * sizes.retr_dim, bias=False)
        self.v_up = PerHeadLinear(sizes.n_heads, sizes.kv_comp_dim, sizes.head_dim)
        self.o_proj = nn.Linear(sizes.n_heads * sizes.head_dim, q_dim, bias=False)

    def queries(self, tokens: Tensor) -> Tensor:
        """Return queries [B, Lq, H, retr_dim] of tokens [B, Lq, q_dim]."""
        return self.q_up(self.q_down(tokens)).unflatten(2, (-1, self.sizes.retr_dim))

    def output(self, attended: Tensor) -> Tensor:
        """Return [B, Lq, q_dim] of what the heads attended to, [B, Lq, H, kv_comp_dim]."""
        return self.o_proj(self.v_up(attended).flatten(2))

    def absorb(self) -> AbsorbedLatentAttention:
        """Return the same attention for inference, its projections folded; ValueError in training mode."""
        if self.training:
            fail("absorb", "training", "False", True, "call eval() first: the folded weights are for inference only")
        return AbsorbedLatentAttention(self)


class AbsorbedLatentAttention(LatentHeads):
    """The sub-layer for inference: q_up q_down folded into one matrix, and o_proj v_up into one a head.

    It saves two launches a layer, and reads more or fewer weights: q_dim * H * retr_dim elements instead of
    q_comp_dim * (q_dim + H * retr_dim), and q_dim * H * kv_comp_dim instead of H * head_dim * (q_dim + kv_comp_dim).
    Without RoPE the keys need no projection either: folded into the queries, k_up leaves the latents themselves, one
    key head for all heads, wherever attention takes keys so wide and there are no more queries than keys.

    The folded weights are a snapshot, in buffers that no state_dict holds: the module that was folded stays the one to
    train, save and load into; fold it again afterwards. kv_down and k_up are shared with it.
    """

    q_weight: Tensor
    """q_up q_down, [H * retr_dim, q_dim]."""
    o_weight: Tensor
    """o_proj v_up, [q_dim, H * kv_comp_dim]."""

    def __init__(self, source: MultiHeadLatentAttention) -> None:
        super().__init__(source.form, source.sizes, source.backend, source.rope_base)
        self.kv_down, self.k_up = source.kv_down, source.k_up
        with torch.no_grad():
            heads = source.o_proj.weight.unflatten(1, (self.sizes.n_heads, self.sizes.head_dim))
            folded = {
                "q_weight": _product("rm,md->rd", source.q_up.weight, source.q_down.weight),
                "o_weight": _product("ehd,hdc->ehc", heads, source.v_up.weight).flatten(1),
            }
        for name, weight in folded.items():
            self.register_buffer(name, weight, persistent=False)
        super().train(False)

    def queries(self, tokens: Tensor) -> Tensor:
        """Return queries [B, Lq, H, retr_dim] of tokens [B, Lq, q_dim]; ValueError where gradients are recorded."""
        if torch.is_grad_enabled() and tokens.requires_grad:
            remedy = "call it under torch.no_grad(), or train the module that was absorbed"
            fail("AbsorbedLatentAttention", "gradients", "none to be recorded", "requires_grad=True", remedy)
        return linear(tokens, self.q_weight).unflatten(2, (-1, self.sizes.retr_dim))

    def keys(self, q: Tensor, latents: Tensor, turned: bool) -> tuple[Tensor, Tensor]:
        """Return queries and keys; without RoPE, queries in latent space and the latents as one key head."""
        if turned or self.sizes.kv_comp_dim > HEAD_DIMS[1] or q.shape[1] > latents.shape[1]:
            return super().keys(q, latents, turned)
        k_up = self.k_up.weight.unflatten(0, (-1, self.sizes.retr_dim))
        return torch.einsum("bshr,hrc->bshc", q, k_up), latents.unsqueeze(2)

    def output(self, attended: Tensor) -> Tensor:
        """Return [B, Lq, q_dim] of what the heads attended to, [B, Lq, H, kv_comp_dim]."""
        return linear(attended.flatten(2), self.o_weight)

    def train(self, mode: bool = True) -> Self:
        """Only evaluation mode exists; ValueError otherwise."""
        if mode:
            remedy = "train the module that was absorbed, and absorb it again"
            fail("AbsorbedLatentAttention", "mode", "False", mode, remedy)
        return super().train(mode)

    def _load_from_state_dict(self, *_: Any) -> None:
        remedy = "load into the module that was absorbed, and absorb it again"
        fail("AbsorbedLatentAttention", "load_state_dict", "no call", "a call", remedy)


class Absorbable(nn.Module):
    """A block or sub-layer around `attention`: what it offers for inference."""

    attention: Any  # LatentHeads; the block's own class says nn.Module

    def absorb(self) -> Self:
        """Return this module for inference, with the attention's projections folded; see AbsorbedLatentAttention.

        Everything but the attention is shared with this module, which stays as it is. ValueError in training mode
        and where it is absorbed already; the returned module raises where gradients would be recorded.
        """
        if not isinstance(self.attention, MultiHeadLatentAttention):
            fail("absorb", type(self).__name__, "a module as it was built", "an absorbed one", "use it as it is")
        absorbed = copy.copy(self)
        absorbed._modules = dict(self._modules)
        absorbed.attention = self.attention.absorb()
        return absorbed

    def make_cache(self, batch: int, capacity: int, *, positions: bool = False) -> LatentCache:
        """Return an empty cache for `batch` requests of up to `capacity` keys, of this module's dtype and device.

        `positions` True where cross-attention is given key positions; self-attention has its own.
        """
        weight, width = self.attention.kv_down.weight, self.attention.sizes.kv_comp_dim
        return LatentCache(batch, capacity, width, dtype=weight.dtype, device=weight.device, positions=positions)


def _product(equation: str, a: Tensor, b: Tensor) -> Tensor:
    # In fp32 at least: a folded bf16 weight is then rounded once.
    dtype = torch.promote_types(a.dtype, torch.float32)
    return torch.einsum(equation, a.to(dtype), b.to(dtype)).to(a.dtype)
