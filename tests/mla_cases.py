"""What the tests of the mla forms share: small blocks, the formula by einsum in fp64, calls of each form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from lowered_attn import mla

WIDTH, KV_WIDTH, HEADS, WINDOW, LOOKBACK = 32, 24, 4, 5, 2
SIZES = {"head_dim": 6, "kv_comp_dim": 20, "q_comp_dim": 18, "retr_dim": 10}
"""All different, so that none can stand for another."""

BUILD: dict[str, Callable[..., nn.Module]] = {
    "full": lambda **kw: mla.full_self.FullSelf(WIDTH, HEADS, 2, **{**SIZES, **kw}),
    "sliding": lambda **kw: mla.sliding_self.SlidingSelf(WIDTH, HEADS, WINDOW, 2, **{**SIZES, **kw}),
    "cross": lambda **kw: mla.segment_cross.SegmentCross(
        WIDTH, KV_WIDTH, HEADS * SIZES["head_dim"], HEADS, LOOKBACK, **{**SIZES, **kw}
    ),
}
SELF = ("full", "sliding")
FORMS = ("full", "sliding", "cross", "cross-rope")
"""Cross-attention without positions, and with them."""


def build(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    """A module of form `name` with weights that no initialisation gives, norms' too."""
    module = BUILD[name.removesuffix("-rope")](**options).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) / 8)
    return module


def padding(batch: int, length: int, hidden: list[tuple[int, int]]) -> Tensor:
    """bool [batch, length], True at the (request, token) pairs of `hidden`."""
    out = torch.zeros(batch, length, dtype=torch.bool)
    for b, i in hidden:
        out[b, i] = True
    return out


def segments(queries: int, count: int) -> Tensor:
    """int64 [2, queries]: uneven segments in order, the second request one behind the first."""
    index = torch.arange(queries).mul(count).div(queries, rounding_mode="floor")
    return torch.stack((index, (index - 1).clamp(min=0)))


def inputs(name: str, length: int = 13, keys: int = 5, padded: bool = False, dtype: torch.dtype = torch.float64) -> Any:
    """(token tensors, keywords) of a call of form `name`, two requests."""
    x = torch.randn(2, length, WIDTH, dtype=dtype)
    if name in SELF:
        return [x], {"key_padding": padding(2, length, [(0, 0), (0, 1), (1, 6)])} if padded else {}
    kv = torch.randn(2, keys, KV_WIDTH, dtype=dtype)
    owner = segments(length, keys)
    options: dict[str, Tensor] = {"query_segments": owner}
    if padded:
        options["key_padding"] = padding(2, keys, [(0, 0), (1, 3)])
        options["query_padding"] = padding(2, length, [(1, length - 1), (1, 4)])
    if name == "cross-rope":
        options["query_positions"] = owner * 7 + 3
        options["key_positions"] = torch.arange(keys).mul(7).add(1).expand(2, keys)
    return [x, kv], options


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm spelled out."""
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def turned(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """RoPE of heads [B, S, H, D] at positions [B, S], by complex multiplication."""
    half = x.shape[3] // 2
    angles = positions[..., None].double() * base ** (-2 * torch.arange(half).double() / x.shape[3])
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)[:, :, None]
    return torch.cat((z.real, z.imag), -1)


def attend(
    p: dict[str, Tensor], q_tokens: Tensor, kv_tokens: Tensor, visible: Tensor, at: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Latent attention the long way round, [B, Lq, q_dim]: every head has keys and values of its own.

    `p`: weights by the names of the sub-layer's projections; visible bool [B, Lq, Lk]; `at`: positions of queries and
    keys. What sees nothing gives 0.
    """
    retr = SIZES["retr_dim"]
    latent = torch.einsum("bkd,cd->bkc", kv_tokens, p["kv_down"])
    keys = torch.einsum("bkc,hrc->bkhr", latent, p["k_up"].view(HEADS, retr, -1))
    values = torch.einsum("bkc,hvc->bkhv", latent, p["v_up"])
    queries = torch.einsum("bqd,md,hrm->bqhr", q_tokens, p["q_down"], p["q_up"].view(HEADS, retr, -1))
    if at is not None:
        queries, keys = turned(queries, at[0]), turned(keys, at[1])
    scores = torch.einsum("bqhr,bkhr->bhqk", queries, keys) / math.sqrt(retr)
    weights = (scores - scores.detach().amax(-1, keepdim=True)).exp() * visible[:, None]
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    return torch.einsum("bhqk,bkhv,ehv->bqe", weights, values, p["o_proj"].view(-1, HEADS, SIZES["head_dim"]))


def oracle(name: str, module: nn.Module, tokens: list[Tensor], options: dict[str, Tensor]) -> Tensor:
    """What `module` computes, by its formula, differentiable in tokens and parameters, all fp64."""
    p = {n.removeprefix("attention.").removesuffix(".weight"): w for n, w in module.named_parameters()}
    x = tokens[0]
    batch, length = x.shape[:2]
    i = torch.arange(length)[None, :, None]
    hidden = options.get("key_padding")
    if name in SELF:
        j = torch.arange(length)[None, None]
        visible = (j <= i) & (i - j < (WINDOW if name == "sliding" else length))
        if hidden is not None:
            visible = visible & ~hidden[:, None]
        at = torch.arange(length).expand(batch, length)
        normed = norm(x, p["attention_norm"])
        x = x + attend(p, normed, normed, visible.expand(batch, -1, -1), (at, at))
        normed = norm(x, p["ffn_norm"])
        return x + (silu(normed @ p["ffn.gate_proj"].T) * (normed @ p["ffn.up_proj"].T)) @ p["ffn.down_proj"].T
    kv = tokens[1]
    owner, j = options["query_segments"][..., None], torch.arange(kv.shape[1])
    visible = (j <= owner) & (j >= owner - LOOKBACK)
    if hidden is not None:
        visible = visible & ~hidden[:, None]
    if "query_padding" in options:
        visible = visible & ~options["query_padding"][..., None]
    at_both = (options["query_positions"], options["key_positions"]) if name == "cross-rope" else None
    return attend(p, norm(x, p["q_norm"]), norm(kv, p["kv_norm"]), visible, at_both)
