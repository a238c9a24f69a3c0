"""What the tests of paged attention share: calls over a poisoned cache, the oracle, the derived tolerance.

Everything that attention must not read holds NaN, always: pages of nobody, slots past a request's length, new tokens
past the valid ones, a bucket's padding rows. Page ids past a request's length are -1 and 2147480000 in turn.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from custom_ops.paged.call import PagedCall
from custom_ops.paged.layout import FP8
from custom_ops.paged.masks import request_operand_names
from custom_ops.paged.reference import RequestRows, reference_attention_of, requests
from tests.helpers import HALF_EXP_ERROR, SUM_ERROR, largest_error, root_mean_square

LENGTHS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "decode": ((33, 1, 1), (0, 1, 1), (16, 1, 1), (75, 1, 1)),
    "chunks": ((30, 8, 8), (0, 12, 12), (17, 4, 4)),
    "mixed": ((30, 5, 5), (17, 1, 1), (0, 9, 9), (41, 3, 3), (3, 1, 1)),
    "ragged": ((0, 0, 0), (30, 5, 5), (12, 0, 0), (5, 7, 3), (9, 2, 0), (0, 4, 1), (0, 1, 1), (21, 6, 5)),
    "drafts": ((33, 2, 2), (0, 4, 4), (18, 3, 3), (7, 1, 1), (50, 4, 2), (12, 0, 0)),
    "long": ((5, 300, 290), (333, 2, 2)),
    "nothing": ((0, 0, 0), (7, 0, 0)),
    "nobody": (),
}
"""Requests as (cached tokens, new tokens, valid new tokens)."""
KEYS_AND_VALUES = (("k", "v"), ("k_cache", "v_cache"))
"""Arguments, of which in a call of latent attention the second is a view of the first."""
PAST_THE_LENGTH = (-1, 2147480000)
"""Page ids that lie in page tables past a request's length."""


@dataclasses.dataclass(frozen=True)
class PagedCase:
    """A call of paged attention by its sizes; ``make`` turns it into tensors."""

    mode: str = "causal"
    dtype: torch.dtype = torch.float32
    fp8: bool = False
    """Caches of float8_e4m3fn with scales."""
    heads: tuple[int, int] = (4, 2)
    """Query heads, KV heads."""
    head_dim: int = 16
    page_size: int = 16
    layout: str = "unified"
    lengths: str = "mixed"
    """A key of ``LENGTHS``."""
    direct: bool = True
    """Whether new keys come in k and v instead of through the page table."""
    window: int = 0
    block_size: int = 4
    prefix_hole: bool = False
    softcap: float = 0.0
    sinks: bool = False
    padding_rows: int = 3
    """Rows of q past the last request."""
    unseen: bool = True
    """Whether keys that no valid row sees (before a window, in a prefix hole) are NaN too."""
    impl: str = "triton_grouped"

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
        parts = [self.mode, name, "h{}x{}".format(*self.heads), f"d{self.head_dim}", f"page{self.page_size}"]
        parts += [self.layout, self.lengths, "direct" if self.direct else "cached"]
        parts += ["fp8"] * self.fp8 + ["sinks"] * self.sinks + ["hole"] * self.prefix_hole
        parts += [f"window{self.window}"] * bool(self.window) + [f"cap{self.softcap:g}"] * bool(self.softcap)
        return "-".join(parts)


def make(case: PagedCase, device: str = "cpu", placement: int = 0) -> PagedCall:
    """Random tensors of ``case``, drawn on the CPU from torch's generator.

    ``placement`` seeds which pages the requests get: calls that differ in it alone hold the same keys and values.
    """
    lengths = LENGTHS[case.lengths]
    (heads, kv_heads), head_dim, page_size = case.heads, case.head_dim, case.page_size
    new = [n for _, n, _ in lengths]
    starts = torch.tensor([0, *new]).cumsum(0)
    rows = sum(new) + case.padding_rows
    q = torch.randn(rows, heads, head_dim, dtype=torch.float64).to(case.dtype)
    fresh = torch.randn(2, rows, kv_heads, head_dim, dtype=torch.float64).to(case.dtype)
    cached = [torch.randn(2, c, kv_heads, head_dim, dtype=torch.float64).to(case.dtype) for c, _, _ in lengths]
    scales = torch.tensor([0.25, 1.5]) if case.fp8 else torch.ones(2)
    sinks = torch.randn(heads) if case.sinks else None
    values = make_request_values(case)

    # Every position that is filled gets a place; new tokens have one where they are not read directly.
    stored = [c if case.direct else c + n for c, n, _ in lengths]
    counts = [-(-length // page_size) for length in stored]
    order = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(placement))
    page_tables = torch.tensor(PAST_THE_LENGTH).repeat(max(counts, default=0) + 1)[: max(counts, default=0) + 2]
    page_tables = page_tables.repeat(len(lengths), 1)
    taken = 0
    for r, count in enumerate(counts):
        page_tables[r, :count] = order[taken : taken + count]
        taken += count
    pages = torch.full((2, len(order), page_size, kv_heads, head_dim), math.nan)
    padded = torch.ones(rows, dtype=torch.bool)
    for r, (_, _, valid) in enumerate(lengths):
        start = int(starts[r])
        padded[start : start + valid] = False
        tokens = cached[r] if case.direct else torch.cat([cached[r], fresh[:, start : start + valid]], 1)
        position = torch.arange(tokens.shape[1])
        pages[:, page_tables[r, position // page_size], position % page_size] = tokens.float()
    pages /= scales[:, None, None, None, None]
    q, fresh = q.masked_fill(padded[:, None, None], math.nan), fresh.masked_fill(padded[:, None, None], math.nan)
    cache_dtype = FP8 if case.fp8 else case.dtype
    call = PagedCall(
        q=q,
        k=fresh[0] if case.direct else None,
        v=fresh[1] if case.direct else None,
        k_cache=lay_out_keys(pages[0], case.layout, cache_dtype),
        v_cache=lay_out_values(pages[1], case.layout, cache_dtype),
        cu_seqlens_q=starts.to(torch.int32),
        context_lens=torch.tensor([c for c, _, _ in lengths], dtype=torch.int32),
        page_tables=page_tables.to(torch.int32),
        valid_lens=None
        if all(n == valid for _, n, valid in lengths)
        else torch.tensor([valid for _, _, valid in lengths], dtype=torch.int32),
        request_values=values,
        sinks=sinks,
        k_scale=scales[:1].clone() if case.fp8 else None,
        v_scale=scales[1:].clone() if case.fp8 else None,
        mode=case.mode,
        block_size=case.block_size,
        window=case.window,
        prefix_hole=case.prefix_hole,
        layout=case.layout,
        softcap=case.softcap,
        impl=case.impl,
    )
    if case.unseen:
        poison_unseen(call)
    return moved(call, device)


def make_request_values(case: PagedCase) -> list[Tensor]:
    """The mode's values: every other request decodes, prefixes end anywhere in the new or in the cached tokens."""
    lengths = LENGTHS[case.lengths]
    longest = torch.tensor([max(c, n) for c, n, _ in lengths], dtype=torch.int64)
    prefix = (torch.rand(len(lengths)) * (longest + 1)).long()
    made = {
        "status": torch.arange(len(lengths)) % 2,
        "prefix": prefix,
        "padded_prefix": prefix + torch.arange(len(lengths)) % 4,
    }
    return [made[name].to(torch.int32) for name in request_operand_names(case.mode, case.prefix_hole)]


def lay_out_keys(pages: Tensor, layout: str, dtype: torch.dtype) -> Tensor:
    """``pages [pages, page_size, Hkv, D]`` as a key cache, element by element as the layout's definition says."""
    count, page_size, heads, head_dim = pages.shape
    if layout == "unified":
        return pages.to(dtype)
    x = 16 // dtype.itemsize
    cache = pages.new_empty(count, heads, head_dim // x, page_size, x)
    for d in range(head_dim):
        cache[:, :, d // x, :, d % x] = pages[:, :, :, d].transpose(1, 2)
    return cache.to(dtype)


def lay_out_values(pages: Tensor, layout: str, dtype: torch.dtype) -> Tensor:
    """The same as a value cache."""
    if layout == "unified":
        return pages.to(dtype)
    count, page_size, heads, head_dim = pages.shape
    cache = pages.new_empty(count, heads, head_dim, page_size)
    for offset in range(page_size):
        cache[:, :, :, offset] = pages[:, offset]
    return cache.to(dtype)


def poison_unseen(call: PagedCall) -> None:
    """NaN into every cached key and value that no valid row of its request sees."""
    layout, page_size = call.cache_layout, call.cache_sizes.page_size
    for request in requests(call, torch.float32):
        r = request.number
        (positions,) = (~request.visible.any(0)).nonzero(as_tuple=True)
        positions = positions[positions < call.context_lens[r]] if call.direct else positions
        pages, offsets = call.page_tables[r, positions // page_size].long(), positions % page_size
        for tokens in (layout.key_tokens(call.k_cache), layout.value_tokens(call.v_cache)):
            for page, offset in zip(pages.tolist(), offsets.tolist(), strict=True):
                tokens[page, offset] = math.nan


def moved(call: PagedCall, device: str) -> PagedCall:
    """``call`` on another device."""
    fields = {n: t.to(device) if isinstance(t, Tensor) else t for n, t in vars(call).items()}
    fields["request_values"] = [t.to(device) for t in call.request_values]
    if call.latent:
        views = {v: fields[k] if fields[k] is None else fields[k][..., : call.value_dim] for k, v in KEYS_AND_VALUES}
        fields.update(views)
    return type(call)(**fields)


def attend(call: PagedCall) -> tuple[Tensor, Tensor]:
    """The op."""
    return torch.ops.lowered_attn.paged_attention(**vars(call))


# ---------------------------------------------------------------------- the oracle and the derived tolerance


def oracle(call: PagedCall) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` in fp64, on the CPU."""
    return reference_attention_of(moved(call, "cpu"), torch.float64)


def low_precision(call: PagedCall) -> tuple[Tensor, Tensor]:
    """Results as arithmetic in q's dtype gives them, on the CPU: what a matrix unit can do at best.

    Dequantised keys and values and the weights are rounded to q's dtype before they are multiplied, products summed in
    fp32. For fp32 nothing is rounded.
    """
    call = moved(call, "cpu")
    dtype = call.q.dtype
    out = torch.zeros((*call.q.shape[:2], call.out_dim), dtype=dtype)
    lse = torch.full(call.q.shape[:2], -math.inf)
    for request in requests(call, torch.float32):
        query, key, value = (t.transpose(0, 1).to(dtype).float() for t in (request.query, request.key, request.value))
        logits = capped((query @ key.transpose(1, 2)) * call.score_scale, call, request)
        row_lse = logits.logsumexp(-1)
        if call.sinks is not None:
            row_lse = torch.logaddexp(row_lse, call.sinks[:, None])
        blind = ~request.visible.any(-1)
        weights = (logits - row_lse.masked_fill(blind, 0)[..., None]).exp().to(dtype).float()
        out[request.rows] = (weights @ value).to(dtype).transpose(0, 1)
        lse[request.rows] = row_lse.masked_fill(blind, -math.inf).t()
    return out, lse


def capped(scores: Tensor, call: PagedCall, request: RequestRows) -> Tensor:
    """Scores with the cap, if any, -inf where a row does not see a key."""
    if call.softcap:
        scores = call.softcap * (scores / call.softcap).tanh()
    return scores.masked_fill(~request.visible, -math.inf)


def floors(call: PagedCall, exact: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """What no error bound of out and lse may undercut; see ``tests.helpers.floors``."""
    on_cpu = moved(call, "cpu")
    found = list(requests(on_cpu, torch.float32))
    parts = [[r.query for r in found], [r.key for r in found], [r.value for r in found]]
    q, k, v = (max((root_mean_square(t) for t in part), default=0.0) for part in parts)
    unit = SUM_ERROR * torch.finfo(torch.float32).eps
    out = unit * v + torch.finfo(call.q.dtype).eps / 2 * float(exact[0].abs().max() if exact[0].numel() else 0)
    lse = unit * (1 + call.score_scale * q * k * math.sqrt(call.q.shape[2]))
    if call.q.device.type == "cpu" and call.q.dtype != torch.float32:
        lse += HALF_EXP_ERROR
    return out, lse


def assert_as_exact_as_the_reference(out: Tensor, lse: Tensor, call: PagedCall) -> None:
    """``out`` and ``lse`` are as close to fp64 as q's dtype allows: twice its own error plus ``floors``."""
    assert out.shape == (*call.q.shape[:2], call.out_dim) and out.dtype == call.q.dtype and out.is_contiguous()
    assert lse.shape == call.q.shape[:2] and lse.dtype == torch.float32 and lse.is_contiguous()
    exact, low = oracle(call), low_precision(call)
    for name, actual, true, own, floor in zip(("out", "lse"), (out, lse), exact, low, floors(call, exact), strict=True):
        allowed = 2 * largest_error(own, true) + floor
        error = largest_error(actual, true)
        assert error <= allowed, f"{name}: error {error:.3e} against fp64, allowed {allowed:.3e}"


def changed(call: PagedCall, **fields: Any) -> PagedCall:
    """``call`` with other arguments."""
    return dataclasses.replace(call, **fields)
