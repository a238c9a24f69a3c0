"""The KV store, measured: qk-norm, RoPE and the stores of K and V as one compiled function, or as separate ones.

The work is a Qwen3 layer's between its projection and its attention. Three variants do it over the same tensors:

- `ours`: one function under `torch.compile(backend="lowered_attn")`, with `store_kv_cache` inside.
- `separate`: what an engine does whose store the compiler cannot see: five calls, each as good as it gets alone. The
  norm of q, the norm of k, RoPE of q and RoPE of k are four functions under plain `torch.compile` (one kernel each),
  the store of K and V is the op's own kernel.
- `eager`: the function of `ours`, not compiled.

Each variant has caches of its own, full of NaN before it first runs, and all are replayed as CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tools.paged_cases import Target
from tools.variants import Prepared, Variant

EPS = 1e-6


@dataclass(frozen=True)
class StoreCase:
    """One layer's norm, RoPE and store for T new tokens."""

    name: str
    """How the command line and the results call it."""
    tokens: int
    """T."""
    copies: int
    """Calls in one CUDA graph, whose time is divided by it: a replay costs about 3 us, more than the smallest call."""
    query_heads: int = 32
    """Hq."""
    kv_heads: int = 8
    """Hkv."""
    head_dim: int = 128
    """D."""
    page_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    targets: tuple[Target, ...] = (Target("ours", "separate", 1.6),)
    variants: tuple[str, ...] = ("ours", "separate", "eager")
    aim: float | None = None

    @property
    def title(self) -> str:
        """The shape in one line."""
        return f"store T{self.tokens} H{self.query_heads}/{self.kv_heads} D{self.head_dim} page {self.page_size}"

    @property
    def flops(self) -> int:
        """0: there is no matrix product, and memory is the limit."""
        return 0

    @property
    def bytes(self) -> int:
        """Bytes of q, k, v, cos and sin read once; of q and both stores written once; of the slots."""
        heads = 2 * (self.query_heads + 2 * self.kv_heads)
        return self.tokens * ((heads + 2) * self.head_dim * self.dtype.itemsize + 8)

    @property
    def shapes(self) -> dict[str, object]:
        """What the results file says of the call's tensors."""
        heads = self.query_heads + 2 * self.kv_heads
        return {"tokens": self.tokens, "projected": [self.tokens, heads * self.head_dim], "copies": self.copies}

    def problem(self, device: torch.device | str, seed: int = 0) -> StoreProblem:
        """The case's tensors on `device`, drawn with `seed`; the tokens fill pages in a random order."""
        torch.manual_seed(seed)
        heads = self.query_heads + 2 * self.kv_heads
        projected = torch.randn(self.tokens, heads * self.head_dim, dtype=self.dtype, device=device)
        angles = torch.rand(self.tokens, self.head_dim // 2, device=device) * 6.28
        pages = -(-self.tokens // self.page_size) + 1
        at = torch.arange(self.tokens)
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(seed))
        slots = order[at // self.page_size] * self.page_size + at % self.page_size
        return StoreProblem(
            case=self,
            projected=projected,
            query_weight=1 + 0.1 * torch.randn(self.head_dim, device=device),
            key_weight=1 + 0.1 * torch.randn(self.head_dim, device=device),
            cos=angles.cos().repeat(1, 2).to(self.dtype),
            sin=angles.sin().repeat(1, 2).to(self.dtype),
            slots=slots.to(device),
            pages=pages,
        )


@dataclass(frozen=True)
class StoreProblem:
    """A case and its tensors."""

    case: StoreCase
    projected: Tensor
    """`[T, (Hq + 2 Hkv) * D]`: q, k and v as one projection leaves them."""
    query_weight: Tensor
    """fp32 `[D]`, of q's norm."""
    key_weight: Tensor
    """fp32 `[D]`, of k's norm."""
    cos: Tensor
    """`[T, D]`."""
    sin: Tensor
    """`[T, D]`."""
    slots: Tensor
    """int64 `[T]`."""
    pages: int
    """Of each cache."""

    @property
    def query(self) -> Tensor:
        """`[T, Hq, D]`, a view of the projection."""
        return self.split(self.projected)[0]

    def split(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q `[T, Hq, D]`, k and v `[T, Hkv, D]`: views."""
        case = self.case
        heads = projected.unflatten(-1, (-1, case.head_dim))
        query, key, value = heads.split([case.query_heads, case.kv_heads, case.kv_heads], dim=1)
        return query, key, value


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm over the last dimension, in fp32, in x's dtype."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * weight).to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of x `[T, H, D]` by angles `[T, D]`, in fp32, in x's dtype."""
    wide = x.float()
    left, right = wide.chunk(2, -1)
    turned = torch.cat([-right, left], -1)
    return (wide * cos[:, None].float() + turned * sin[:, None].float()).to(x.dtype)


def exact_store(problem: StoreProblem) -> Tensor:
    """Rotated q, stored k and stored v in float32, `[T, Hq + 2 Hkv, D]`: nothing is rounded in between."""
    query, key, value = (part.float() for part in problem.split(problem.projected))
    cos, sin = problem.cos.float(), problem.sin.float()
    turned = [rope(norm(x, w), cos, sin) for x, w in ((query, problem.query_weight), (key, problem.key_weight))]
    return torch.cat([*turned, value], dim=1)


class Layer(nn.Module):
    """Norm, RoPE and store of one layer, over caches that it owns as static buffers."""

    def __init__(self, problem: StoreProblem) -> None:
        super().__init__()
        self.problem = problem
        case = problem.case
        shape = (problem.pages, case.page_size, case.kv_heads, case.head_dim)
        self.k_cache: Tensor
        self.v_cache: Tensor
        for name in ("k_cache", "v_cache"):
            empty = torch.full(shape, torch.nan, dtype=case.dtype, device=problem.projected.device)
            self.register_buffer(name, empty)

    def forward(self, projected: Tensor) -> Tensor:
        """Store k and v of `projected`; return q `[T, Hq, D]`, normed and rotated."""
        problem = self.problem
        query, key, value = problem.split(projected)
        key = rope(norm(key, problem.key_weight), problem.cos, problem.sin)
        torch.ops.lowered_attn.store_kv_cache(key, value, self.k_cache, self.v_cache, problem.slots)
        return rope(norm(query, problem.query_weight), problem.cos, problem.sin)

    def stored(self, query: Tensor) -> tuple[Tensor]:
        """What a run left, `[T, Hq + 2 Hkv, D]`: its q, and k and v as the caches hold them."""
        kept = [cache.flatten(0, 1)[self.problem.slots] for cache in (self.k_cache, self.v_cache)]
        return (torch.cat([query, *kept], dim=1),)


def _prepared(layer: Layer, call: Callable[[Tensor], Tensor]) -> Prepared:
    projected = layer.problem.projected

    def run() -> Tensor:
        with torch.no_grad():
            return call(projected)

    return Prepared(run, layer.stored, written=(layer.k_cache, layer.v_cache))


def _ours(problem: StoreProblem) -> Prepared:
    from lowered_attn.compile import backend  # what the name "lowered_attn" stands for in an installed package

    layer = Layer(problem)
    return _prepared(layer, torch.compile(layer, backend=backend, fullgraph=True, dynamic=False))


def _separate(problem: StoreProblem) -> Prepared:
    layer = Layer(problem)
    # Static shapes: q and k each get a kernel of their own from either function.
    compiled_norm, compiled_rope = (torch.compile(part, fullgraph=True, dynamic=False) for part in (norm, rope))

    def call(projected: Tensor) -> Tensor:
        query, key, value = problem.split(projected)
        query, key = compiled_norm(query, problem.query_weight), compiled_norm(key, problem.key_weight)
        query, key = compiled_rope(query, problem.cos, problem.sin), compiled_rope(key, problem.cos, problem.sin)
        torch.ops.lowered_attn.store_kv_cache(key, value, layer.k_cache, layer.v_cache, problem.slots)
        return query

    return _prepared(layer, call)


def _eager(problem: StoreProblem) -> Prepared:
    layer = Layer(problem)
    return _prepared(layer, layer)


STORE_CASES: dict[str, StoreCase] = {
    case.name: case
    for case in (
        StoreCase("store_t64", 64, copies=20),
        StoreCase("store_t2048", 2048, copies=10),
        StoreCase("store_t16384", 16384, copies=2),
    )
}
"""Every store case by name."""

STORE_VARIANTS: dict[str, Variant[StoreProblem]] = {
    variant.name: variant
    for variant in (
        Variant("ours", "one compiled function", _ours, ours=True, compiled=True),
        Variant("separate", "separate kernels", _separate, compiled=True),
        Variant("eager", "eager", _eager),
    )
}
"""Every way to store by name."""
