"""A whole step of an 8B-shaped model as one CUDA graph: its time, tokens/s, and where the time goes.

    python -m tools.serve.whole_step --output whole_step.json
    python -m tools.serve.whole_step --device cpu --size tiny --batch 4 --context 100    tries it out without a GPU

Two steps are measured, each over random weights and caches full of random numbers: "decode", a token for each of
`--batch` requests with `--context` tokens before it, and "mixed", where the last `--chunks` of them read
`--chunk-tokens` tokens of a prompt instead. Kernel times are those of one replay under torch's profiler; ends with
status 1 where a graph broke, a CUDA graph was skipped, the step synced, or two replays differ.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lowered_attn
from tools.host import command_of, host_facts
from tools.serve.autoregressive import Autoregressive
from tools.serve.health import Watch
from tools.serve.loop import CURRENT, WARM_UP_CALLS, fetch, synchronise
from tools.serve.model import SIZES, CacheConfig, ModelConfig, attach_caches, paged, random_model, scaled
from tools.serve.pages import PageAllocator, pages_for
from tools.serve.shares import Shares, profile
from tools.serve.step import Bucket, Chunk, Request, Step, StepTensors

Figures = dict[str, Any]
SCHEMA = 1
"""Of the JSON that is written; tools.report reads it."""


def make_step(lengths: list[tuple[int, int]], cache: CacheConfig, seed: int) -> tuple[Step, Tensor]:
    """A causal step of requests with `(cached, new)` tokens, on scattered pages, and the page tables on the host."""
    allocator = PageAllocator(cache.pages, seed)
    tables = torch.full((len(lengths), cache.max_pages), -1, dtype=torch.int32)
    parts = []
    for row, (cached, new) in enumerate(lengths):
        pages = allocator.take(pages_for(cached + new, cache.page_size))
        tables[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        request = Request(row, [1], 1, cached=cached, pages=pages, table_row=row)
        chunk = Chunk(cached, [1 + row] * new, new, new, range(new - 1, new), decoding=new == 1)
        parts.append((request, chunk))
    rows = sum(new for _, new in lengths)
    return Step(parts, Bucket(-(-rows // 16) * 16, len(lengths), len(lengths))), tables


class WholeStep:
    """One model, and steps over it."""

    def __init__(self, config: ModelConfig, cache: CacheConfig, device: torch.device, dtype: torch.dtype,
                 new_keys_in_cache: bool, attn_impl: str = "triton_grouped", seed: int = 0) -> None:  # fmt: skip
        self.config, self.cache, self.device, self.seed = config, cache, device, seed
        self.strategy = Autoregressive(new_keys_in_cache)
        self.model = random_model(config, paged(attn_impl), device, dtype, seed)
        attach_caches(self.model, cache, dtype, device, fill=None)
        self.compiled = torch.compile(
            self.model, backend="lowered_attn", mode="reduce-overhead", fullgraph=True, dynamic=False
        )
        lowered_attn.set_fetch_fn_for_attn_metadata(fetch)

    def measure(self, name: str, lengths: list[tuple[int, int]], repeats: int) -> tuple[Figures, Callable[[], Tensor]]:
        """Compile and time one step; figures by name, what is wrong among them, and the call of the step."""
        watch = Watch(self.device)
        step, tables = make_step(lengths, self.cache, self.seed)
        tensors = StepTensors(step.bucket, self.cache, self.device)
        metadata = self.strategy.metadata(tensors)

        def call() -> Tensor:
            CURRENT["step"] = metadata
            torch.compiler.cudagraph_mark_step_begin()
            with torch.no_grad():
                return self.compiled(*tensors.inputs)

        start = time.perf_counter()
        tensors.fill(None)
        for _ in range(WARM_UP_CALLS):
            call()
        synchronise(self.device)
        compile_seconds = time.perf_counter() - start
        watch.warmed_up()

        tensors.fill(step, tables)
        first = call().clone()
        with watch.no_sync():
            again = call()
        wrong = [] if torch.equal(first, again) else ["two replays of the same step differ"]
        if not first[: len(lengths)].isfinite().all():
            wrong.append("logits are not finite")
        step_ms = self._per_call(call, repeats)

        def fill() -> None:
            tensors.fill(step, tables)
            synchronise(self.device)

        def served() -> None:
            tensors.fill(step, tables)
            self.strategy.choose(call())

        served_ms, fill_us = _median_ms(served, repeats), 1e3 * _median_ms(fill, repeats)
        wrong += watch.problems(1)
        keys = sum(cached + new for cached, new in lengths)
        key_bytes = 2 * self.config.kv_heads * self.config.head_dim * self.model.embedding.element_size()
        figures = {
            "name": name,
            "rows": step.n_tokens,
            "requests": len(lengths),
            "bucket_rows": step.bucket.tokens,
            "compile_s": round(compile_seconds, 1),
            "step_ms": round(step_ms, 3),
            "served_ms": round(served_ms, 3),
            "tokens_per_s": round(1e3 * step.n_tokens / step_ms),
            "new_tokens_per_s": round(1e3 * len(lengths) / step_ms),
            "metadata_us": round(fill_us, 1),
            "cache_gb": round(keys * key_bytes * self.config.layers / 1e9, 2),
            "graphs": watch.summary(),
            "wrong": wrong,
        }
        return figures, call

    def break_down(self, figures: Figures, call: Callable[[], Tensor]) -> Shares:
        """Profile one call of a step, and add to its figures where the time goes."""
        shares = profile(call, self.device)
        attention_us = shares.by_kind["attention"]
        figures |= {
            "kernels_ms": round(shares.total / 1e3, 3),
            "kernels": sum(count for _, count in shares.by_kernel.values()),
            "us_by_kind": {kind: round(us, 1) for kind, us in shares.by_kind.items()},
            "share_not_matmul_or_attention": round(shares.share("rest", "schedule"), 4),
            "schedule_us": round(shares.by_kind["schedule"], 1),
            "attention_tb_per_s": round(1e3 * figures["cache_gb"] / attention_us, 3) if attention_us else None,
            "by_kernel_us": {kernel: [round(us, 1), count] for kernel, (us, count) in _largest(shares, 30)},
        }
        return shares

    def _per_call(self, call: Callable[[], object], repeats: int) -> float:
        """Milliseconds of a call among many, one after the other: what a saturated GPU takes."""
        if self.device.type != "cuda":
            return _median_ms(call, repeats)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        call()
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / repeats


def _median_ms(call: Callable[[], object], repeats: int) -> float:
    """Median wall-clock time of a call that waits for its own result."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def _largest(shares: Shares, count: int) -> list[tuple[str, tuple[float, int]]]:
    return sorted(shares.by_kernel.items(), key=lambda item: -item[1][0])[:count]


def show(figures: Figures, shares: Shares) -> None:
    """Print one step's figures."""
    f = figures
    print(
        f"\n{f['name']}: {f['rows']} tokens of {f['requests']} requests (bucket of {f['bucket_rows']} rows), compiled "
        f"and recorded in {f['compile_s']:.0f} s\n"
        f"  step      {f['step_ms']:8.3f} ms  {f['tokens_per_s']:10,d} tokens/s, {f['new_tokens_per_s']:,d} new\n"
        f"  served    {f['served_ms']:8.3f} ms  with metadata sent and tokens read back, one step at a time\n"
        f"  kernels   {f['kernels_ms']:8.3f} ms  in {f['kernels']} launches"
    )
    for kind, microseconds in shares.by_kind.items():
        rate = f"  ({f['attention_tb_per_s']:.2f} TB/s of cache)" if kind == "attention" and microseconds else ""
        print(f"    {kind:10s} {microseconds / 1e3:8.3f} ms  {shares.share(kind):6.1%}{rate}")
    print(
        f"  neither matmul nor attention: {f['share_not_matmul_or_attention']:.1%}; schedule "
        f"{f['schedule_us']:.1f} us; metadata, on the host and across: {f['metadata_us']:.0f} us"
    )
    for name, (microseconds, count) in _largest(shares, 10):
        print(f"    {microseconds / 1e3:8.3f} ms  {count:4d} x  {name[:96]}")
    print(f"  {f['graphs']}")
    for line in f["wrong"]:
        print(f"  WRONG: {line}")


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write JSON, and return 1 where something was wrong."""
    p = argparse.ArgumentParser(
        prog="python -m tools.serve.whole_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--size", choices=tuple(SIZES), default="8b-like", help="the model's shape (default %(default)s)")
    p.add_argument("--layers", type=int, help="another number of layers")
    p.add_argument("--batch", type=int, default=64, help="requests (default %(default)s)")
    p.add_argument("--context", type=int, default=4096, help="tokens of each in the cache (default %(default)s)")
    p.add_argument("--chunks", type=int, default=4, help="of the requests, those that read a prompt in the mixed step")
    p.add_argument("--chunk-tokens", type=int, default=256, help="tokens that each of them reads (default %(default)s)")
    p.add_argument("--page-size", type=int, default=16, help="tokens in a page (default %(default)s)")
    p.add_argument("--new-keys", choices=("cache", "direct"), default="cache", help="where new keys are read")
    p.add_argument("--attn-impl", choices=("triton_grouped", "triton"), default="triton_grouped")
    p.add_argument("--only", choices=("decode", "mixed"), help="only one of the two steps")
    p.add_argument("--repeats", type=int, default=30, help="replays that are timed (default %(default)s)")
    p.add_argument("--device", default="cuda", help="cuda (default) or cpu")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16, float32 on a CPU")
    p.add_argument("--output", type=Path, help="write the figures there, as JSON")
    p.add_argument("--commit", help="the commit to note, for a copy of the tree without .git")
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args(argv)
    device = torch.device(a.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: expected a CUDA device, got none; pass --device cpu --size tiny to try it out")
    if device.type == "cpu" and a.size == "tiny":
        torch.set_num_threads(1)  # nothing in it is large enough to share
    dtype = getattr(torch, a.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    config = scaled(SIZES[a.size], a.layers)
    max_pages = pages_for(a.context + 2 * a.page_size, a.page_size)
    cache = CacheConfig(a.batch * max_pages, a.page_size, max_pages)
    command = command_of(p, a)
    facts = host_facts(command, a.commit) if device.type == "cuda" else {"device": "cpu", "torch": torch.__version__}
    start = time.perf_counter()
    whole = WholeStep(config, cache, device, dtype, a.new_keys == "cache", a.attn_impl, a.seed)
    synchronise(device)
    weights = sum(t.numel() for t in whole.model.parameters())
    cache_gb = 2 * config.layers * cache.pages * a.page_size * config.kv_heads * config.head_dim * dtype.itemsize / 1e9
    print(
        f"lowered-attn whole step: torch {torch.__version__} on {facts.get('gpu', device)}, {dtype}; {config.layers} "
        f"layers, {weights / 1e9:.2f}e9 weights, caches of {cache_gb:.1f} GB, pages of {a.page_size}; "
        f"made in {time.perf_counter() - start:.0f} s",
        flush=True,
    )
    decoding = [(a.context, 1)] * a.batch
    chunks = [(max(0, a.context - a.chunk_tokens), min(a.chunk_tokens, a.context))] * min(a.chunks, a.batch)
    cases = {"decode": decoding, "mixed": decoding[len(chunks) :] + chunks}
    measured = [whole.measure(name, lengths, a.repeats) for name, lengths in cases.items() if a.only in (None, name)]
    found = [figures for figures, _ in measured]
    for figures, call in measured:  # after all times are taken: a profiler may stay attached
        show(figures, whole.break_down(figures, call))
    if a.output:
        sizes = {
            "schema": SCHEMA,
            "size": a.size,
            "layers": config.layers,
            "batch": a.batch,
            "context": a.context,
            "page_size": a.page_size,
            "new_keys": a.new_keys,
            "attn_impl": a.attn_impl,
            "dtype": str(dtype),
        }
        a.output.parent.mkdir(parents=True, exist_ok=True)
        a.output.write_text(json.dumps({"host": facts, **sizes, "steps": found}, indent=1, allow_nan=False) + "\n")
        print(f"\nWritten to {a.output}.")
    return 1 if any(figures["wrong"] for figures in found) else 0


if __name__ == "__main__":
    sys.exit(main())
