"""Requests of random lengths on random pages, with poison wherever nothing may be read."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tools.serve.dense import MaskRules
from tools.serve.model import CacheConfig
from tools.serve.pages import PageAllocator, pages_for
from tools.serve.step import StepTensors

POISON_PAGES = (-1, 2147480000)
"""What stands in page tables where no key lies."""


@dataclass
class SoakRequest:
    """A request of which only lengths matter."""

    row: int  # its row in the histories
    length: int = 0  # tokens in the cache
    pages: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Part:
    """What one request does in a step."""

    request: SoakRequest
    new: int
    valid: int  # of the new tokens, the first so many are real
    stored: int  # the first so many enter the cache
    status: int
    prefix: int
    padded_prefix: int


class Population:
    """Requests that grow, end and begin again; twice as many as a step can run."""

    def __init__(self, requests: int, cache: CacheConfig, diffusion: bool, seed: int) -> None:
        self.cache, self.diffusion, self.requests_in_step = cache, diffusion, requests
        self.random = random.Random(seed)
        self.allocator = PageAllocator(cache.pages, seed)
        self.requests = [SoakRequest(row) for row in range(2 * requests)]
        self.kinds: Counter[str] = Counter()

    def draw(self, rows: int, rules: MaskRules, all_stored: bool, short: bool) -> list[Part]:
        """A random step of at most `rows` rows; `short`: of few new tokens a request."""
        draw, block = self.random, rules.block_size
        parts: list[Part] = []
        for request in draw.sample(self.requests, draw.randint(1, self.requests_in_step)):
            kind = draw.random()
            if short:
                new = draw.choice((0, 1, 4, block)) if self.diffusion else draw.choice((0, 1, 1, 1, 1))
            elif kind < 0.1:
                new = 0
            elif kind < 0.5:
                new = draw.randint(1, block if self.diffusion else 1)
            else:
                new = draw.randint(1, max(1, rows // 3))
            new = min(new, rows, self.cache.max_tokens - request.length)
            rows -= new
            valid = draw.choice((new, new, draw.randint(0, new))) if self.diffusion else new
            stored = draw.choice((0, valid, draw.randint(0, valid))) if self.diffusion and not all_stored else valid
            # While prefilling, a prefix counts new tokens; the hole counts from the request's start.
            prefix = draw.randint(0, max(request.length + new if rules.prefix_hole else new, 1))
            padded = prefix + draw.randint(0, block)
            parts.append(Part(request, new, valid, stored, draw.randint(0, 1), prefix, padded))
            self.kinds[_name(request, new, self.diffusion)] += 1
        return parts

    def fill(self, tensors: StepTensors, parts: Sequence[Part]) -> None:
        """Take pages for what is stored, and send the step to the device."""
        host, size, bucket = tensors.on_host, self.cache.page_size, tensors.bucket
        cu, slots = [0], list[int]()
        for part in parts:
            pages, first = part.request.pages, part.request.length
            pages.extend(self.allocator.take(max(0, pages_for(first + part.stored, size) - len(pages))))
            cu.append(cu[-1] + part.new)
            slots.extend(pages[a // size] * size + a % size for a in range(first, first + part.stored))
            slots.extend([-1] * (part.new - part.stored))
        rest = bucket.requests - len(parts)
        columns = {
            "context_lens": [part.request.length for part in parts],
            "valid_lens": [part.valid for part in parts],
            "status": [part.status for part in parts],
            "prefix_lens": [part.prefix for part in parts],
            "padded_prefix_lens": [part.padded_prefix for part in parts],
        }
        for name, values in columns.items():
            host[name].copy_(torch.tensor([*values, *[0] * rest], dtype=torch.int32))
        host["cu_seqlens_q"].copy_(torch.tensor([*cu, *[cu[-1]] * rest], dtype=torch.int32))
        host["slot_mapping"].copy_(torch.tensor([*slots, *[-1] * (bucket.tokens - len(slots))]))
        self._write_tables(tensors, parts)
        tensors.upload()

    def move_pages(self, tensors: StepTensors, parts: Sequence[Part]) -> Tensor:
        """Rename all physical pages at random; returns int64 `[pages]`: which old page each new one is.

        The step's page tables and slots are sent to the device again.
        """
        size, slots = self.cache.page_size, tensors.on_host["slot_mapping"]
        new_ids = list(range(self.cache.pages))
        self.random.shuffle(new_ids)
        self.allocator.rename(new_ids)
        for request in self.requests:
            request.pages = [new_ids[page] for page in request.pages]
        renamed = torch.tensor(new_ids)
        slots.copy_(torch.where(slots < 0, slots, renamed[slots.clamp(min=0) // size] * size + slots % size))
        self._write_tables(tensors, parts)
        tensors.upload()
        return torch.empty_like(renamed).scatter_(0, renamed, torch.arange(len(new_ids)))

    def retire(self) -> tuple[list[SoakRequest], list[int]]:
        """End requests that are long, and some others; returns them, empty again, and the pages that they had."""
        ended, freed = [], list[int]()
        for request in self.requests:
            if request.pages and (request.length > 0.9 * self.cache.max_tokens or self.random.random() < 0.02):
                self.allocator.give_back(request.pages)
                freed += request.pages
                request.pages, request.length = [], 0
                ended.append(request)
        return ended, freed

    def _write_tables(self, tensors: StepTensors, parts: Sequence[Part]) -> None:
        tables = tensors.on_host["page_tables"]
        tables[:] = self.random.choice(POISON_PAGES)
        for r, part in enumerate(parts):
            tables[r, : len(part.request.pages)] = torch.tensor(part.request.pages, dtype=torch.int32)


def _name(request: SoakRequest, new: int, diffusion: bool) -> str:
    if not new:
        return "with no new token"
    if not request.length:
        return "prefill"
    return "decode" if new == 1 and not diffusion else "block or chunk" if diffusion else "chunked prefill"
