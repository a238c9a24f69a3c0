"""Templates address the last dimension of their inputs without a stride: it has to be 1 in generated code."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton compiles the generated code")

from inductor_passes import LIBRARY_OPTION
from inductor_passes.pretend_gpu import Generated, generate, pretend_gpu
from lowered_attn.compile import backend

OPS = torch.ops.lowered_attn
BATCH, HEADS, KV_HEADS, LENGTH, DIM, HIDDEN = 2, 8, 2, 384, 128, 256
TEMPLATES = {LIBRARY_OPTION: False}
dynamic = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])


def strides(made: Generated) -> dict[str, str]:
    """The last stride of each input in the attention kernel's source."""
    (source,) = (source for source in made.kernels.values() if "tl.dot" in source)
    found = re.findall(r"(stride_[a-z]+) = \((.*?),?\)$", source, re.MULTILINE)
    return {name: numbers.rsplit(",", 1)[-1].strip() for name, numbers in found}


def attend(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return OPS.full_self(q, k, v, padding)[0]


@dynamic
def test_another_dimension_may_have_the_unit_stride(dynamic: bool) -> None:
    with pretend_gpu("sm_90") as gpu, torch.no_grad():
        with gpu.fake_tensors():
            # [B, H, D, S] in memory
            q, k, v = (
                torch.empty(BATCH, heads, DIM, LENGTH, dtype=torch.bfloat16, device="cuda").transpose(2, 3)
                for heads in (HEADS, KV_HEADS, KV_HEADS)
            )
            padding = torch.empty(BATCH, LENGTH, dtype=torch.bool, device="cuda")
        made = generate(attend, q, k, v, padding, backend=backend, dynamic=dynamic, options=TEMPLATES)
    assert strides(made) == {"stride_q": "1", "stride_k": "1", "stride_v": "1"}


def normed(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


def rotated_attention(
    hidden: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, weight: Tensor, angles: Tensor, padding: Tensor
) -> Tensor:
    """Angles ``[1, D / 2, S]`` are read along the tokens: torch 2.11 laid q and k out likewise, head dim outermost."""
    turns = angles.transpose(1, 2)
    turns = torch.cat([turns, turns], -1)[:, None]
    cos, sin = turns.cos().to(hidden.dtype), turns.sin().to(hidden.dtype)
    q, k, v = ((hidden @ w).unflatten(-1, (-1, DIM)) for w in (wq, wk, wv))
    q, k = (rotated(normed(t, weight).transpose(1, 2), cos, sin) for t in (q, k))
    v = v.transpose(1, 2)
    return OPS.full_self(q, k, v, padding)[0].transpose(1, 2).flatten(2)


@dynamic
def test_layouts_that_are_open_are_settled(dynamic: bool) -> None:
    with pretend_gpu("sm_90") as gpu, torch.no_grad():
        with gpu.fake_tensors():
            bf16 = {"dtype": torch.bfloat16, "device": "cuda"}
            hidden = torch.empty(BATCH, LENGTH, HIDDEN, **bf16)
            weights = (torch.empty(HIDDEN, heads * DIM, **bf16) for heads in (HEADS, KV_HEADS, KV_HEADS))
            angles = torch.empty(1, DIM // 2, LENGTH, device="cuda")
            padding = torch.empty(BATCH, LENGTH, dtype=torch.bool, device="cuda")
            arguments = (hidden, *weights, torch.empty(DIM, **bf16), angles, padding)
        made = generate(rotated_attention, *arguments, backend=backend, dynamic=dynamic, options=TEMPLATES)
    assert strides(made) == {"stride_q": "1", "stride_k": "1", "stride_v": "1"}


def test_paged_inputs_of_any_layout() -> None:
    """Columns of q, k, v and page tables lie side by side, whatever came."""

    def attend(columns: Tensor, cache: Tensor, cu_seqlens_q: Tensor, context_lens: Tensor, tables: Tensor) -> Tensor:
        q, k, v = columns.permute(2, 1, 0).split([HEADS, KV_HEADS, KV_HEADS], 1)
        out, _ = OPS.paged_attention(
            q, k, v, cache, cache, cu_seqlens_q, context_lens, tables.t(), None, [], impl="triton_grouped"
        )
        return out

    with pretend_gpu("sm_90") as gpu, torch.no_grad():
        with gpu.fake_tensors():
            bf16 = {"dtype": torch.bfloat16, "device": "cuda"}
            columns = torch.empty(DIM, HEADS + 2 * KV_HEADS, 32, **bf16)
            cache = torch.empty(64, 16, KV_HEADS, DIM, **bf16)
            cu_seqlens_q, context_lens, tables = (
                torch.empty(size, dtype=torch.int32, device="cuda") for size in ((5,), (4,), (8, 4))
            )
            arguments = (columns, cache, cu_seqlens_q, context_lens, tables)
        made = generate(attend, *arguments, backend=backend, options=TEMPLATES)
    copies = [source for source in made.kernels.values() if "tl.dot" not in source and "tl.store" in source]
    assert copies, "columns in memory order [D, H, T] were not copied"
    (source,) = (source for source in made.kernels.values() if "tl.dot" in source)
    # A row of the page table is its 8 pages, side by side.
    assert re.search(r"PAGE_TABLES \+ request\.to\(tl\.int64\) \* 8\b", source)
    width = (HEADS + 2 * KV_HEADS) * DIM
    assert re.search(rf"stride_q = \(({width}|{HEADS * DIM}), {DIM}\)", source), strides(made)
