"""The serving loop and the soak on a real GPU: CUDA graphs that are never skipped, and no sync in a step."""

from __future__ import annotations

import pytest
import torch

from tools.serve import __main__ as command
from tools.serve import soak

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("kind", [[], ["--diffusion"], ["--window", "100", "--page-size", "32", "--head-dim", "64"]])
def test_soak(kind: list[str]) -> None:
    assert soak.main(["--device", "cuda", "--steps", "60", "--strict", "--reference-every", "5", *kind]) == 0


def test_soak_of_a_program_a_head() -> None:
    assert soak.main(["--device", "cuda", "--steps", "40", "--attn-impl", "triton", "--dtype", "float16"]) == 0


@pytest.mark.parametrize(
    "mode", [["--mode", "ar"], ["--mode", "diffusion", "--prefix-mode", "prefix_full", "--prefix-hole"]]
)
def test_served_logits(mode: list[str]) -> None:
    sizes = ["--size", "small", "--layers", "2", "--requests", "12", "--steps", "60", "--buckets", "2"]
    assert command.main(["--device", "cuda", "--strict", *sizes, *mode]) == 0
