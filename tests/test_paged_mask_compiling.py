"""Paged masks' device functions compile to PTX, in Triton and in Gluon, for rows and for a tile's ends."""

from __future__ import annotations

import pytest

from custom_ops.paged.masks import paged_mask
from tests.paged_mask_cases import MODES

triton = pytest.importorskip("triton", reason="compiles device functions, and triton is not installed")

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.experimental import gluon  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402


@triton.jit
def in_triton(REQUESTS, OUT, RANGE: tl.constexpr, VISIBLE: tl.constexpr):
    requests = (
        tl.load(REQUESTS), tl.load(REQUESTS + 1), tl.load(REQUESTS + 2), tl.load(REQUESTS + 3), tl.load(REQUESTS + 4),
        tl.load(REQUESTS + 5),
    )  # fmt: skip
    row, key = tl.arange(0, 64), tl.arange(0, 64)
    lower, upper = RANGE(requests[0] + row, requests)
    first, _ = RANGE(requests[0], requests)
    _, last = RANGE(requests[0] + 63, requests)
    seen = VISIBLE((requests[0] + row)[:, None], key[None, :], requests)
    inside = (key[None, :] >= lower[:, None]) & (key[None, :] < upper[:, None])
    scores = tl.where(inside, tl.where(seen, tl.full([64, 64], 2.0, tl.float32), 1.0), 0.0)
    tl.store(OUT + row[:, None] * 64 + key[None, :], scores + first + last)


@gluon.jit
def in_gluon(REQUESTS, OUT, RANGE: gl.constexpr, VISIBLE: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    requests = (
        gl.load(REQUESTS), gl.load(REQUESTS + 1), gl.load(REQUESTS + 2), gl.load(REQUESTS + 3), gl.load(REQUESTS + 4),
        gl.load(REQUESTS + 5),
    )  # fmt: skip
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    key = gl.arange(0, 64, layout=gl.SliceLayout(0, layout))
    lower, upper = RANGE(requests[0] + row, requests)
    first, _ = RANGE(requests[0], requests)
    _, last = RANGE(requests[0] + 63, requests)
    seen = VISIBLE((requests[0] + row)[:, None], key[None, :], requests)
    inside = (key[None, :] >= lower[:, None]) & (key[None, :] < upper[:, None])
    scores = gl.where(inside, gl.where(seen, gl.full([64, 64], 2.0, gl.float32, layout), 1.0), 0.0)
    gl.store(OUT + row[:, None] * 64 + key[None, :], scores + first + last)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("language", ["triton", "gluon"])
def test_device_functions_compile(mode: str, language: str) -> None:
    from custom_ops.kernels.mask_functions import paged_functions

    kernel, source = (in_gluon, GluonASTSource) if language == "gluon" else (in_triton, ASTSource)
    for window, hole in ((None, True), (128, False)):
        mask = paged_mask(mode, block_size=32, window=window, prefix_hole=hole)
        functions = paged_functions(mask, gluon=language == "gluon")
        signature = {"REQUESTS": "*i32", "OUT": "*fp32", "RANGE": "constexpr", "VISIBLE": "constexpr"}
        constants = {"RANGE": functions.range, "VISIBLE": functions.visible}
        compiled = triton.compile(source(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
        assert "st.global" in compiled.asm["ptx"]
