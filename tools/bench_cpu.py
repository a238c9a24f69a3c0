"""Compiled forms beside SDPA on a CPU: the same shapes, both compiled, interleaved.

    python -m tools.bench_cpu --output tools/results/cpu.json

Causal shapes stand beside `is_causal`, a window beside SDPA with its bool mask (made outside the clock). Outputs are
compared before anything is timed. No GPU is needed; close other programs first.
"""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from custom_ops.forms import FORMS
from tools.host import git_commit
from tools.measure import interleaved

SHAPES = ((1, 8, 8, 128, 64), (2, 16, 16, 512, 64), (1, 16, 4, 1024, 128), (1, 16, 4, 4096, 64))
"""(batch, query heads, KV heads, length, head dim)."""
WINDOW = 256
ROUNDS = 7


def median_ms(call: Callable[[], object], at_least_s: float = 0.3) -> float:
    """Median time of one call in ms, over at least 5 calls and `at_least_s` seconds, after a warm-up."""
    call()
    times: list[float] = []
    while len(times) < 5 or sum(times) < at_least_s:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2] * 1e3


def measure(shape: tuple[int, int, int, int, int], dtype: torch.dtype, window: int | None) -> dict[str, object]:
    """One shape's times: ours and SDPA's, both under torch.compile, q, k and v token-major as a model leaves them."""
    batch, heads, kv_heads, length, dim = shape
    q, k, v = (torch.randn(batch, length, h, dim, dtype=dtype).transpose(1, 2) for h in (heads, kv_heads, kv_heads))
    mask = None
    if window is not None:
        at = torch.arange(length)
        mask = FORMS["sliding_self"].mask.dense(at, at, {"window": window})[:, None]

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if window is None:
            return torch.ops.lowered_attn.full_self(q, k, v)[0]
        return torch.ops.lowered_attn.sliding_self(q, k, v, window)[0]

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=heads != kv_heads
        )

    torch.compiler.reset()
    compiled = {
        "ours": torch.compile(ours, backend="lowered_attn", dynamic=False),
        "sdpa": torch.compile(sdpa, dynamic=False),
    }
    with torch.no_grad():
        torch.testing.assert_close(compiled["ours"](q, k, v), compiled["sdpa"](q, k, v), rtol=2e-2, atol=2e-2)
        calls = {name: lambda f=f: f(q, k, v) for name, f in compiled.items()}
        times, broken = interleaved(calls, median_ms, ROUNDS)
    if broken:
        raise RuntimeError(f"{shape}: {broken}")
    return {
        "form": "full_self" if window is None else "sliding_self",
        "window": window,
        "shape": {"batch": batch, "query_heads": heads, "kv_heads": kv_heads, "length": length, "head_dim": dim},
        "dtype": str(dtype).removeprefix("torch."),
        "rounds_ms": {name: list(t.rounds_ms) for name, t in times.items()},
        "ms": {name: t.ms for name, t in times.items()},
        "sdpa_over_ours": times["sdpa"].ms / times["ours"].ms,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.bench_cpu")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("out/cpu.json"))
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    rows = []
    for window in (None, WINDOW):
        for dtype in (torch.float32, torch.bfloat16):
            for shape in SHAPES:
                if window is not None and shape[3] <= window:
                    continue
                rows.append(measure(shape, dtype, window))
                row = rows[-1]
                print(
                    f"{row['form']:12s} {row['dtype']:8s} {row['shape']}: {row['sdpa_over_ours']:.2f}x SDPA", flush=True
                )
    document = {
        "schema": 1,
        "host": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
            "command": "python -m tools.bench_cpu",
            "git_commit": git_commit(),
        },
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(document, indent=1) + "\n")
    print(f"{options.output}: {len(rows)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
