"""DeepSeek's multi-head latent attention: a decoupled RoPE key, and two ways to compute it, of which it picks one.

Source: DeepSeek-AI, "DeepSeek-V2", section 2.1 and appendix C, https://arxiv.org/abs/2405.04434; DeepSeek-V3 has the
same structure.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from custom_ops.checks import HEAD_DIMS, VALUE_DIMS
from custom_ops.forms import FULL_SELF
from custom_ops.paged.checks import ROTARY_DIMS
from lowered_attn.backends import get_backend, run_attention
from lowered_attn.checks import check_int, check_per_token, check_size, check_tokens, fail
from lowered_attn.forms.mla.cache import LatentCache
from lowered_attn.latent_attention import LatentAttention, check_scale
from lowered_attn.layers import EVEN, NORM_EPS, ROPE_BASE, turned_halves
from lowered_attn.paged_layer import Step

PATHS = ("auto", "expanded", "absorbed")
DENSE_PAGE = 64
"""Tokens a page when a dense cache is read as a paged one: the page size that kernels are measured with."""
Halves = tuple[Tensor, ...]
"""The two halves of a rotary part; nothing where there is none."""


class DeepSeekAttention(nn.Module):
    """Causal attention over latents, [B, S, d_model] to the same: projections and RoPE, no norm of x, no residual.

    A token's latent is c = kv_norm(kv_down(x)), `kv_comp_dim` elements, behind which stands one key part that RoPE has
    turned, `rotary_dim` elements for all heads. kv_up makes of c, for each of `n_heads` heads, `nope_dim` elements of
    the key and `value_dim` of the value; the query is q_up(q_norm(q_down(x))), or q_up(x) without `q_comp_dim`. Scores
    are multiplied by `scale`, None meaning 1 / sqrt(nope_dim + rotary_dim). No biases. The defaults are DeepSeek's.

    RoPE turns the pairs (i, i + rotary_dim / 2), as `apply_rope`. Published weights turn the pairs (2 i, 2 i + 1): put
    the rotary rows of their q_up (of each head) and kv_down into the order 0, 2, ..., 1, 3, ... once, which changes no
    score.

    It has two computations, equal but for rounding. "expanded" makes the keys and values of every head and runs the
    full_self form on `backend`; it has gradients. "absorbed" takes the query into the latent space and the output out
    of it, so that all heads share one key of kv_comp_dim + rotary_dim elements whose beginning is the value;
    `attn_impl` names its kernel, see `LatentAttention`. `path` says which: "auto" takes "absorbed" for fewer new tokens
    a request than `break_even`, in a pass with a cache in which no gradient is recorded. `serve` is always absorbed.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        q_comp_dim: int | None = None,
        kv_comp_dim: int = 512,
        nope_dim: int = 128,
        rotary_dim: int = 64,
        value_dim: int = 128,
        backend: str = "lowered",
        rope_base: float = ROPE_BASE,
        scale: float | None = None,
        path: str = "auto",
        attn_impl: str = "triton_grouped",
    ) -> None:
        super().__init__()
        where = "DeepSeekAttention"
        for name, value in (("d_model", d_model), ("n_heads", n_heads), ("nope_dim", nope_dim)):
            check_int(where, name, value, 1)
        check_size(where, "kv_comp_dim", kv_comp_dim, VALUE_DIMS)
        check_size(where, "value_dim", value_dim, VALUE_DIMS)
        check_size(where, "rotary_dim", rotary_dim, ROTARY_DIMS)
        check_size(where, "nope_dim + rotary_dim", nope_dim + rotary_dim, HEAD_DIMS)
        if rotary_dim % 2:
            fail(where, "rotary_dim", EVEN, rotary_dim, "pass an even rotary_dim")
        if path not in PATHS:
            fail(where, "path", f"one of {', '.join(map(repr, PATHS))}", repr(path), "pass an available path")
        get_backend(backend)
        scale = (nope_dim + rotary_dim) ** -0.5 if scale is None else scale
        check_scale(where, scale)
        self.d_model = d_model
        self.n_heads = n_heads
        self.kv_comp_dim = kv_comp_dim
        self.nope_dim = nope_dim
        self.rotary_dim = rotary_dim
        self.value_dim = value_dim
        self.backend = backend
        self.rope_base = rope_base
        self.scale = scale
        self.path = path
        self.q_down: nn.Linear | None = None
        self.q_norm: nn.RMSNorm | None = None
        if q_comp_dim is not None:
            check_int(where, "q_comp_dim", q_comp_dim, 1)
            self.q_down = nn.Linear(d_model, q_comp_dim, bias=False)
            self.q_norm = nn.RMSNorm(q_comp_dim, eps=NORM_EPS)
        self.q_up = nn.Linear(q_comp_dim or d_model, n_heads * (nope_dim + rotary_dim), bias=False)
        self.kv_down = nn.Linear(d_model, kv_comp_dim + rotary_dim, bias=False)
        self.kv_norm = nn.RMSNorm(kv_comp_dim, eps=NORM_EPS)
        self.kv_up = nn.Linear(kv_comp_dim, n_heads * (nope_dim + value_dim), bias=False)
        self.o_proj = nn.Linear(n_heads * value_dim, d_model, bias=False)
        self.paged = LatentAttention(n_heads, kv_comp_dim, rotary_dim, scale=scale, attn_impl=attn_impl)

    def extra_repr(self) -> str:
        """Show what the submodules do not."""
        names = ("n_heads", "nope_dim", "rotary_dim", "value_dim", "backend", "path")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    @property
    def break_even(self) -> float:
        """New tokens a request from which "expanded" takes fewer FLOPs: 512 * 256 / 768 = 171 with DeepSeek's sizes.

        With C = kv_comp_dim, N, R and V = nope_dim, rotary_dim and value_dim, a head spends 2 C (N + V) FLOPs on a
        cached token to expand it, and on a pair of a new and a cached token 2 (N + R + V) expanded, 2 (2 C + R)
        absorbed. n new tokens save n * 2 (2 C - N - V) a cached token. Infinite where a pair costs no less expanded.
        The whole capacity of a cache is expanded, since lengths are on the device: of one that is mostly empty,
        "absorbed" takes more tokens at less.
        """
        saved = 2 * self.kv_comp_dim - self.nope_dim - self.value_dim
        return self.kv_comp_dim * (self.nope_dim + self.value_dim) / saved if saved > 0 else math.inf

    def forward(self, x: Tensor, *, key_padding: Tensor | None = None, cache: LatentCache | None = None) -> Tensor:
        """Return [B, S, d_model] for x [B, S, d_model], whose token i sees the tokens up to i.

        With a `cache` of this module's `make_cache`, x is what comes behind the tokens in it: its latents are appended,
        and its tokens see the cached ones too. key_padding bool [B, S], True = hidden from every query: not with a
        cache, and not absorbed. ValueError where a shape or dtype does not fit, and for a cache while gradients are
        recorded.
        """
        where = "DeepSeekAttention"
        check_tokens(where, "x", x, self.d_model, "d_model")
        if key_padding is not None:
            check_per_token(where, "key_padding", key_padding, x, "x")
        absorbed = self._absorbs(x, key_padding, cache)
        positions = torch.arange(x.shape[1], device=x.device)
        if cache is not None:
            if cache.lengths.shape != x.shape[:1]:
                remedy = "make the cache for as many requests"
                fail(where, "x", f"the cache's {cache.lengths.shape[0]} requests", f"shape {list(x.shape)}", remedy)
            positions = positions + cache.lengths[:, None]
        q_nope, turned = self._queries(x, positions)
        latents, start = self._latents(x, positions), None
        if cache is not None:
            start = cache.append(latents)
            latents, key_padding = cache.data, cache.key_padding
        if absorbed:
            out = self._absorbed(self._fold(q_nope, turned), latents, start)
        else:
            out = self._expanded(torch.cat((q_nope, *turned), -1), latents, key_padding, start)
        return self.o_proj(out.flatten(2))

    def serve(self, x: Tensor, positions: Tensor) -> Tensor:
        """Return [T, d_model] for x [T, d_model], the rows of a serving step, at `positions` int [T] in their requests.

        The step's metadata comes from the fetch hook, and `self.paged.latent_cache` holds the cached latents: see
        `LatentAttention`. Absorbed, whatever the mix of prefill and decode; inference only.
        """
        where = "DeepSeekAttention.serve"
        if x.dim() != 2 or x.shape[1] != self.d_model:
            fail(where, "x", f"shape [T, {self.d_model}]", f"shape {list(x.shape)}", "pass the step's rows")
        if positions.shape != x.shape[:1]:
            expected = f"shape {list(x.shape[:1])}, one position for each row of x"
            fail(where, "positions", expected, f"shape {list(positions.shape)}", "count from the request's start")
        q_nope, turned = self._queries(x, positions)
        out = self.paged(self._fold(q_nope, turned), self._latents(x, positions))
        return self.o_proj(self._unfold(out).flatten(1))

    def make_cache(self, batch: int, capacity: int) -> LatentCache:
        """Return an empty cache of this module's dtype and device, for at least `capacity` tokens a request."""
        check_int("DeepSeekAttention.make_cache", "capacity", capacity, 1)
        weight = self.kv_down.weight
        whole_pages = -(-capacity // DENSE_PAGE) * DENSE_PAGE
        return LatentCache(batch, whole_pages, weight.shape[0], dtype=weight.dtype, device=weight.device)

    # ------------------------------------------------------------------ which computation

    def _absorbs(self, x: Tensor, key_padding: Tensor | None, cache: LatentCache | None) -> bool:
        where = "DeepSeekAttention"
        recording = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))
        if recording and (self.path == "absorbed" or cache is not None):
            name = "path" if cache is None else "cache"
            got = repr(self.path) if cache is None else "a cache"
            expected = "'auto' or 'expanded'" if cache is None else "None"
            remedy = "run under torch.no_grad(), or leave it out to train"
            fail(where, name, f"{expected} where gradients are recorded", got, remedy)
        if key_padding is not None and (self.path == "absorbed" or cache is not None):
            expected = "None with path 'absorbed'" if cache is None else "None with a cache"
            remedy = "pad prompts at their end, and take the padding back with cache.truncate(lengths)"
            fail(where, "key_padding", expected, "a tensor", "pass path='expanded'" if cache is None else remedy)
        if self.path != "auto":
            return self.path == "absorbed"
        return cache is not None and x.shape[1] < self.break_even

    # ------------------------------------------------------------------ projections

    def _queries(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Halves]:
        """[..., H, nope_dim], and the rotary part turned: what queries are concatenated from."""
        if self.q_down is not None and self.q_norm is not None:
            x = self.q_norm(self.q_down(x))
        q = self.q_up(x).unflatten(-1, (self.n_heads, self.nope_dim + self.rotary_dim))
        q_nope, q_rotary = q.split((self.nope_dim, self.rotary_dim), -1)
        return q_nope, self._turn(q_rotary, positions)

    def _latents(self, x: Tensor, positions: Tensor) -> Tensor:
        """[..., kv_comp_dim + rotary_dim]: what is cached of a token."""
        c, rotary = self.kv_down(x).split((self.kv_comp_dim, self.rotary_dim), -1)
        turned = self._turn(rotary.unsqueeze(-2), positions)
        return torch.cat((self.kv_norm(c), *(half.squeeze(-2) for half in turned)), -1)

    def _turn(self, x: Tensor, positions: Tensor) -> Halves:
        return turned_halves(x, positions, self.rope_base) if self.rotary_dim else ()

    def _up_weights(self) -> tuple[Tensor, Tensor]:
        """kv_up's weight by what it makes: keys [H, nope_dim, kv_comp_dim], values [H, value_dim, kv_comp_dim]."""
        keys, values = self.kv_up.weight.unflatten(0, (self.n_heads, -1)).split((self.nope_dim, self.value_dim), 1)
        return keys, values

    def _fold(self, q_nope: Tensor, turned: Halves) -> Tensor:
        """[..., H, kv_comp_dim + rotary_dim]: the query in latent space."""
        return torch.cat((torch.einsum("...hn,hnc->...hc", q_nope, self._up_weights()[0]), *turned), -1)

    def _unfold(self, out: Tensor) -> Tensor:
        """Values [..., H, value_dim] of averaged latents [..., H, kv_comp_dim]."""
        return torch.einsum("...hc,hvc->...hv", out, self._up_weights()[1])

    # ------------------------------------------------------------------ the two computations

    def _expanded(self, q: Tensor, latents: Tensor, key_padding: Tensor | None, start: Tensor | None) -> Tensor:
        """[B, S, H, value_dim] of q [B, S, H, nope_dim + rotary_dim] and latents [B, L, width]."""
        c, rotary = latents.split((self.kv_comp_dim, self.rotary_dim), -1)
        k_nope, v = self.kv_up(c).unflatten(-1, (self.n_heads, -1)).split((self.nope_dim, self.value_dim), -1)
        k = torch.cat((k_nope, rotary.unsqueeze(2).expand(-1, -1, self.n_heads, -1)), -1)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        operands = {"key_padding": key_padding, "q_start": start}
        return run_attention(self.backend, FULL_SELF, q, k, v, operands, self.scale).transpose(1, 2)

    def _absorbed(self, q: Tensor, latents: Tensor, start: Tensor | None) -> Tensor:
        """[B, S, H, value_dim] of q [B, S, H, width] and latents [B, L, width]; `start` is None without a cache."""
        batch, new = q.shape[:2]
        rows = torch.arange(batch + 1, device=q.device, dtype=torch.int32) * new
        if start is None:
            # Nothing is cached: the new latents are read from where they are, and the table names no page.
            nothing = latents.new_zeros(1, DENSE_PAGE, latents.shape[2])
            step = Step(rows, torch.zeros_like(rows[1:]), rows.new_zeros(batch, 1))
            out = self.paged.attend(q.flatten(0, 1), latents.flatten(0, 1), nothing, step)
        else:
            # A dense cache is a paged one whose table counts up.
            page = math.gcd(latents.shape[1], DENSE_PAGE)
            pages = latents.view(-1, page, latents.shape[2])
            tables = torch.arange(pages.shape[0], device=q.device, dtype=torch.int32).view(batch, -1)
            out = self.paged.attend(q.flatten(0, 1), None, pages, Step(rows, start, tables))
        return self._unfold(out).unflatten(0, (batch, new))
