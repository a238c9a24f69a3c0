"""Models around a cache of latents, and the GPU code that torch.compile generates for them without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from inductor_passes import decisions
from inductor_passes.pretend_gpu import Generated, generate, pretend_gpu
from lowered_attn.compile import backend
from tests.test_paged_codegen import norm

OPS = torch.ops.lowered_attn
PAGE_SIZE, PAGES, TOKENS, REQUESTS, HEADS = 64, 64, 32, 4, 16
SLOTS = PAGES * PAGE_SIZE
COMPRESSED, HIDDEN = 1536, 256
Rope = Callable[[Tensor, Tensor, Tensor], Tensor]


def by_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of x ``[..., R]`` in fp32."""
    left, right = x.float().chunk(2, -1)
    return (x.float() * cos + torch.cat([-right, left], -1) * sin).to(x.dtype)


def interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of neighbours, as in DeepSeek's published weights."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., ::2], sin[..., ::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


def bf16(*size: int) -> Tensor:
    return torch.empty(*size, dtype=torch.bfloat16, device="cuda")


def int32(*size: int) -> Tensor:
    return torch.empty(*size, dtype=torch.int32, device="cuda")


def slots() -> Tensor:
    return torch.empty(TOKENS, dtype=torch.int64, device="cuda")


def lengths() -> tuple[Tensor, ...]:
    """cu_seqlens_q, context_lens, page_tables."""
    return int32(REQUESTS + 1), int32(REQUESTS), int32(REQUESTS, 8)


class Store(nn.Module):
    """What becomes of a projection's output: norm of the value, RoPE of the rest, the store of both.

    ``turns`` ``[T, 2R]``: cos and sin of each row's angles.
    """

    def __init__(
        self, split: tuple[int, int] = (512, 64), rope: Rope = by_halves, reads: str = "nothing",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:  # fmt: skip
        super().__init__()
        self.split, self.rope, self.reads = split, rope, reads
        self.weight = nn.Parameter(torch.empty(split[0], device="cuda"), requires_grad=False)
        self.cache = nn.Buffer(torch.empty(PAGES, PAGE_SIZE, sum(split), dtype=dtype, device="cuda"))

    def latent(self, projected: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        value, rest = projected.split(self.split, 1)
        return torch.cat([norm(value, self.weight).to(value.dtype), self.rope(rest, cos, sin)], 1)

    def forward(self, projected: Tensor, turns: Tensor, slots: Tensor) -> Tensor | None:
        latent = self.latent(projected, *turns.chunk(2, 1))
        before = latent + 1 if self.reads == "before" else None
        OPS.store_latent_cache(latent, self.cache, slots)
        return latent if self.reads == "after" else before

    def inputs(self) -> tuple[Tensor, ...]:
        projected = torch.empty(TOKENS, sum(self.split), dtype=self.cache.dtype, device="cuda")
        return projected, torch.empty(TOKENS, 2 * self.split[1], device="cuda"), slots()


class StoreView(Store):
    """The latent has a dimension of one head on its way, and is read after the store."""

    def forward(self, projected: Tensor, turns: Tensor, slots: Tensor) -> Tensor:  # type: ignore[override]
        latent = self.latent(projected, *turns.chunk(2, 1)).unflatten(1, (1, -1)).squeeze(1)
        OPS.store_latent_cache(latent, self.cache, slots)
        return latent


class StoreNorm(Store):
    """A latent that is no cat: no rotary elements."""

    def forward(self, projected: Tensor, turns: Tensor, slots: Tensor) -> None:
        OPS.store_latent_cache(norm(projected, self.weight).to(projected.dtype), self.cache, slots)


class StoreRows(Store):
    """A cat of rows: nothing to store in pieces."""

    def forward(self, projected: Tensor, turns: Tensor, slots: Tensor) -> None:
        OPS.store_latent_cache(torch.cat(projected.split(TOKENS // 2)[::-1]), self.cache, slots)


class StoreWithQueries(Store):
    """The store beside the norm of compressed queries, from one projection."""

    def __init__(self) -> None:
        super().__init__()
        self.q_weight = nn.Parameter(torch.empty(COMPRESSED, device="cuda"), requires_grad=False)

    def forward(self, projected: Tensor, *rest: Tensor) -> Tensor:  # type: ignore[override]
        q, kv = projected.split([COMPRESSED, sum(self.split)], 1)
        super().forward(kv, *rest)
        return norm(q, self.q_weight).to(q.dtype)

    def inputs(self) -> tuple[Tensor, ...]:
        return bf16(TOKENS, COMPRESSED + sum(self.split)), *super().inputs()[1:]


class Layer(nn.Module):
    """A layer's attention part: norm, projections, the store, attention over latents, gate, projection, residual."""

    def __init__(self, direct: bool, schedules: bool, cache: Tensor | None = None, **names: Any) -> None:
        super().__init__()
        self.store = Store()
        if cache is not None:
            self.store.cache = cache
        options = {"bias": False, "device": "cuda", "dtype": torch.bfloat16}
        width = sum(self.store.split)
        self.q, self.kv = nn.Linear(HIDDEN, HEADS * width, **options), nn.Linear(HIDDEN, width, **options)
        self.gate, self.out = nn.Linear(HIDDEN, HEADS, **options), nn.Linear(HEADS * 512, HIDDEN, **options)
        self.weight = nn.Parameter(torch.empty(HIDDEN, device="cuda"), requires_grad=False)
        self.direct, self.schedules, self.names = direct, schedules, names

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, *lengths: Tensor) -> Tensor:
        hidden = norm(x, self.weight).to(x.dtype)
        q = self.q(hidden).unflatten(1, (HEADS, -1))
        latent = self.store.latent(self.kv(hidden), cos, sin)
        OPS.store_latent_cache(latent, self.store.cache, slots)
        cu_seqlens_q, context_lens, page_tables = lengths
        schedule = None
        if self.schedules:
            schedule = OPS.paged_schedule(
                cu_seqlens_q, context_lens, None, [], num_tokens=q.shape[0], num_heads=HEADS, num_kv_heads=1,
                head_dim=q.shape[2], page_size=PAGE_SIZE, dtype=q.dtype, cache_dtype=q.dtype, direct=self.direct,
                value_dim=512, **self.names,
            )  # fmt: skip
        attended, _ = OPS.paged_latent_attention(
            q, latent if self.direct else None, self.store.cache, cu_seqlens_q, context_lens, page_tables, None, [],
            schedule, value_dim=512, scale=192**-0.5, **self.names,
        )  # fmt: skip
        gated = attended * torch.sigmoid(self.gate(hidden))[..., None]
        return x + self.out(gated.flatten(1))


class Model(nn.Module):
    """Layers, whose caches may be slices of one tensor."""

    def __init__(
        self, layers: int = 2, direct: bool = False, schedules: bool = True, together: bool = False,
        windows: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        super().__init__()
        caches = bf16(layers, PAGES, PAGE_SIZE, 576).unbind() if together else [None] * layers
        names = [{"window": window} for window in windows] or [{}] * layers
        self.layers = nn.ModuleList(Layer(direct, schedules, c, **n) for c, n in zip(caches, names, strict=True))

    def forward(self, x: Tensor, angles: Tensor, *rest: Tensor) -> Tensor:
        both = torch.cat([angles, angles], -1)
        for layer in self.layers:
            x = layer(x, both.cos(), both.sin(), *rest)
        return x

    def inputs(self) -> tuple[Tensor, ...]:
        return bf16(TOKENS, HIDDEN), torch.empty(TOKENS, 32, device="cuda"), slots(), *lengths()


class Attend(nn.Module):
    """One attention call, a gate for each of its heads, a cast."""

    def __init__(
        self, split: tuple[int, int] = (512, 64), heads: int = HEADS, direct: bool = False, lse: bool = False,
        request_values: int = 0, tokens: int = TOKENS, to: torch.dtype = torch.bfloat16, **names: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.cache = nn.Buffer(bf16(PAGES, PAGE_SIZE, sum(split)))
        self.split, self.heads, self.direct, self.lse, self.to_dtype = split, heads, direct, lse, to
        self.tokens, self.values, self.names = tokens, request_values, {"scale": 0.1, **names}

    def forward(self, q: Tensor, latent: Tensor, gate: Tensor, *lengths: Tensor) -> Any:
        out, lse = OPS.paged_latent_attention(
            q, latent if self.direct else None, self.cache, *lengths, None, [lengths[1]] * self.values,
            value_dim=self.split[0], **self.names,
        )  # fmt: skip
        out = (out * torch.sigmoid(gate)[..., None]).flatten(1).to(self.to_dtype)
        return (out, lse) if self.lse else out

    def inputs(self) -> tuple[Tensor, ...]:
        width = sum(self.split)
        return bf16(self.tokens, self.heads, width), bf16(self.tokens, width), bf16(self.tokens, self.heads), *lengths()


def compiled(
    model: type[nn.Module], arch: str = "sm_90", compile_arguments: dict[str, Any] | None = None, **settings: Any
) -> tuple[Generated, list[decisions.Decision]]:
    """What is generated for a fresh model, and what was decided."""
    with pretend_gpu(arch) as gpu, torch.no_grad():
        with gpu.fake_tensors():
            made = model(**settings)
            arguments = made.inputs()  # type: ignore[operator]
        with decisions.recording() as log:
            return generate(made, *arguments, backend=backend, **(compile_arguments or {})), log.records
