"""Attention of a serving step the plain way: no pages, no kernels, no mask language.

Every request's keys and values lie in a row of an ordinary tensor, `[rows, positions, heads, head_dim]`, and which
keys a token sees is written down here once more, as DESIGN-style rules over positions. So a mistake in page tables,
slots, schedules or masks cannot be made twice. It runs in any float dtype, fp64 too, on any device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SMALL = 8
"""Requests with at most this many new tokens are computed together; padding a longer one's rows would cost more."""


@dataclass(frozen=True)
class MaskRules:
    """What is the same for every step of a run."""

    mode: str = "causal"
    block_size: int = 1
    prefix_hole: bool = False
    window: int | None = None


@dataclass(frozen=True)
class DenseStep:
    """Lengths of a step, on the host: one number a request."""

    starts: list[int]  # first row of q
    new: list[int]
    context: list[int]
    valid: list[int]  # at most `new`
    status: list[int]
    prefix: list[int]
    padded_prefix: list[int]
    rows: list[int]  # where the request's history lies
    stored: list[list[int]]  # which of its new tokens enter the history
    rules: MaskRules

    @staticmethod
    def of(host: Mapping[str, Tensor], rows: Sequence[int], rules: MaskRules) -> DenseStep:
        """Read the tensors of a step (`StepTensors.on_host`), for its first `len(rows)` requests."""
        n = len(rows)
        cu, slots = host["cu_seqlens_q"].tolist(), host["slot_mapping"].tolist()
        new = [cu[r + 1] - cu[r] for r in range(n)]
        valid = host["valid_lens"].tolist() if "valid_lens" in host else new
        extra = {name: host[name].tolist() if name in host else [0] * n
                 for name in ("status", "prefix_lens", "padded_prefix_lens")}  # fmt: skip
        return DenseStep(
            starts=cu[:n],
            new=new,
            context=host["context_lens"].tolist()[:n],
            valid=[min(v, m) for v, m in zip(valid, new, strict=False)],
            status=extra["status"],
            prefix=extra["prefix_lens"],
            padded_prefix=extra["padded_prefix_lens"],
            rows=list(rows),
            stored=[[i for i in range(new[r]) if slots[cu[r] + i] >= 0] for r in range(n)],
            rules=rules,
        )

    def groups(self) -> list[list[int]]:
        """Requests that are computed together; those without a valid token are left out."""
        small = [r for r, valid in enumerate(self.valid) if 0 < valid <= SMALL]
        return ([small] if small else []) + [[r] for r, valid in enumerate(self.valid) if valid > SMALL]


def visible(
    a: Tensor,
    b: Tensor,
    context: Tensor,
    valid: Tensor,
    status: Tensor,
    prefix: Tensor,
    padded_prefix: Tensor,
    rules: MaskRules,
) -> Tensor:
    """Whether the token at position `a` sees the one at `b`; everything broadcasts."""
    i, j = a - context, b - context
    cached, block = j < 0, rules.block_size
    own_block = b < (a // block + 1) * block
    while_prefilling = {
        "plain": j < valid,
        "causal": b <= a,
        "block_causal": own_block,
        "prefix_causal": b <= a,
        "prefix_full": torch.where(
            i < prefix, j < prefix, torch.where(i < padded_prefix, j < padded_prefix, own_block)
        ),
        "cache_only": torch.zeros_like(own_block),
    }[rules.mode]
    by_status = rules.mode in ("prefix_full", "prefix_causal")
    new = torch.where(status == 0, while_prefilling, own_block) if by_status else while_prefilling
    old = torch.ones_like(own_block)
    if rules.prefix_hole:
        old = (b < prefix) | (b >= padded_prefix)
    seen = torch.where(cached, old, new & (j < valid)) & (i < valid)
    return seen & (a - b < rules.window) if rules.window is not None else seen


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    history_k: Tensor,
    history_v: Tensor,
    step: DenseStep,
    scale: float,
    low_precision: torch.dtype | None = None,
) -> Tensor:
    """Attention of `q [T, Hq, D]` to each request's history and new keys: `[T, Hq, D]` in q's dtype.

    `history_k` and `history_v` are `[rows, positions, Hkv, D]`, zeros where nothing was stored. Rows that see nothing
    are 0. With `low_precision`, weights and results are rounded to it: the best that a matrix unit's inputs allow.
    """
    out = torch.zeros_like(q)
    device, heads = q.device, history_k.shape[2]
    group = q.shape[1] // heads

    def column(values: list[int]) -> Tensor:
        return torch.tensor(values, device=device)[:, None, None]

    for members in step.groups():
        rows = max(step.valid[r] for r in members)
        keys = max(step.context[r] + step.valid[r] for r in members)
        # Only valid new tokens are looked at: the others may be NaN, in q as well.
        own = [(m, i) for m, r in enumerate(members) for i in range(step.valid[r])]
        member, i = (torch.tensor(t, device=device) for t in zip(*own, strict=True))
        starts = torch.tensor([step.starts[r] for r in members], device=device)
        context = torch.tensor([step.context[r] for r in members], device=device)
        source = starts[member] + i
        query = q.new_zeros(len(members), rows, *q.shape[1:])
        query[member, i] = q[source]
        query = query.unflatten(2, (heads, group))
        histories = torch.tensor([step.rows[r] for r in members], device=device)
        found = []
        for history, fresh in ((history_k, k), (history_v, v)):
            all_keys = history[histories, :keys]
            all_keys[member, context[member] + i] = fresh[source]
            found.append(all_keys)
        key, value = found
        c, n_valid, status, prefix, padded = (
            column([values[r] for r in members])
            for values in (step.context, step.valid, step.status, step.prefix, step.padded_prefix)
        )
        a, b = c + torch.arange(rows, device=device)[None, :, None], torch.arange(keys, device=device)[None, None]
        seen = visible(a, b, c, n_valid, status, prefix, padded, step.rules)
        scores = torch.einsum("rnhgd,rshd->rhgns", query, key) * scale
        scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
        blind = ~seen.any(-1)[:, None, None]
        lse = scores.logsumexp(-1).masked_fill(blind, 0)
        weights = (scores - lse[..., None]).exp()
        if low_precision is not None:
            weights = weights.to(low_precision).to(q.dtype)
        result = torch.einsum("rhgns,rshd->rnhgd", weights, value).flatten(2, 3)
        if low_precision is not None:
            result = result.to(low_precision).to(q.dtype)
        out[source] = result[member, i]
    return out


def remember(k: Tensor, v: Tensor, history_k: Tensor, history_v: Tensor, step: DenseStep) -> None:
    """Put the stored new tokens of `k` and `v [T, Hkv, D]` into the histories, in place."""
    stored = [(r, i) for r, tokens in enumerate(step.stored) for i in tokens]
    if not stored:
        return
    row = torch.tensor([step.rows[r] for r, _ in stored], device=k.device)
    position = torch.tensor([step.context[r] + i for r, i in stored], device=k.device)
    source = torch.tensor([step.starts[r] + i for r, i in stored], device=k.device)
    history_k[row, position] = k[source]
    history_v[row, position] = v[source]


class DenseAttention(nn.Module):
    """Stands where `lowered_attn.Attention` stands, for one layer; `current` holds the step, shared by all layers."""

    def __init__(self, scale: float, history: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device,
                 current: dict[str, DenseStep]) -> None:  # fmt: skip
        super().__init__()
        self.scale, self.current = scale, current
        self.history_k = torch.zeros(history, dtype=dtype, device=device)
        self.history_v = torch.zeros(history, dtype=dtype, device=device)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend, then remember what the step stores; q `[T, Hq, D]`, k and v `[T, Hkv, D]`."""
        step = self.current["step"]
        out = dense_attention(q, k, v, self.history_k, self.history_v, step, self.scale)
        remember(k, v, self.history_k, self.history_v, step)
        return out
