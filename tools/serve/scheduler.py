"""A toy scheduler: continuous batching, prompts in chunks beside decoding requests, steps in buckets."""

from __future__ import annotations

import random
from collections import deque
from typing import Protocol

import torch
from torch import Tensor

from tools.serve.model import CacheConfig
from tools.serve.pages import PageAllocator, pages_for
from tools.serve.step import Bucket, Chunk, MetaData, Request, Step, StepTensors, smallest


class Strategy(Protocol):
    """How requests turn into steps and logits into tokens: `Autoregressive` or `BlockDiffusion`."""

    name: str

    @property
    def logits_per_request(self) -> int: ...
    @property
    def rows_per_decode(self) -> int: ...
    def start(self, request: Request) -> None: ...
    def total_tokens(self, request: Request) -> int: ...
    def is_decoding(self, request: Request) -> bool: ...
    def chunk(self, request: Request, budget: int) -> Chunk | None: ...
    def metadata(self, tensors: StepTensors) -> MetaData: ...
    def choose(self, logits: Tensor) -> Tensor: ...
    def advance(self, request: Request, chunk: Chunk, chosen: Tensor) -> None: ...


class Scheduler:
    """Which requests run in the next step, with which pages.

    Decoding requests come first, then prompts that were begun, then new ones, each with the rows that are left. A
    request is admitted only when the pages that it may come to need are free of promises, so none is ever evicted.
    """

    def __init__(self, strategy: Strategy, cache: CacheConfig, buckets: list[Bucket], seed: int = 0) -> None:
        self.strategy, self.cache, self.buckets = strategy, cache, sorted(buckets)
        self.allocator = PageAllocator(cache.pages, seed)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.finished: list[Request] = []
        self.max_rows = max(bucket.tokens for bucket in buckets)
        self.max_requests = max(bucket.requests for bucket in buckets)
        self.page_tables = torch.full((self.max_requests, cache.max_pages), -1, dtype=torch.int32)
        self._free_rows = list(range(self.max_requests))
        self._reserved = 0

    def add(self, request: Request) -> None:
        """Queue `request`; raises ValueError where it could never run."""
        self.strategy.start(request)
        total = self.strategy.total_tokens(request)
        request.reserved = pages_for(total, self.cache.page_size)
        most = min(self.cache.max_pages, self.cache.pages)
        if request.reserved > most or not request.prompt or request.max_new_tokens < 1:
            raise ValueError(
                f"request {request.name}: expected a prompt and new tokens that fit {most} pages of "
                f"{self.cache.page_size} tokens, got {len(request.prompt)} and {request.max_new_tokens}; shorten it"
            )
        if not self.strategy.is_decoding(request) and self.strategy.chunk(request, self.max_rows) is None:
            raise ValueError(
                f"request {request.name}: expected a prompt that fits a step of {self.max_rows} rows, got "
                f"{len(request.prompt)} tokens; shorten it, or serve with larger steps"
            )
        self.waiting.append(request)

    def next_step(self, now: int = 0) -> Step | None:
        """The next step, pages taken for what it stores; None where no request that has arrived can run."""
        parts: list[tuple[Request, Chunk]] = []
        budget = self.max_rows

        def run(request: Request) -> bool:
            nonlocal budget
            chunk = self.strategy.chunk(request, budget)
            if chunk is None:
                return False
            parts.append((request, chunk))
            budget -= len(chunk.tokens)
            return True

        decoding = [request for request in self.running if self.strategy.is_decoding(request)]
        reading = [request for request in self.running if not self.strategy.is_decoding(request)]
        for request in decoding + reading:
            run(request)
        while budget and self.waiting and self.waiting[0].arrival <= now and self._has_room(self.waiting[0]):
            if not run(self.waiting[0]):
                break
            self._admit(self.waiting.popleft())
        if not parts:
            return None
        for request, chunk in parts:
            self._take_pages(request, chunk.first + chunk.store)
        logits = sum(len(chunk.logit_rows) for _, chunk in parts)
        rows = sum(len(chunk.tokens) for _, chunk in parts)
        return Step(parts, smallest(self.buckets, rows, len(parts), logits))

    def complete(self, step: Step, chosen: Tensor) -> list[Request]:
        """Note what came of `step`, from the rows of `Strategy.choose`; returns the requests that are done."""
        done, first = [], 0
        for request, chunk in step.parts:
            last = first + len(chunk.logit_rows)
            self.strategy.advance(request, chunk, chosen[first:last])
            first = last
            if request.done:
                done.append(request)
                self._dismiss(request)
        return done

    def _has_room(self, request: Request) -> bool:
        return bool(self._free_rows) and self._reserved + request.reserved <= self.cache.pages

    def _admit(self, request: Request) -> None:
        request.table_row = self._free_rows.pop()
        self._reserved += request.reserved
        self.running.append(request)

    def _take_pages(self, request: Request, tokens: int) -> None:
        missing = pages_for(tokens, self.cache.page_size) - len(request.pages)
        if missing > 0:
            held = len(request.pages)
            request.pages.extend(self.allocator.take(missing))
            self.page_tables[request.table_row, held : held + missing] = torch.tensor(
                request.pages[held:], dtype=torch.int32
            )

    def _dismiss(self, request: Request) -> None:
        self.allocator.give_back(request.pages)
        self.page_tables[request.table_row] = -1
        self._free_rows.append(request.table_row)
        self._reserved -= request.reserved
        request.pages, request.table_row = [], -1
        self.running.remove(request)
        self.finished.append(request)


def make_buckets(strategy: Strategy, max_requests: int, max_rows: int, sizes: int = 3) -> list[Bucket]:
    """Buckets for steps that only decode, `sizes` of them, each half as large as the next, and one for mixed steps."""
    per_request, logits = strategy.rows_per_decode, strategy.logits_per_request
    found = set()
    for power in range(sizes):
        requests = max(1, max_requests >> power)
        if requests * per_request <= max_rows:
            found.add(Bucket(requests * per_request, requests, requests * logits))
    return sorted(found | {Bucket(max_rows, max_requests, max_requests * logits)})


def random_requests(count: int, vocab: int, prompt: tuple[int, int], new_tokens: tuple[int, int], every: float,
                    seed: int = 0) -> list[Request]:  # fmt: skip
    """`count` requests with lengths drawn from both ranges (ends included), one every `every` steps on average."""
    draw = random.Random(seed)
    requests, arrival = [], 0.0
    for name in range(count):
        tokens = [draw.randrange(vocab) for _ in range(draw.randint(*prompt))]
        requests.append(Request(name, tokens, draw.randint(*new_tokens), int(arrival)))
        arrival += draw.expovariate(1 / every) if every else 0.0
    return requests
