"""A thousand random steps of attention over a paged cache, each compared with plain dense attention.

    python -m tools.serve.soak --steps 1000 --device cuda               causal: prefill, chunked prefill and decode
    python -m tools.serve.soak --steps 1000 --device cuda --diffusion   every mode of block diffusion, hole or not

Two attention layers with inputs of their own run as one compiled graph. Request counts, lengths and pages are random;
some requests have nothing cached, some no new token, some no valid one. Whatever must not be read is poison: unused
pages and slots, rows of q, k and v that no request owns or that are not valid are NaN, page ids past a length are -1 or
2147480000. Then

- every output is as exact as low-precision attention without pages, rows that see nothing being exactly 0, and so is
  the eager reference's (every `--reference-every` steps);
- every step is run again after all pages changed places, and must give the same bits;
- graph breaks, late compiles, skipped CUDA graphs, CUDA graphs recorded late and host syncs in the step must be 0.

Ends with status 1 otherwise.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import lowered_attn
from lowered_attn import Attention
from tools.serve.dense import DenseStep, MaskRules, dense_attention, remember
from tools.serve.health import Watch
from tools.serve.loop import CURRENT, WARM_UP_CALLS, fetch
from tools.serve.model import CacheConfig, attach_caches, attentions, caches_of
from tools.serve.pages import pages_for
from tools.serve.population import Part, Population
from tools.serve.step import Bucket, MetaData, StepTensors, smallest

LAYERS = 2
CAUSAL = MaskRules()
ERROR_RATIO = 2.0
"""How many times the error of attention in the inputs' dtype an output's error may be, as in the ops' tests ..."""
FLOOR_UNITS = 16.0
"""... plus this many units of float32, and half a unit of the output's dtype, times the largest output."""


@dataclass(frozen=True)
class SoakSettings:
    """Sizes of the attention and of what is thrown at it."""

    device: torch.device
    dtype: torch.dtype
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    max_tokens: int = 384  # of one request
    buckets: tuple[tuple[int, int], ...] = ((16, 16), (256, 16))  # (rows, requests)
    rules: tuple[MaskRules, ...] = (CAUSAL,)  # a step takes one of them
    new_keys_in_cache: tuple[bool, ...] = (False, True)  # where new keys are read: from k and v, or from the cache
    attn_impl: str = "triton_grouped"
    reference_every: int = 1  # steps between two comparisons of the eager reference; 0 = never
    replay_every: int = 1  # steps between two replays with other pages; 0 = never
    spare_pages: int = 16  # pages more than all requests can need
    strict: bool = False  # whether a skipped CUDA graph raises at once
    seed: int = 0

    @property
    def diffusion(self) -> bool:
        """Whether the steps carry block diffusion's metadata."""
        return self.rules != (CAUSAL,)

    def graphs(self, buckets: Sequence[Bucket]) -> list[Graph]:
        """Every graph of a run. To compile fewer, the smaller buckets are there for the first two rules alone."""
        return [
            Graph(bucket, rules, in_cache)
            for i, rules in enumerate(self.rules)
            for bucket in buckets
            for in_cache in self.new_keys_in_cache
            if i < 2 or bucket == max(buckets)
        ]

    @property
    def cache(self) -> CacheConfig:
        """Sizes of the caches: room for every request of the largest bucket, twice."""
        max_pages = pages_for(self.max_tokens, self.page_size)
        population = 2 * max(requests for _, requests in self.buckets)
        return CacheConfig(population * max_pages + self.spare_pages, self.page_size, max_pages)


@dataclass(frozen=True)
class Graph:
    """What the compiled graph of a step is specialised on."""

    bucket: Bucket
    rules: MaskRules
    new_keys_in_cache: bool

    def __str__(self) -> str:
        hole, where = " with its hole" * self.rules.prefix_hole, ", new keys in the cache" * self.new_keys_in_cache
        return f"{self.bucket.tokens} rows, {self.bucket.requests} requests, {self.rules.mode}{hole}{where}"


@dataclass
class SoakResult:
    """What a run found."""

    steps: int = 0
    worst: float = 0.0  # largest error over what was allowed
    worst_reference: float = 0.0  # the same of the eager reference
    problems: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)  # how often each kind of request came
    replays: int = 0
    seconds: float = 0.0


class TwoLayers(nn.Module):
    """Attention layers with inputs of their own: of `q [LAYERS, T, Hq, D]`, an output `[T, Hq, D]` a layer."""

    def __init__(self, s: SoakSettings, attn_impl: str) -> None:
        super().__init__()
        scale = 1 / math.sqrt(s.head_dim)
        self.layers = nn.ModuleList(
            Attention(s.heads, s.head_dim, scale, s.kv_heads, attn_impl=attn_impl, sliding_window=s.rules[0].window)
            for _ in range(LAYERS)
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        return [layer(q[i], k[i], v[i]) for i, layer in enumerate(self.layers)]


class Soak:
    """Random steps over one population of requests."""

    def __init__(self, settings: SoakSettings) -> None:
        s = self.settings = settings
        self.generator = torch.Generator(s.device).manual_seed(s.seed)
        requests = max(requests for _, requests in s.buckets)
        self.population = Population(requests, s.cache, s.diffusion, s.seed)
        self.random = self.population.random
        self.buckets = sorted(Bucket(rows, requests, 1) for rows, requests in s.buckets)
        self.tensors = {bucket: StepTensors(bucket, s.cache, s.device) for bucket in self.buckets}
        self.metadata = {graph: self._metadata(graph) for graph in s.graphs(self.buckets)}
        self.model, self.reference = (TwoLayers(s, impl) for impl in (s.attn_impl, "reference"))
        for model in (self.model, self.reference):
            attach_caches(model, s.cache, s.dtype, s.device)
        self.exact_dtype = torch.float32 if s.device.type == "cuda" else torch.float64
        history = (LAYERS, 2, len(self.population.requests), s.max_tokens, s.kv_heads, s.head_dim)
        self.history = torch.zeros(history, dtype=self.exact_dtype, device=s.device)
        self.inputs = {b: self._inputs(b) for b in self.buckets}
        self.watch = Watch(s.device, s.strict)
        self.result = SoakResult()
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        self.compiled = torch.compile(
            self.model, backend="lowered_attn", mode="reduce-overhead", fullgraph=True, dynamic=False
        )
        lowered_attn.set_fetch_fn_for_attn_metadata(fetch)

    def warm_up(self, report: Callable[[str], None] = lambda line: None) -> None:
        """Run every bucket in every mode without a token, on NaN."""
        lowered_attn.set_warming_up(True)
        for graph in self.metadata:
            start = time.perf_counter()
            self.tensors[graph.bucket].fill(None)
            for t in self.inputs[graph.bucket]:
                t.fill_(math.nan)
            for _ in range(WARM_UP_CALLS):
                out = self._run(self.compiled, graph)
            if out.count_nonzero():
                self.result.problems.append(f"warm-up of {graph}: outputs are not 0")
            report(f"{graph}: {time.perf_counter() - start:.1f} s")
        lowered_attn.reset_warming_up()
        self.watch.warmed_up()

    def run(self, steps: int, report: Callable[[SoakResult], None] = lambda result: None) -> SoakResult:
        """Run `steps` steps; what is wrong is in the result."""
        begin = time.perf_counter()
        for number in range(1, steps + 1):
            self.step(number)
            report(self.result)
            if len(self.result.problems) > 20:
                break
        self.result.problems += self.watch.problems(len(self.metadata))
        self.result.kinds = self.population.kinds
        self.result.seconds = time.perf_counter() - begin
        return self.result

    def step(self, number: int) -> None:
        """One random step, compared in every way that is due."""
        s, result = self.settings, self.result
        graph, parts = self._draw()
        tensors, (q, k, v) = self.tensors[graph.bucket], self.inputs[graph.bucket]
        self.population.fill(tensors, parts)
        self._draw_inputs(graph.bucket, parts)
        with self.watch.no_sync():
            found = self._run(self.compiled, graph)
        dense = DenseStep.of(tensors.on_host, [part.request.row for part in parts], graph.rules)
        exact, low = self._exact(dense, q, k, v)
        allowed = ERROR_RATIO * (low - exact).abs().max() + self._floor(exact)
        blind = (exact == 0).all(-1)
        checks = [(found.to(exact.dtype) - exact).abs().max() / allowed, found[blind].count_nonzero()]
        if s.reference_every and number % s.reference_every == 0:
            reference = self._run(self.reference, graph)
            checks += [(reference.to(exact.dtype) - exact).abs().max() / allowed]
        else:
            self._store_for_reference(graph.bucket)
        error, nonzero, *of_reference = torch.stack([c.double() for c in checks]).tolist()
        result.worst = _largest(result.worst, error)
        result.worst_reference = _largest(result.worst_reference, *of_reference)
        where = f"step {number} ({graph}, {len(parts)} of them at work)"
        if not error <= 1:
            result.problems.append(f"{where}: error {error:.2f} times what is allowed")
        if nonzero:
            result.problems.append(f"{where}: {nonzero:.0f} values are not 0 in rows that see nothing")
        if of_reference and not of_reference[0] <= 1:
            result.problems.append(f"{where}: the reference's error is {of_reference[0]:.2f} times what is allowed")
        if s.replay_every and number % s.replay_every == 0:
            order = self.population.move_pages(tensors, parts).to(s.device)
            for cache in self._caches():
                cache.copy_(cache[order])
            with self.watch.no_sync():
                again = self._run(self.compiled, graph)
            result.replays += 1
            if not torch.equal(again, found):
                result.problems.append(f"{where}: other bits after the pages changed places")
        for part in parts:
            part.request.length += part.stored
        for layer in range(LAYERS):
            k_history, v_history = self.history[layer]
            remember(k[layer].to(self.exact_dtype), v[layer].to(self.exact_dtype), k_history, v_history, dense)
        ended, freed = self.population.retire()
        for request in ended:
            self.history[:, :, request.row] = 0
        if freed:
            pages = torch.tensor(freed, device=s.device)
            for cache in self._caches():
                cache[pages] = math.nan
        result.steps += 1

    def _draw(self) -> tuple[Graph, list[Part]]:
        """A random step, and the smallest graph of its kind that it fits."""
        same_kind = self.random.choice([(graph.rules, graph.new_keys_in_cache) for graph in self.metadata])
        graphs = [g for g in self.metadata if (g.rules, g.new_keys_in_cache) == same_kind]
        short = self.random.random() < 0.4
        rows = (min if short else max)(graph.bucket.tokens for graph in graphs)
        parts = self.population.draw(rows, *same_kind, short)
        bucket = smallest([graph.bucket for graph in graphs], sum(part.new for part in parts), len(parts), 0)
        return Graph(bucket, *same_kind), parts

    # ------------------------------------------------------------------ tensors

    def _caches(self) -> list[Tensor]:
        """Every cache: the reference's pages lie where the served model's do."""
        return caches_of(self.model) + caches_of(self.reference)

    def _inputs(self, bucket: Bucket) -> tuple[Tensor, Tensor, Tensor]:
        s = self.settings
        q, k, v = (
            torch.empty(LAYERS, bucket.tokens, heads, s.head_dim, dtype=s.dtype, device=s.device)
            for heads in (s.heads, s.kv_heads, s.kv_heads)
        )
        return q, k, v

    def _draw_inputs(self, bucket: Bucket, parts: Sequence[Part]) -> None:
        """Random q, k and v; NaN in rows that are not valid or that no request owns."""
        poisoned = torch.ones(bucket.tokens, dtype=torch.bool)
        first = 0
        for part in parts:
            poisoned[first : first + part.valid] = False
            first += part.new
        poisoned = poisoned.to(self.settings.device)[None, :, None, None]
        for t in self.inputs[bucket]:
            t.normal_(generator=self.generator)
            t.masked_fill_(poisoned, math.nan)

    def _metadata(self, graph: Graph) -> MetaData:
        tensors, rules = self.tensors[graph.bucket], graph.rules
        if not self.settings.diffusion:
            return tensors.causal(graph.new_keys_in_cache)
        metadata = tensors.block_diffusion(rules.mode, rules.block_size, rules.prefix_hole)
        return dataclasses.replace(metadata, new_keys_in_cache=graph.new_keys_in_cache)

    def _run(self, model: Callable[..., list[Tensor]], graph: Graph) -> Tensor:
        """Outputs `[LAYERS, T, Hq, D]`, a copy: the next replay overwrites those of a CUDA graph."""
        CURRENT["step"] = self.metadata[graph]
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            return torch.stack(model(*self.inputs[graph.bucket]))

    def _store_for_reference(self, bucket: Bucket) -> None:
        """Bring the reference's caches up to date in a step that it does not run."""
        slots = self.tensors[bucket].on_device["slot_mapping"]
        _, k, v = self.inputs[bucket]
        for i, layer in enumerate(attentions(self.reference)):
            torch.ops.lowered_attn.store_kv_cache(k[i], v[i], layer.k_cache, layer.v_cache, slots)

    # ------------------------------------------------------------------ what is right

    def _exact(self, dense: DenseStep, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs in the exact dtype, and as arithmetic in the inputs' dtype gives them."""
        scale = 1 / math.sqrt(self.settings.head_dim)
        outputs: list[list[Tensor]] = [[], []]
        for layer in range(LAYERS):
            wide_q, wide_k, wide_v = (t[layer].to(self.exact_dtype) for t in (q, k, v))
            k_history, v_history = self.history[layer]
            for found, low in zip(outputs, (None, self.settings.dtype), strict=True):
                found.append(dense_attention(wide_q, wide_k, wide_v, k_history, v_history, dense, scale, low))
        return torch.stack(outputs[0]), torch.stack(outputs[1])

    def _floor(self, exact: Tensor) -> Tensor:
        """What no bound may undercut: results are rounded, and sums in another order are other sums."""
        units = FLOOR_UNITS * torch.finfo(torch.float32).eps + torch.finfo(self.settings.dtype).eps / 2
        return units * exact.abs().max().clamp(min=1e-3)


def _largest(*values: float) -> float:
    """The largest; NaN counts as larger than anything."""
    return math.nan if any(math.isnan(value) for value in values) else max(values)


def diffusion_rules(block_size: int = 4) -> tuple[MaskRules, ...]:
    """Every mode of block diffusion, and two of them with the prefix hole."""
    modes = ("block_causal", "prefix_full", "prefix_causal", "plain", "causal", "cache_only")
    plain = [MaskRules(mode, block_size) for mode in modes]
    return (*plain, *(MaskRules(mode, block_size, prefix_hole=True) for mode in ("block_causal", "prefix_full")))


def main(argv: list[str] | None = None) -> int:
    """Run the soak, print how it goes, and return 1 where anything was wrong."""
    p = argparse.ArgumentParser(
        prog="python -m tools.serve.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--steps", type=int, default=1000, help="(default %(default)s)")
    p.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32, bfloat16 on cuda")
    p.add_argument("--diffusion", action="store_true", help="block diffusion in all its modes, instead of causal")
    p.add_argument("--block-size", type=int, default=4, help="tokens in a block (default %(default)s)")
    p.add_argument("--window", type=int, help="a sliding window, in tokens")
    p.add_argument("--page-size", type=int, default=16, help="tokens in a page (default %(default)s)")
    p.add_argument("--head-dim", type=int, help="default: 64, 128 on cuda")
    p.add_argument("--attn-impl", choices=("triton_grouped", "triton"), default="triton_grouped")
    p.add_argument("--new-keys", choices=("direct", "cache", "both"), help="where new keys are read; default: both, "
                   "direct with --diffusion, whose blocks are not all stored")  # fmt: skip
    p.add_argument("--reference-every", type=int, default=1, help="compare the eager reference so often; 0 never")
    p.add_argument("--replay-every", type=int, default=1, help="replay with other pages so often; 0 never")
    p.add_argument("--strict", action="store_true", help="raise where a CUDA graph is skipped, at once")
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args(argv)
    cuda = torch.device(a.device).type == "cuda"
    rules = diffusion_rules(a.block_size) if a.diffusion else (CAUSAL,)
    a.new_keys = a.new_keys or ("direct" if a.diffusion else "both")
    if not cuda:
        torch.set_num_threads(1)  # nothing here is large enough to share
    settings = SoakSettings(
        device=torch.device(a.device),
        dtype=getattr(torch, a.dtype or ("bfloat16" if cuda else "float32")),
        head_dim=a.head_dim or (128 if cuda else 64),
        page_size=a.page_size,
        rules=tuple(dataclasses.replace(rule, window=a.window) for rule in rules),
        buckets=((64, 16), (256, 16)) if a.diffusion else ((16, 16), (256, 16)),
        new_keys_in_cache={"direct": (False,), "cache": (True,), "both": (False, True)}[a.new_keys],
        attn_impl=a.attn_impl,
        reference_every=a.reference_every,
        replay_every=a.replay_every,
        strict=a.strict,
        seed=a.seed,
    )
    soak = Soak(settings)
    kind = "block diffusion" if a.diffusion else "causal"
    print(
        f"lowered-attn soak: torch {torch.__version__} on {a.device}, {settings.dtype}, {kind}, "
        f"{settings.cache.pages} pages"
    )
    start = time.perf_counter()
    soak.warm_up(lambda line: print(f"  warm-up: {line}", flush=True))
    print(f"  warm-up took {time.perf_counter() - start:.0f} s\n")

    def report(result: SoakResult) -> None:
        if result.steps % max(1, a.steps // 10) == 0:
            print(
                f"  step {result.steps:5d}: worst error {result.worst:.2f} of what is allowed (eager reference "
                f"{result.worst_reference:.2f}), {result.replays} replays, {len(result.problems)} problems", flush=True
            )  # fmt: skip

    result = soak.run(a.steps, report)
    print(
        "\nRequests in those steps: " + ", ".join(f"{count:,} {name}" for name, count in sorted(result.kinds.items()))
    )
    print(f"{soak.watch.summary()}.")
    for line in result.problems[:20]:
        print(f"WRONG: {line}")
    rate = 1e3 * result.seconds / max(result.steps, 1)
    print(
        f"{result.steps} steps in {result.seconds:.0f} s ({rate:.0f} ms each, checks included): "
        f"{'something is wrong' if result.problems else 'all outputs right, all replays bitwise equal'}."
    )
    return 1 if result.problems else 0


if __name__ == "__main__":
    sys.exit(main())
