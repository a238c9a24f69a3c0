"""The loop: schedule, fill in the step's tensors, run the compiled model, choose tokens, and check what came out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import lowered_attn
from tools.serve.autoregressive import Autoregressive
from tools.serve.block_diffusion import BlockDiffusion
from tools.serve.check import LogitsCheck, LogitsError
from tools.serve.dense import MaskRules
from tools.serve.health import Watch
from tools.serve.model import CacheConfig, Decoder, ModelConfig, attach_caches, paged, random_model
from tools.serve.scheduler import Scheduler, Strategy, make_buckets
from tools.serve.shares import Shares, profile
from tools.serve.step import Bucket, MetaData, Request, Step, StepTensors

CURRENT: dict[str, MetaData] = {}
"""The metadata of the step that runs, under "step"."""

WARM_UP_CALLS = 3
"""Calls of each bucket before it serves: one compiles and runs, one records the CUDA graph, one replays it."""


def fetch() -> MetaData:
    """The fetch hook: one function for the whole process, since compiled graphs are guarded on it."""
    return CURRENT["step"]


@dataclass(frozen=True)
class ServeSettings:
    """What is served, and how."""

    model: ModelConfig
    device: torch.device
    dtype: torch.dtype
    max_requests: int = 16  # requests in a step
    max_rows: int = 128  # tokens in a step
    bucket_sizes: int = 2  # buckets for steps that only decode; 0 = one bucket for everything
    page_size: int = 16
    max_tokens: int = 512  # tokens of one request, prompt included
    pages: int | None = None  # in the cache; None is enough for every request at its longest
    check: bool = True  # whether every step's logits are compared
    compiled: bool = True
    attn_impl: str = "triton_grouped"
    strict: bool = False  # whether a skipped CUDA graph raises at once
    seed: int = 0

    @property
    def cache(self) -> CacheConfig:
        """Sizes of the caches."""
        max_pages = -(-self.max_tokens // self.page_size)
        return CacheConfig(self.pages or self.max_requests * max_pages, self.page_size, max_pages)


@dataclass
class StepReport:
    """What one step did."""

    step: Step
    seconds: float  # scheduling, filling, the model, and reading tokens back; without checks
    model_seconds: float  # filling and the model until its result is there
    error: LogitsError | None
    generated: int  # tokens that became final
    finished: list[Request] = field(default_factory=list)
    shares: Shares | None = None  # of a step that was profiled, whose times then mean nothing


class Server:
    """A model, its caches, a scheduler, and one compiled step for every bucket."""

    def __init__(self, settings: ServeSettings, strategy: Strategy) -> None:
        config, cache, device = settings.model, settings.cache, settings.device
        if settings.max_rows < settings.max_requests * strategy.rows_per_decode:
            raise ValueError(
                f"max_rows: expected at least {strategy.rows_per_decode} rows for each of {settings.max_requests} "
                f"requests, got {settings.max_rows}; raise --max-rows or lower --max-requests"
            )
        if config.max_positions < cache.max_tokens:
            raise ValueError(
                f"max_tokens: expected at most the model's {config.max_positions} positions, got {cache.max_tokens}; "
                "lower --max-tokens"
            )
        self.settings, self.strategy = settings, strategy
        self.model: Decoder = random_model(config, paged(settings.attn_impl), device, settings.dtype, settings.seed)
        attach_caches(self.model, cache, settings.dtype, device)
        buckets = make_buckets(strategy, settings.max_requests, settings.max_rows, settings.bucket_sizes)
        self.scheduler = Scheduler(strategy, cache, buckets, settings.seed)
        self.tensors = {bucket: StepTensors(bucket, cache, device) for bucket in buckets}
        self.metadata = {bucket: strategy.metadata(tensors) for bucket, tensors in self.tensors.items()}
        self.watch = Watch(device, settings.strict)
        self.check: LogitsCheck | None = None
        if settings.check:
            rules = rules_of(strategy)
            self.check = LogitsCheck(self.model, cache, settings.max_requests, rules)
        self._call: Callable[..., Tensor] = self.model
        if settings.compiled:
            # A graph for each bucket, of fixed shapes: dynamic ones would be recorded one by one all the same.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
            self._call = torch.compile(
                self.model, backend="lowered_attn", mode="reduce-overhead", fullgraph=True, dynamic=False
            )
        lowered_attn.set_fetch_fn_for_attn_metadata(fetch)

    def warm_up(self, report: Callable[[Bucket, float], None] = lambda bucket, seconds: None) -> None:
        """Run every bucket without any token: compiles, and records the CUDA graphs."""
        lowered_attn.set_warming_up(True)
        for bucket in sorted(self.tensors):
            start = time.perf_counter()
            self.tensors[bucket].fill(None)
            for _ in range(WARM_UP_CALLS):
                self._run(bucket)
            synchronise(self.settings.device)
            report(bucket, time.perf_counter() - start)
        lowered_attn.reset_warming_up()
        self.watch.warmed_up()

    def step(self, now: int = 0, profiled: bool = False) -> StepReport | None:
        """Run the next step; None where no request that has arrived by step `now` is left to run."""
        start = time.perf_counter()
        step = self.scheduler.next_step(now)
        if step is None:
            return None
        bucket, tensors, shares = step.bucket, self.tensors[step.bucket], None
        filled = time.perf_counter()
        tensors.fill(step, self.scheduler.page_tables)
        if profiled:
            results: list[Tensor] = []
            shares = profile(lambda: results.append(self._run(bucket)), self.settings.device)
            logits = results[0]
        else:
            with self.watch.no_sync():
                logits = self._run(bucket)
        chosen = self.strategy.choose(logits)  # reads back, so the model is done
        modelled = time.perf_counter()
        error = self.check(logits, step, tensors) if self.check else None
        checked = time.perf_counter()
        before = sum(len(request.generated) for request, _ in step.parts)
        finished = self.scheduler.complete(step, chosen)
        generated = sum(len(request.generated) for request, _ in step.parts) - before
        seconds = time.perf_counter() - start - (checked - modelled)
        return StepReport(step, seconds, modelled - filled, error, generated, finished, shares)

    def _run(self, bucket: Bucket) -> Tensor:
        CURRENT["step"] = self.metadata[bucket]
        if self.settings.compiled:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            return self._call(*self.tensors[bucket].inputs)


def rules_of(strategy: Strategy) -> MaskRules:
    """What the exact model has to know about a strategy."""
    if isinstance(strategy, BlockDiffusion):
        return MaskRules(strategy.mode, strategy.block_size, strategy.prefix_hole)
    return MaskRules()


def make_strategy(name: str, config: ModelConfig, prefix_mode: str, block_size: int, denoise_steps: int,
                  prefix_hole: bool) -> Strategy:  # fmt: skip
    """The strategy "ar" or "diffusion"; the last token of the vocabulary is the mask token of the second."""
    if name == "ar":
        return Autoregressive()
    return BlockDiffusion(config.vocab - 1, prefix_mode, block_size, denoise_steps, prefix_hole)


def synchronise(device: torch.device) -> None:
    """Wait for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
