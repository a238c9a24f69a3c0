"""The named cases of paged attention and of the KV store, for benchmarks: shapes as data.

    python -m tools.bench --list

A paged case is one step of a serving engine: each request has tokens in a paged cache and new tokens in the batch.
Tensors are drawn on the device that measures, from a seed: a cache of a GiB drawn on a CPU would take longer than the
measurement. What a case must compute and move is counted here, without `custom_ops`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

AIM = "aim"
"""In ratios, the case's aim stands beside the peers under this name."""


@dataclass(frozen=True)
class Target:
    """What a variant has to reach: at least `at_least` times as fast as `peer`."""

    variant: str
    peer: str
    """A variant's name."""
    at_least: float


@dataclass(frozen=True)
class PagedInputs:
    """One step's tensors, made once and shared by all variants. The cache holds the new keys as well."""

    query: Tensor
    """`[T, Hq, D]`, requests one after another."""
    key: Tensor
    """`[T, Hkv, D]`, the new keys: equal to what the cache holds in their slots."""
    value: Tensor
    """`[T, Hkv, Dv]`, the new values, likewise."""
    k_cache: Tensor
    """`[pages, page_size, Hkv, D]`."""
    v_cache: Tensor
    """`[pages, page_size, Hkv, Dv]`."""
    cu_seqlens_q: Tensor
    """int32 `[R + 1]`."""
    context_lens: Tensor
    """int32 `[R]`, tokens cached before this step."""
    page_tables: Tensor
    """int32 `[R, max_pages]`: pages in a random order, 0 beyond a request's length."""
    slot_mapping: Tensor
    """int64 `[T]`, where the new tokens lie: page * page_size + offset."""


@dataclass(frozen=True)
class PagedProblem:
    """A case and its tensors."""

    case: PagedCase
    inputs: PagedInputs

    @property
    def query(self) -> Tensor:
        """`[T, Hq, D]`."""
        return self.inputs.query


@dataclass(frozen=True)
class PagedCase:
    """One step of attention over a paged cache. Lengths are in tokens."""

    name: str
    """How the command line and the results call it."""
    label: str
    """The batch in a few words, for tables."""
    requests: tuple[tuple[int, int], ...]
    """`(cached before this step, new)` of each request."""
    page_size: int
    query_heads: int = 32
    """Hq."""
    kv_heads: int = 8
    """Hkv, which divides Hq."""
    head_dim: int = 128
    """D."""
    value_dim: int | None = None
    """Dv, where the cache holds latents: one KV head, whose value is the first Dv elements of its key."""
    scale: float | None = None
    """What scores are multiplied by; None: 1 / sqrt(D)."""
    block_size: int = 1
    """Tokens of a block: above 1 the mode is block-causal, else causal."""
    dtype: torch.dtype = torch.bfloat16
    """Of queries and caches."""
    aim_ms: float | None = None
    """The time to reach, where the case has one."""
    aim_tb_per_s: float | None = None
    """The rate to reach, where the case has one."""
    targets: tuple[Target, ...] = ()
    variants: tuple[str, ...] = ("ours", "fa3")
    """Those measured by default."""
    design_row: str | None = None
    """The row of the design's table of numbers, where the case is one."""

    @property
    def title(self) -> str:
        """The shape in one line."""
        heads = f"H{self.query_heads}/{self.kv_heads} D{self.head_dim}"
        if self.value_dim is not None:
            heads = f"H{self.query_heads} {self.head_dim}/{self.value_dim}"
        return f"{self.label} {heads} page {self.page_size}"

    @property
    def out_dim(self) -> int:
        """Elements of a value, and of a row of the output."""
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def score_scale(self) -> float:
        """What scores are multiplied by."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def mode(self) -> str:
        """The paged mask's name: `"causal"` or `"block_causal"`."""
        return "causal" if self.block_size == 1 else "block_causal"

    @property
    def tokens(self) -> int:
        """T: new tokens of all requests."""
        return sum(new for _, new in self.requests)

    @property
    def is_decode(self) -> bool:
        """Whether every request has one new token."""
        return self.tokens == len(self.requests)

    @property
    def max_new(self) -> int:
        """Most new tokens of a request."""
        return max(new for _, new in self.requests)

    @property
    def max_keys(self) -> int:
        """Most keys of a request, cached and new."""
        return max(cached + new for cached, new in self.requests)

    @property
    def pages(self) -> int:
        """Pages that the requests own together."""
        return sum(-(-(cached + new) // self.page_size) for cached, new in self.requests)

    @property
    def shapes(self) -> dict[str, object]:
        """What the results file says of the call's tensors."""
        return {
            "requests": len(self.requests),
            "tokens": self.tokens,
            "keys": sum(cached + new for cached, new in self.requests),
            "q": [self.tokens, self.query_heads, self.head_dim],
            "k_cache": [self.pages, self.page_size, self.kv_heads, self.head_dim],
            "mode": self.mode,
            "block_size": self.block_size,
        }

    def keys_seen(self, cached: int, new: int) -> list[int]:
        """For each new token of a request, how many keys it sees: those before that position, and only those."""
        block = self.block_size
        return [min(((cached + i) // block + 1) * block, cached + new) for i in range(new)]

    @property
    def visible_pairs(self) -> int:
        """(query, key) pairs that one head computes, over all requests."""
        return sum(sum(self.keys_seen(cached, new)) for cached, new in self.requests)

    @property
    def flops(self) -> int:
        """Floating-point operations: two for each multiply-add of both products."""
        return 2 * self.visible_pairs * (self.head_dim + self.out_dim) * self.query_heads

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values of every request, of the queries and of the outputs, each moved once."""
        keys = sum(cached + new for cached, new in self.requests) * self.kv_heads
        of_key = self.head_dim if self.value_dim is not None else 2 * self.head_dim  # a latent is key and value
        of_row = self.head_dim + self.out_dim
        return (keys * of_key + self.tokens * self.query_heads * of_row) * self.dtype.itemsize

    @property
    def aim(self) -> float | None:
        """The aim in ms."""
        return self.bytes / self.aim_tb_per_s / 1e9 if self.aim_tb_per_s is not None else self.aim_ms

    def problem(self, device: torch.device | str, seed: int = 0) -> PagedProblem:
        """The case's tensors on `device`, drawn with `seed`: q, k and v standard normal, pages in a random order.

        Values of latents are views of the keys.
        """
        torch.manual_seed(seed)
        pages, size = self.pages, self.page_size
        shape = (pages, size, self.kv_heads, self.head_dim)
        k_cache = torch.randn(shape, dtype=self.dtype, device=device)
        if self.value_dim is None:
            v_cache = torch.randn(shape, dtype=self.dtype, device=device)
        else:
            v_cache = k_cache[..., : self.value_dim]
        query = torch.randn(self.tokens, self.query_heads, self.head_dim, dtype=self.dtype, device=device)
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(seed)).to(torch.int32)
        counts = [-(-(cached + new) // size) for cached, new in self.requests]
        tables = torch.zeros(len(self.requests), -(-self.max_keys // size), dtype=torch.int32)
        slots = []
        for row, owned, (cached, new) in zip(tables, order.split(counts), self.requests, strict=True):
            row[: len(owned)] = owned
            positions = torch.arange(cached, cached + new)
            slots.append(row[positions // size].long() * size + positions % size)
        slot_mapping = torch.cat(slots).to(device)
        starts = torch.tensor([0, *(new for _, new in self.requests)]).cumsum(0)
        inputs = PagedInputs(
            query=query,
            key=k_cache.flatten(0, 1)[slot_mapping],
            value=v_cache.flatten(0, 1)[slot_mapping],
            k_cache=k_cache,
            v_cache=v_cache,
            cu_seqlens_q=starts.to(device, torch.int32),
            context_lens=torch.tensor([cached for cached, _ in self.requests], dtype=torch.int32, device=device),
            page_tables=tables.to(device),
            slot_mapping=slot_mapping,
        )
        return PagedProblem(self, inputs)


def exact_paged(problem: PagedProblem, max_scores: int = 2**28) -> Tensor:
    """The step's output `[T, Hq, D]` in float32, a request and a few KV heads at a time (2**28 scores are 1 GiB)."""
    case, inputs = problem.case, problem.inputs
    group, scale = case.query_heads // case.kv_heads, case.score_scale
    out = torch.empty((*inputs.query.shape[:2], case.out_dim), device=inputs.query.device)
    first = 0
    for pages, (cached, new) in zip(inputs.page_tables, case.requests, strict=True):
        length, rows = cached + new, slice(first, first + new)
        first += new
        owned = pages[: -(-length // case.page_size)].long()
        k, v = (cache[owned].flatten(0, 1)[:length].float() for cache in (inputs.k_cache, inputs.v_cache))
        seen = torch.tensor(case.keys_seen(cached, new), device=out.device)
        hidden = torch.arange(length, device=out.device) >= seen[:, None]  # [new, length]
        step = max(1, min(case.kv_heads, max_scores // (group * new * length)))
        for head in range(0, case.kv_heads, step):
            kv, heads = slice(head, head + step), slice(head * group, (head + step) * group)
            q = inputs.query[rows, heads].float().unflatten(1, (-1, group))
            scores = torch.einsum("qhgd,khd->hgqk", q, k[:, kv]).mul_(scale).masked_fill_(hidden, -torch.inf)
            out[rows, heads] = torch.einsum("hgqk,khd->qhgd", scores.softmax(-1), v[:, kv]).flatten(1, 2)
    return out


# ------------------------------------------------------------------ the list


def _ragged(count: int, cached: tuple[int, int], new: tuple[int, int], seed: int) -> tuple[tuple[int, int], ...]:
    """`count` requests with lengths drawn evenly from both ranges, ends included; the same on every machine."""
    draw = random.Random(seed).randint
    return tuple((draw(*cached), draw(*new)) for _ in range(count))


def decode(keys: int, count: int) -> tuple[tuple[int, int], ...]:
    """`count` requests of `keys` keys, the one new token's included."""
    return ((keys - 1, 1),) * count


_ALL = ("ours", "ours-layer", "ours-direct", "ours-triton", "fa3")
_DECODE_TARGETS = (
    Target("ours", "fa3", 0.99),
    Target("ours-direct", "fa3", 0.95),
    Target("ours-triton", "fa3", 0.95),
)
_CHUNK_TARGETS = _DECODE_TARGETS[:2]
_SWEEP_TARGET = (Target("ours", "fa3", 0.9),)

_DECODE = PagedCase(
    "decode_b64_k4096", "decode B64 ctx 4096", decode(4096, 64), 16,
    aim_tb_per_s=4.15, targets=_DECODE_TARGETS, variants=(*_ALL, "vllm", "vllm-split"),
    design_row="paged decode B64 ctx 4096 H32/8 D128 page 16",
)  # fmt: skip
_CHUNK = PagedCase(
    "chunk_b32_q32_c2048", "chunk B32 q32 block 32 ctx 2048", ((2048, 32),) * 32, 32, block_size=32,
    aim_ms=0.080, targets=_CHUNK_TARGETS, variants=_ALL,
    design_row="diffusion chunk B32 q32 block 32 ctx 2048 page 32",
)  # fmt: skip

_LIST = (
    _DECODE,
    PagedCase(
        "decode_b1_k65536", "decode B1 ctx 65536", decode(65536, 1), 16,
        aim_tb_per_s=3.8, targets=_DECODE_TARGETS, variants=(*_ALL, "vllm"),
        design_row="paged decode B1 ctx 65536",
    ),
    PagedCase(
        "decode_b128_ragged", "decode B128 ragged 128..8192",
        tuple((cached, 1) for cached, _ in _ragged(128, (127, 8191), (1, 1), seed=0)), 16,
        aim_ms=0.540, targets=_DECODE_TARGETS, variants=(*_ALL, "vllm", "vllm-split"),
        design_row="paged decode B128 ragged 128..8192",
    ),
    _CHUNK,
    PagedCase(
        "chunk_b16_q128_c4096", "chunk B16 q128 block 32 ctx 4096", ((4096, 128),) * 16, 32, block_size=32,
        aim_ms=0.24, targets=_CHUNK_TARGETS, variants=_ALL,
        design_row="diffusion chunk B16 q128 block 32 ctx 4096",
    ),
    PagedCase(
        "chunk_b128_q4_c1024", "chunk B128 q4 block 4 ctx 1024", ((1024, 4),) * 128, 16, block_size=4,
        aim_ms=0.140, targets=_CHUNK_TARGETS, variants=_ALL,
        design_row="diffusion chunk B128 q4 block 4 ctx 1024 page 16",
    ),
    PagedCase(
        "mix_b24_q32_128", "mix B24 q 32..128 ctx 1024..8192", _ragged(24, (1024, 8192), (32, 128), seed=0), 16,
        targets=(Target("ours", "fa3", 1.1),), variants=(*_ALL, "vllm"),
    ),
    PagedCase(
        "prefill_b8_q2048_c8192", "chunked prefill B8 q2048 ctx 8192", ((8192, 2048),) * 8, 16,
        targets=(Target("ours", "vllm", 1.3),), variants=(*_ALL, "vllm"),
    ),
    *(
        replace(
            base, name=f"{base.name}_{suffix}", query_heads=heads, kv_heads=kv_heads, head_dim=dim,
            aim_ms=None, aim_tb_per_s=None, targets=_SWEEP_TARGET, variants=("ours", "fa3"), design_row=None,
        )
        for base in (_DECODE, _CHUNK)
        for suffix, heads, kv_heads, dim in (
            ("g1", 8, 8, 128), ("g7", 28, 4, 128), ("g8", 64, 8, 128), ("d64", 32, 8, 64), ("d256", 32, 8, 256),
        )
    ),
)  # fmt: skip

PAGED_CASES: dict[str, PagedCase] = {case.name: case for case in _LIST}
"""Every paged case by name, in the order measured: the design's rows first, for a run that is cut short."""
