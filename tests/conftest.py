"""What every test shares: a fixed seed, a clear skip without a GPU, interpreter tests in their own run."""

from __future__ import annotations

import atexit
import os
import random
import shutil
import tempfile

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
NO_GPU_REASON = "needs a CUDA device, and torch.cuda.is_available() is False here"

# Triton reads TRITON_INTERPRET when a kernel is defined: a process either compiles or interprets kernels.
collect_ignore = [] if INTERPRETING else ["interpreter"]


# A compilation that Inductor's cache serves decides nothing, and tests ask what was decided: each run starts with an
# empty cache, which its xdist workers inherit.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="lowered-attn-tests-")
    atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)


def pytest_report_header() -> list[str]:
    """Say what this run can and cannot cover."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none (gpu tests are skipped)"
    lines = [f"torch {torch.__version__}, CUDA device: {device}"]
    if not INTERPRETING:
        lines.append("tests/interpreter is left out: run it with TRITON_INTERPRET=1, as make test does")
    return lines


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` on a machine without one."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason=NO_GPU_REASON)
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seed() -> int:
    """The seed of torch's and Python's generators, set before every test so that order never matters."""
    value = 1234
    random.seed(value)
    torch.manual_seed(value)
    return value
