"""A Hugging Face model of Qwen3-8B's layer shape, prefill and decode: tokens/s beside plain torch.compile.

    python -m tools.whole_models --output models.json
    python -m tools.whole_models --device cpu --size tiny --rounds 2 --repeats 2    tries it out without a GPU

One model with random weights is compiled in several ways, which take turns, round by round:

    ours          attn_implementation="lowered_attn", backend="lowered_attn"
    recognised    the model untouched (its own "sdpa"), backend="lowered_attn"
    sdpa, flex    attn_implementation="sdpa" and "flex_attention", backend="inductor"
    flex-ahead    the same as flex, with the mask of the first step in all steps: a bound, for masks that cost nothing

in three cases: "prefill" with an attention_mask of ones, as a tokenizer returns it; "prefill-causal", whose mask
Transformers makes ahead of the graph, where it sees that there is no padding (SDPA then needs none); and "decode", one
token for each request over a full static cache, as a CUDA graph. Transformers cannot make Flex's masks inside a graph:
they are made before it, once for a prefill and not timed, and anew for every step, as `generate` does. Logits of the
first requests are held against the eager model in fp32: a variant with more than twice the error of eager bf16 is
reported as wrong, without a time. Ends with status 1 where one was wrong or failed. The file is written after every
case: a run that is stopped keeps those before.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch._dynamo.utils import counters
from transformers.masking_utils import create_causal_mask

import lowered_attn.integrations.transformers  # noqa: F401  (registers "lowered_attn")
from inductor_passes import decisions
from lowered_attn.compile import backend as OURS
from tools.bench import write
from tools.host import command_of, host_facts
from tools.serve.loop import synchronise

SCHEMA = 1
"""Of the JSON that is written; tools.report reads it."""
SIZES: dict[str, dict[str, int]] = {
    "qwen3-8b": {
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128,
    },
    "tiny": {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16,
    },
}  # fmt: skip
VARIANTS: dict[str, tuple[str, Any]] = {
    "ours": ("lowered_attn", OURS),
    "recognised": ("sdpa", OURS),
    "sdpa": ("sdpa", "inductor"),
    "flex": ("flex_attention", "inductor"),
    "flex-ahead": ("flex_attention", "inductor"),
}
"""Name -> (attn_implementation, backend)."""
TARGETS = {"prefill": 1.0, "prefill-causal": 1.0, "decode": 1.2}
"""Case -> the least ratio of the best peer's time to ours."""
PEERS = ("sdpa", "flex")
BOUND = "flex-ahead"
CHECKED = {"prefill": 1, "prefill-causal": 1, "decode": 4}
"""Case -> requests whose logits are compared."""
ALLOWED = 2.0
"""Times the error of the eager model in the same dtype."""


@dataclass(frozen=True)
class Shape:
    """What is measured: layers, and `(requests, tokens)` of a prefill, `(requests, context)` of a decoding step."""

    size: str
    layers: int
    prefill: tuple[int, int]
    decode: tuple[int, int]


class WholeModel:
    """One model, its inputs, and its logits in fp32."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        torch.manual_seed(seed)
        config = transformers.Qwen3Config(
            **SIZES[shape.size], num_hidden_layers=shape.layers, tie_word_embeddings=False, pad_token_id=None,
            bos_token_id=None, eos_token_id=None, max_position_embeddings=max(shape.prefill[1], shape.decode[1] + 256),
        )  # fmt: skip
        config._attn_implementation = "sdpa"
        with torch.device(device):
            self.model = transformers.Qwen3ForCausalLM(config).eval().to(dtype)
        vocabulary = SIZES[shape.size]["vocab_size"]
        self.prompts = torch.randint(vocabulary, shape.prefill, device=device)
        self.tokens = torch.randint(vocabulary, (shape.decode[0], 1), device=device)
        # Flex's masks are made of blocks of 128 keys.
        self.capacity = -(-(shape.decode[1] + 128) // 128) * 128
        kv_shape = (shape.decode[0], config.num_key_value_heads, shape.decode[1], config.head_dim)
        self.cached = [torch.randn(2, *kv_shape, device=device, dtype=dtype) for _ in range(shape.layers)]

    def cache(self, requests: int | None = None, dtype: torch.dtype | None = None) -> Any:
        """A static cache that holds the context of the first requests; every cache the same numbers."""
        cache = transformers.StaticCache(self.model.config, max_cache_len=self.capacity)
        for layer, (keys, values) in zip(cache.layers, self.cached, strict=True):
            keys, values = (t[:requests].to(dtype or self.dtype) for t in (keys, values))
            layer.lazy_initialization(keys, values)
            layer.keys[:, :, : keys.shape[2]], layer.values[:, :, : keys.shape[2]] = keys, values
        self.rewind(cache)
        return cache

    def rewind(self, cache: Any) -> None:
        """Forget what was decoded."""
        for layer in cache.layers:
            layer.cumulative_length.fill_(self.shape.decode[1])

    def arguments(
        self, model: Any, case: str, requests: int | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Any]:
        """What the model is called with."""
        flex = model.config._attn_implementation == "flex_attention"
        if case == "decode":
            arguments = {"input_ids": self.tokens[:requests], "past_key_values": self.cache(requests, dtype)}
        else:
            ids = self.prompts[:requests]
            arguments = {"input_ids": ids, "use_cache": False, "logits_to_keep": 1}
            if case == "prefill":
                arguments["attention_mask"] = torch.ones_like(ids)
        if flex or case == "prefill-causal":
            self.make_mask(model, arguments)
        return arguments

    def make_mask(self, model: Any, arguments: dict[str, Any]) -> None:
        """Make the mask as Transformers does ahead of a graph."""
        ids, padding = arguments["input_ids"], arguments.get("attention_mask")
        embedded = torch.empty(*ids.shape, 1, device=self.device, dtype=self.dtype)
        padding = None if isinstance(padding, dict) else padding
        mask = create_causal_mask(model.config, embedded, padding, arguments.get("past_key_values"))
        arguments["attention_mask"] = {"full_attention": mask}

    def reference(self, case: str) -> tuple[Tensor, float]:
        """The last logits of the first requests in a wider dtype, and how far the eager model's are from them."""
        requests, dtype = CHECKED[case], torch.float64 if self.dtype == torch.float32 else torch.float32
        with torch.no_grad():
            wide = copy.deepcopy(self.model).to(dtype)
            exact = wide(**self.arguments(wide, case, requests, dtype)).logits[:, -1]
            eager = self.model(**self.arguments(self.model, case, requests)).logits[:, -1]
        return exact, difference(eager, exact)

    def runner(self, case: str, variant: str) -> Run:
        """One way to compile the model; the weights are shared."""
        implementation, backend = VARIANTS[variant]
        shared: dict[int, Any] = {id(t): t for t in (*self.model.parameters(), *self.model.buffers())}
        model = copy.deepcopy(self.model, shared)
        model.set_attn_implementation(implementation)
        mode = "reduce-overhead" if case == "decode" and self.device.type == "cuda" else None
        compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False, mode=mode)
        arguments = self.arguments(model, case)

        def call() -> Tensor:
            if case == "decode" and variant == "flex":
                self.make_mask(model, arguments)
            torch.compiler.cudagraph_mark_step_begin()
            with torch.no_grad():
                return compiled(**arguments).logits[:, -1]

        def rewind() -> None:
            if case == "decode":
                self.rewind(arguments["past_key_values"])

        return Run(call, rewind)


@dataclass
class Run:
    """A variant of a case, its error, and the milliseconds of a call in each round."""

    call: Callable[[], Tensor]
    rewind: Callable[[], None]
    compile_s: float = 0.0
    error: float = float("nan")
    wrong: str = ""
    kernels: dict[str, int] | None = None
    """What attention became, and how many layers' did; None where the backend is not ours."""
    rounds_ms: list[float] = field(default_factory=list)

    def prepare(self, exact: Tensor, allowed: float) -> None:
        """Compile, and compare the logits."""
        before, start = Counter(counters["graph_break"]), time.perf_counter()
        with decisions.recording() as log:
            for _ in range(3):  # a CUDA graph is recorded at the second call
                self.rewind()
                logits = self.call()
        self.compile_s = round(time.perf_counter() - start, 1)
        lowered = [d for d in log.records if d.stage == "lowered" and "kernel" in d.facts]
        self.kernels = dict(Counter(f"{d.op}: {d.facts['kernel']}" for d in lowered)) if log.records else None
        self.error = difference(logits[: len(exact)], exact)
        if not self.error <= allowed:
            self.wrong = f"error {self.error:.2e}, allowed {allowed:.2e}"
        elif Counter(counters["graph_break"]) != before or counters["inductor"]["cudagraph_skips"]:
            self.wrong = "a graph broke, or a CUDA graph was skipped"

    def time(self, repeats: int, device: torch.device) -> None:
        """One more round: calls one behind the other, as a saturated GPU takes them."""
        self.rewind()
        self.call()
        self.rewind()
        synchronise(device)
        start = time.perf_counter()
        for _ in range(repeats):
            self.call()
        synchronise(device)
        self.rounds_ms.append(1e3 * (time.perf_counter() - start) / repeats)


def difference(actual: Tensor, exact: Tensor) -> float:
    """The root mean square of the error, relative to that of the exact logits."""
    return float((actual.to(exact.dtype) - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def measure(whole: WholeModel, case: str, variants: Sequence[str], rounds: int, repeats: int) -> dict[str, Any]:
    """One case: every variant compiled, checked and timed in turns."""
    requests, length = whole.shape.decode if case == "decode" else whole.shape.prefill
    tokens = requests if case == "decode" else requests * length
    torch.compiler.reset()
    exact, eager_error = whole.reference(case)
    runs: dict[str, Run] = {}
    failures: dict[str, str] = {}
    variants = [variant for variant in variants if case == "decode" or variant != BOUND]
    for variant in variants:
        counters["inductor"]["cudagraph_skips"] = 0
        try:
            run = whole.runner(case, variant)
            run.prepare(exact, ALLOWED * eager_error)
        except Exception as error:  # one that cannot run is reported, and the others are measured
            failures[variant] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            print(f"  {variant}: FAILED {failures[variant]}", flush=True)
            continue
        runs[variant] = run
        print(f"  {variant}: compiled in {run.compile_s:.0f} s, error {run.error:.2e} {run.wrong}", flush=True)
    timed = {variant: run for variant, run in runs.items() if not run.wrong}
    for _ in range(rounds):
        for run in timed.values():
            run.time(repeats, whole.device)
    best = min((statistics.median(timed[peer].rounds_ms) for peer in PEERS if peer in timed), default=None)
    rows: list[dict[str, Any]] = []
    for variant in variants:
        if variant not in runs:
            rows.append({"variant": variant, "status": "failed", "reason": failures[variant]})
            continue
        run = runs[variant]
        row: dict[str, Any] = {
            "variant": variant, "status": "wrong" if run.wrong else "ok", "reason": run.wrong,
            "compile_s": run.compile_s, "error": run.error if math.isfinite(run.error) else None,
            "kernels": run.kernels,
        }  # fmt: skip
        if variant in timed:
            ms = statistics.median(run.rounds_ms)
            row |= {"ms": ms, "rounds_ms": run.rounds_ms, "tokens_per_s": round(1e3 * tokens / ms)}
            peers = [peer for peer in (*PEERS, BOUND) if peer in timed and peer != variant]
            row["ratios"] = {peer: statistics.median(timed[peer].rounds_ms) / ms for peer in peers}
            if variant not in PEERS and best is not None:
                row["met"] = best / ms >= TARGETS[case]
        rows.append(row)
    return {
        "name": case, "requests": requests, "tokens": length, "eager_error": eager_error, "at_least": TARGETS[case],
        "rows": rows,
    }  # fmt: skip


def show(found: dict[str, Any]) -> None:
    """Print one case's table."""
    print(f"\n{found['name']}: {found['requests']} x {found['tokens']}, eager error {found['eager_error']:.2e}")
    for row in found["rows"]:
        if row["status"] != "ok":
            print(f"  {row['variant']:11s} {row['status'].upper()}: {row['reason']}")
            continue
        ratios = "  ".join(f"x{ratio:.3f} {peer}" for peer, ratio in row["ratios"].items())
        missed = "" if row.get("met", True) else f"  MISSED {found['at_least']}x"
        spread = f"{min(row['rounds_ms']):.3f}..{max(row['rounds_ms']):.3f}"
        rate = f"{row['tokens_per_s']:9,d} tokens/s"
        print(f"  {row['variant']:11s} {row['ms']:9.3f} ms ({spread})  {rate}  {ratios}{missed}")
        if row["kernels"]:
            print(f"  {'':11s} {row['kernels']}")


def _pair(text: str) -> tuple[int, int]:
    requests, _, tokens = text.partition("x")
    return int(requests), int(tokens)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write JSON, and return 1 where a variant was wrong or failed."""
    p = argparse.ArgumentParser(
        prog="python -m tools.whole_models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--size", choices=tuple(SIZES), default="qwen3-8b", help="a layer's shape (default %(default)s)")
    p.add_argument("--layers", type=int, default=8)
    p.add_argument("--prefill", type=_pair, default=None, metavar="RxT", help="default 4x4096, 2x40 for tiny")
    p.add_argument("--decode", type=_pair, default=None, metavar="RxT", help="default 64x4096, 3x40 for tiny")
    p.add_argument("--cases", default=",".join(TARGETS), help="default %(default)s")
    p.add_argument("--variants", default=",".join(VARIANTS), help="default %(default)s")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--repeats", type=int, default=10, help="calls in a round (default %(default)s)")
    p.add_argument("--device", default="cuda", help="cuda (default) or cpu")
    p.add_argument("--output", type=Path, help="write the figures there, as JSON")
    p.add_argument("--commit", help="the commit to note, for a copy of the tree without .git")
    a = p.parse_args(argv)
    device = torch.device(a.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: expected a CUDA device, got none; pass --device cpu --size tiny to try it out")
    cases, variants = a.cases.split(","), a.variants.split(",")
    for given, known in ((cases, TARGETS), (variants, VARIANTS)):
        for name in given:
            if name not in known:
                p.error(f"{name}: expected some of {', '.join(known)}")
    if not 0 < a.repeats <= 100:
        p.error(f"--repeats: expected 1 to 100, got {a.repeats}; the cache has room for that many tokens more")
    prefill, decode = ((2, 40), (3, 40)) if a.size == "tiny" else ((4, 4096), (64, 4096))
    shape = Shape(a.size, a.layers, a.prefill or prefill, a.decode or decode)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    command = command_of(p, a)
    facts = host_facts(command, a.commit) if device.type == "cuda" else {"device": "cpu", "torch": torch.__version__}
    facts["transformers"] = transformers.__version__
    whole = WholeModel(shape, device, dtype)
    found: list[dict[str, Any]] = []
    document: dict[str, Any] = {
        "schema": SCHEMA, "host": facts, "size": a.size, "layers": a.layers, "dtype": str(dtype),
        "rounds": a.rounds, "repeats": a.repeats, "complete": False, "cases": found,
    }  # fmt: skip
    for case in cases:
        print(f"{case}", flush=True)
        found.append(measure(whole, case, variants, a.rounds, a.repeats))
        document["complete"] = len(found) == len(cases)
        if a.output:
            write(a.output, document)
        show(found[-1])
    if a.output:
        print(f"\nWritten to {a.output}.")
    return 1 if any(row["status"] != "ok" for case in found for row in case["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
