"""The kept launches of Hopper kernels (tests/kept_launches.py), in a process whose libcuda is tests/fake_cuda.c."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def test_kept_launches_are_those_that_triton_makes() -> None:
    pytest.importorskip("triton.experimental.gluon", reason="the kernel is written in Gluon")
    if torch.cuda.is_available():
        pytest.skip("a GPU's own libcuda is loaded; tests/gpu launches for real")
    if shutil.which(os.environ.get("CC", "cc")) is None:
        pytest.skip("needs a C compiler, as Triton does")
    here = Path(__file__).parent
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(here / "kept_launches.py")]
    found = subprocess.run(
        command, cwd=here.parent, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
