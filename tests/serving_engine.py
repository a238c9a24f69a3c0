"""A small engine around one `Attention`: pages in random order, metadata for any step, inputs and the oracle."""

from __future__ import annotations

import itertools
import random
from typing import Any

import torch
from torch import Tensor

from custom_ops.paged.layout import CacheSizes, empty_caches
from custom_ops.paged.reference import reference_paged_attention
from lowered_attn import Attention, AttnMetaDataBase, CausalMetaData, set_fetch_fn_for_attn_metadata

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
PAGE, PAGES_A_REQUEST = 4, 8
TOKENS, REQUESTS = 32, 4
"""A bucket: rows of q and requests, padding included."""
SESSION = [[5, 3, 0, 9], [4, 1, 7], [1, 1, 1, 1], [0, 1, 0, 6], [1, 1, 1, 1]]
"""New tokens a request, step by step: prefill, chunks of it beside decoding, decoding, requests with nothing new."""


class Engine:
    """What an engine keeps: pages in random order, lengths so far, the step's metadata; it feeds one layer."""

    def __init__(self, layout: str = "unified", dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        self.layout, self.dtype = layout, dtype
        self.rng = random.Random(seed)
        self.sizes = CacheSizes(REQUESTS * PAGES_A_REQUEST + 3, PAGE, KV_HEADS, HEAD_DIM)
        pages = list(range(self.sizes.pages))
        self.rng.shuffle(pages)
        self.tables = torch.tensor(pages[: REQUESTS * PAGES_A_REQUEST], dtype=torch.int32).view(REQUESTS, -1)
        self.lens = [0] * REQUESTS
        self.tokens = TOKENS
        self.metadata: AttnMetaDataBase | None = None
        set_fetch_fn_for_attn_metadata(lambda: self.metadata)

    def caches(self, garbage: float = float("nan")) -> tuple[Tensor, Tensor]:
        """Caches that hold `garbage` everywhere: whatever is read before it was stored shows."""
        k_cache, v_cache = empty_caches(self.layout, self.sizes, self.dtype)
        for cache in (k_cache, v_cache):
            cache.copy_(torch.full(cache.shape, garbage).to(self.dtype))
        return k_cache, v_cache

    def attach(self, attention: Attention, garbage: float = float("nan")) -> Attention:
        attention.k_cache, attention.v_cache = self.caches(garbage)
        return attention

    def step(self, new: list[int], cls: type[AttnMetaDataBase] = CausalMetaData, **fields: Any) -> AttnMetaDataBase:
        """Metadata for `new` tokens a request, which count as cached afterwards."""
        new = new + [0] * (REQUESTS - len(new))
        slots = [-1] * self.tokens
        row = 0
        for r, count in enumerate(new):
            for a in range(self.lens[r], self.lens[r] + count):
                slots[row] = int(self.tables[r, a // PAGE]) * PAGE + a % PAGE
                row += 1
        tables = self.tables.clone()
        for r in range(REQUESTS):  # what lies past the length is any number
            tables[r, -(-(self.lens[r] + new[r]) // PAGE) :] = self.rng.choice([-1, 2147480000])
        self.metadata = cls(
            cu_seqlens_q=torch.tensor([0, *itertools.accumulate(new)], dtype=torch.int32),
            context_lens=torch.tensor(self.lens, dtype=torch.int32),
            page_tables=tables,
            slot_mapping=torch.tensor(slots),
            page_size=PAGE,
            kv_cache_layout=self.layout,
            **fields,
        )
        self.lens = [a + b for a, b in zip(self.lens, new, strict=True)]
        return self.metadata

    def warm_up(self) -> None:
        """The current step's metadata without its tokens."""
        assert self.metadata is not None
        self.metadata = self.metadata.without_tokens()


def diffusion_values(rng: random.Random, new: list[int], lens: list[int]) -> dict[str, Tensor]:
    """Some requests prefill and some decode; some new tokens are not real."""
    count = [*new, *[0] * (REQUESTS - len(new))]
    prefix = [rng.randint(0, n) for n in count]
    padded = [rng.randint(p, n) for p, n in zip(prefix, count, strict=True)]
    values = {
        "valid_lens": [rng.randint(0, n) if r else n for r, n in enumerate(count)],
        "status": [int(length > 0) for length in lens],
        "prefix_lens": prefix,
        "padded_prefix_lens": padded,
    }
    return {name: torch.tensor(numbers, dtype=torch.int32) for name, numbers in values.items()}


def make(**keywords: Any) -> Attention:
    keywords = {"num_heads": HEADS, "head_dim": HEAD_DIM, "scale": None, "num_kv_heads": KV_HEADS} | keywords
    return Attention(**keywords).eval()


def inputs(
    rows: int = TOKENS, dtype: torch.dtype = torch.float32, tokens: int = TOKENS
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [T, H, D]; rows from `rows` on are padding and hold NaN."""
    made = [torch.randn(tokens, heads, HEAD_DIM, dtype=dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    for t in made:
        t[rows:] = float("nan")
    return made[0], made[1], made[2]


def oracle(attention: Attention, metadata: AttnMetaDataBase, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse by the readable reference in fp64, from the caches as they are."""
    assert attention.k_cache is not None and attention.v_cache is not None
    out, lse = reference_paged_attention(
        q,
        k,
        v,
        attention.k_cache,
        attention.v_cache,
        metadata.cu_seqlens_q,
        metadata.context_lens,
        metadata.page_tables,
        metadata.valid_lens,
        metadata.request_values(),
        None,
        attention.sinks,
        attention.k_scale,
        attention.v_scale,
        mode=metadata.mode,
        block_size=metadata.block_size,
        window=attention.sliding_window or 0,
        prefix_hole=metadata.prefix_hole,
        layout=metadata.kv_cache_layout,
        softcap=attention.softcap or 0.0,
        scale=attention.scale,
        dtype=torch.float64,
    )
    return out, lse
