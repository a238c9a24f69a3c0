"""Facts about the machine and the software that a measurement was taken with."""

from __future__ import annotations

import argparse
import datetime
import platform
import shlex
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def host_facts(command: str, commit: str | None = None) -> dict[str, object]:
    """What a results file says of its host: GPU, versions, date (UTC), the command and the git commit.

    `commit` is for copies of the tree without a `.git` folder; otherwise the commit is read from git, with
    "+changes" behind it where the tree differs from it.
    """
    import triton

    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    cudnn = torch.backends.cudnn.version()
    return {
        "gpu": device.name,
        "gpu_memory_gib": round(device.total_memory / 2**30, 1),
        "compute_capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": cudnn,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "git_commit": commit or git_commit(),
        "copy_tb_per_s": round(_copy_rate(), 3),
        "matmul_bf16_tflop_per_s": round(_matmul_rate(), 1),
    }


def command_of(parser: argparse.ArgumentParser, options: argparse.Namespace) -> str:
    """The command to repeat: the parser's `prog` and what differs from the defaults, without where it writes."""
    words = []
    for name, value in vars(options).items():
        if name not in ("output", "commit") and value != parser.get_default(name):
            text = "x".join(map(str, value)) if isinstance(value, tuple) else value
            words.append(f"--{name.replace('_', '-')} {shlex.quote(str(text))}")
    return " ".join([parser.prog, *words])


def git_commit(root: Path = ROOT) -> str | None:
    """The tree's commit, "+changes" behind it where tracked files differ; None outside a git checkout."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):  # no git here, or no repository
            return None
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD")
    return commit and commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def _copy_rate(size: int = 2**32) -> float:
    """Device-to-device copy in TB/s, bytes read and written."""
    source = torch.empty(size, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * size / _median_ms(lambda: target.copy_(source)) / 1e9


def _matmul_rate(n: int = 8192) -> float:
    """A bf16 product of two random `n` by `n` matrices in TFLOP/s."""
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / _median_ms(lambda: a @ b) / 1e9


def _median_ms(call: Callable[[], object], repeats: int = 20) -> float:
    """Median time of a call by CUDA events, after three calls of warm-up."""
    times = []
    for index in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        if index >= 3:
            times.append(start.elapsed_time(end))
    return statistics.median(times)
