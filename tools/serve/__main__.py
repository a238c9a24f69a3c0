"""Serve random requests with a small Qwen3-like model of random weights, and check every step's logits.

    python -m tools.serve                                          a tiny model on the CPU
    python -m tools.serve --mode diffusion --prefix-mode prefix_full --prefix-hole
    python -m tools.serve --device cuda --size small --requests 64 --max-requests 32 --max-rows 512 --max-tokens 1024

Requests arrive at random, prompts are read in chunks beside requests that decode, and each step runs as one compiled
graph (one CUDA graph on a GPU) of its bucket. The loop prints tokens/s and attention's share of the time, and ends
with status 1 where a step's logits are wrong, a graph broke or was compiled after warm-up, a CUDA graph was skipped,
or the host waited for the GPU inside a step.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

from tools.serve.block_diffusion import MODES
from tools.serve.loop import Server, ServeSettings, StepReport, make_strategy
from tools.serve.model import SIZES, scaled
from tools.serve.scheduler import random_requests


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m tools.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--mode", choices=("ar", "diffusion"), default="ar", help="how tokens are made (default %(default)s)"
    )
    p.add_argument("--prefix-mode", choices=MODES, default=MODES[0], help="diffusion: how a prompt sees itself")
    p.add_argument("--prefix-hole", action="store_true", help="diffusion: fill prompts up to a block and hide the rest")
    p.add_argument("--block-size", type=int, default=4, help="diffusion: tokens in a block (default %(default)s)")
    p.add_argument("--denoise-steps", type=int, default=2, help="diffusion: steps a block (default %(default)s)")
    p.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32, bfloat16 on cuda")
    p.add_argument("--size", choices=tuple(SIZES), default="tiny", help="the model's shape (default %(default)s)")
    p.add_argument("--layers", type=int, help="another number of layers")
    p.add_argument("--attn-impl", choices=("triton_grouped", "triton"), default="triton_grouped")
    p.add_argument("--steps", type=int, default=1000, help="at most this many steps (default %(default)s)")
    p.add_argument("--requests", type=int, default=24, help="requests in all (default %(default)s)")
    p.add_argument("--every", type=float, default=1.0, help="steps between two arrivals, on average")
    p.add_argument("--prompt", type=int, nargs=2, default=(4, 96), metavar=("MIN", "MAX"), help="tokens of a prompt")
    p.add_argument("--new", type=int, nargs=2, default=(4, 48), metavar=("MIN", "MAX"), help="tokens to generate")
    p.add_argument("--max-requests", type=int, default=8, help="requests in a step (default %(default)s)")
    p.add_argument("--max-rows", type=int, default=128, help="tokens in a step (default %(default)s)")
    p.add_argument("--max-tokens", type=int, default=256, help="tokens of a request (default %(default)s)")
    p.add_argument("--buckets", type=int, default=1, help="buckets for steps that only decode (default %(default)s)")
    p.add_argument("--page-size", type=int, default=16, help="tokens in a page (default %(default)s)")
    p.add_argument("--report-every", type=int, default=20, help="steps between two lines (default %(default)s)")
    p.add_argument("--no-check", action="store_true", help="do not compare logits")
    p.add_argument("--strict", action="store_true", help="raise where a CUDA graph is skipped, at once")
    p.add_argument("--seed", type=int, default=0)
    return p


class Table:
    """Prints a line of figures every so many steps."""

    def __init__(self, every: int) -> None:
        self.every, self.reports, self.attention = every, list[StepReport](), list[float]()
        print(
            "\nMeans of the steps since the last line; requests = decoding + prefilling + reading on.\n"
            "  step  requests                        rows  ms/step   tokens/s  new tokens/s  attention  error/allowed"
        )

    def add(self, number: int, report: StepReport) -> None:
        """Take in step `number`; print where a line is due."""
        if report.shares is not None:
            self.attention.append(report.shares.share("attention", "schedule"))
        self.reports.append(report)
        if number % self.every == 0:
            self.flush(number)

    def flush(self, number: int) -> None:
        """Print a line about the steps since the last one."""
        timed = [r for r in self.reports if r.shares is None] or self.reports
        if not timed:
            return
        kinds = [sum(r.step.kinds[i] for r in self.reports) / len(self.reports) for i in range(3)]
        seconds = sum(r.seconds for r in timed)
        rows = sum(r.step.n_tokens for r in timed)
        new = sum(r.generated for r in timed)
        errors = [r.error.of_allowed for r in self.reports if r.error]
        shares = [r.shares.share("attention", "schedule") for r in self.reports if r.shares]
        print(
            f"  {number:4d}  {sum(kinds):8.1f} = {kinds[0]:5.1f} + {kinds[1]:4.1f} + {kinds[2]:4.1f}"
            f"{rows / len(timed):8.0f} {1e3 * seconds / len(timed):8.2f} "
            f"{rows / seconds:10,.0f} {new / seconds:13,.0f} "
            + (f"{sum(shares) / len(shares):10.1%}" if shares else f"{'-':>10s}")
            + (f"  {max(errors):13.2f}" if errors else f"  {'-':>13s}"),
            flush=True,
        )
        self.reports.clear()


def main(argv: list[str] | None = None) -> int:
    """Serve, print, and return 1 where something was wrong."""
    a = parser().parse_args(argv)
    device = torch.device(a.device)
    dtype = getattr(torch, a.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    config = scaled(SIZES[a.size], a.layers)
    settings = ServeSettings(
        config, device, dtype, max_requests=a.max_requests, max_rows=a.max_rows, bucket_sizes=a.buckets,
        page_size=a.page_size, max_tokens=a.max_tokens, check=not a.no_check, attn_impl=a.attn_impl, strict=a.strict,
        seed=a.seed,
    )  # fmt: skip
    if device.type == "cpu" and a.size == "tiny":
        torch.set_num_threads(1)  # nothing in it is large enough to share
    strategy = make_strategy(a.mode, config, a.prefix_mode, a.block_size, a.denoise_steps, a.prefix_hole)
    begin = time.perf_counter()
    server = Server(settings, strategy)
    weights = sum(p.numel() for p in server.model.parameters())
    print(
        f"lowered-attn serve: torch {torch.__version__} on {device}, {str(dtype).removeprefix('torch.')}, mode {a.mode}"
    )
    print(
        f"A {a.size} model, {config.layers} layers, {weights:,} weights; {settings.cache.pages} pages of "
        f"{a.page_size} tokens. {a.requests} requests of {a.prompt[0]} to {a.prompt[1]} tokens want {a.new[0]} to "
        f"{a.new[1]} more."
    )
    server.warm_up(
        lambda bucket, seconds: print(
            f"  warm-up: {bucket.tokens} rows, {bucket.requests} requests: {seconds:.1f} s", flush=True
        )
    )
    for request in random_requests(a.requests, config.vocab - 1, tuple(a.prompt), tuple(a.new), a.every, a.seed):
        server.scheduler.add(request)

    table, wrong, number, now, seconds, tokens = Table(a.report_every), list[str](), 0, 0, 0.0, 0
    while number < a.steps:
        report = server.step(now, profiled=(number + 1) % a.report_every == a.report_every // 2)
        now += 1
        if report is None:
            if not server.scheduler.waiting:
                break
            now = max(now, server.scheduler.waiting[0].arrival)
            continue
        number += 1
        if report.shares is None:
            seconds, tokens = seconds + report.seconds, tokens + report.generated
        table.add(number, report)
        if report.error is not None and not report.error.within:
            wrong.append(f"step {number}: error {report.error.compiled:.2e}, allowed {report.error.allowed:.2e}")
    table.flush(number)

    wrong += server.watch.problems(len(server.tensors))
    finished = server.scheduler.finished
    print(
        f"\n{number} steps, {len(finished)} of {a.requests} requests finished; "
        f"{tokens / max(seconds, 1e-9):,.0f} new tokens/s."
    )
    if table.attention:
        where = "the GPU's kernels" if device.type == "cuda" else "a step"
        print(f"Attention takes {sum(table.attention) / len(table.attention):.1%} of the time of {where}.")
    print(f"Logits: {server.check.describe() if server.check else 'not checked'}.")
    print(f"{server.watch.summary()}.")
    for line in wrong[:10]:
        print(f"WRONG: {line}")
    print(f"{'Something is wrong' if wrong else 'All is well'}; {time.perf_counter() - begin:.0f} s.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
