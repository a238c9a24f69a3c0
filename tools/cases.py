"""The named cases: one list that feeds the tests of generated code, the tuning and the benchmarks.

    python -m tools.inspect --list

A case is a call of one form's op: shapes, dtype and the form's integers. Its tensors are drawn from a seed on the CPU
and moved, so that every device gets the same values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from custom_ops.form import Form
from custom_ops.forms import FORMS
from custom_ops.masks import OperandValue


@dataclass(frozen=True)
class CaseInputs:
    """What a case's op is called with."""

    query: Tensor
    """`[B, Hq, Lq, D]`, token-major in memory, as a model's projection leaves it."""
    key: Tensor
    """`[B, Hkv, Lk, D]`, token-major in memory."""
    value: Tensor
    """`[B, Hkv, Lk, Dv]`, token-major in memory."""
    operands: dict[str, OperandValue]
    """By the names of the op's arguments. Optional operands of the form are left out: no case has padding yet."""

    @property
    def arguments(self) -> dict[str, OperandValue]:
        """The op's arguments by name: `form.op(**inputs.arguments)`."""
        return {"q": self.query, "k": self.key, "v": self.value, **self.operands}


@dataclass(frozen=True)
class Case:
    """One shape of one form. Lengths are in tokens (`key_len` of segment_cross: in segments)."""

    name: str
    """How the command line and the results call it."""
    form_name: str
    """`"full_self"`, `"sliding_self"`, `"segment_cross"` or `"bidirectional"`."""
    description: str
    """Why it is in the list."""
    batch: int
    """B."""
    query_heads: int
    """Hq."""
    kv_heads: int
    """Hkv, which divides Hq."""
    query_len: int
    """Lq."""
    key_len: int
    """Lk."""
    head_dim: int
    """D, of queries and keys."""
    value_dim: int
    """Dv."""
    dtype: torch.dtype = torch.bfloat16
    """Of q, k and v."""
    window: int | None = None
    """sliding_self: how many keys a query sees, its own included."""
    lookback: int | None = None
    """segment_cross: how many earlier segments a query sees."""
    backward: bool = False
    """Whether forward and backward count together."""
    design_row: str | None = None
    """The row of the design's table of numbers, where the case is one."""
    scale: float | None = None
    """Of the scores; None is `1 / sqrt(D)`."""

    @property
    def form(self) -> Form:
        """The form whose op the case calls."""
        return FORMS[self.form_name]

    @property
    def title(self) -> str:
        """The shape in one line, for tables and plots."""
        if self.form_name == "segment_cross":
            mask, lengths = f"segment cross, lookback {self.lookback}", f"Lq{self.query_len} Lk{self.key_len}"
        else:
            plain = "full" if self.form_name == "bidirectional" else "causal"
            mask = plain if self.window is None else f"sliding {self.window}"
            lengths = f"S{self.query_len}"
        heads = f"H{self.query_heads}" if self.query_heads == self.kv_heads else f"H{self.query_heads}/{self.kv_heads}"
        dims = f"D{self.head_dim}" if self.head_dim == self.value_dim else f"D{self.head_dim}/{self.value_dim}"
        return f"{mask}{', fwd+bwd' if self.backward else ''} B{self.batch} {heads} {lengths} {dims}"

    def inputs(self, device: torch.device | str, seed: int = 0, requires_grad: bool = False) -> CaseInputs:
        """The op's arguments on `device`: q, k and v standard normal; `requires_grad` marks these three.

        Queries are spread evenly and in order over the segments, `query_segments[i] = i * Lk // Lq`, int32.
        """
        generator = torch.Generator().manual_seed(seed)

        def draw(heads: int, length: int, dim: int) -> Tensor:
            drawn = torch.randn(self.batch, length, heads, dim, generator=generator, dtype=self.dtype).to(device)
            return drawn.transpose(1, 2).requires_grad_(requires_grad)

        query = draw(self.query_heads, self.query_len, self.head_dim)
        key = draw(self.kv_heads, self.key_len, self.head_dim)
        value = draw(self.kv_heads, self.key_len, self.value_dim)
        operands: dict[str, OperandValue] = {}
        if self.form_name == "sliding_self":
            operands["window"] = self.window
        if self.form_name == "segment_cross":
            segments = torch.arange(self.query_len) * self.key_len // self.query_len
            operands["query_segments"] = segments.to(device, torch.int32).repeat(self.batch, 1)
            operands["lookback"] = self.lookback
        return CaseInputs(query, key, value, operands)

    @property
    def visible_pairs(self) -> int:
        """(query, key) pairs that one head of one request computes: exact, and counted without `custom_ops.masks`."""
        if self.form_name == "segment_cross":
            assert self.lookback is not None
            segments = (i * self.key_len // self.query_len for i in range(self.query_len))
            return sum(min(segment, self.lookback) + 1 for segment in segments)
        if self.form_name == "bidirectional":
            return self.query_len * self.key_len
        seen = self.query_len if self.window is None else min(self.window, self.query_len)
        # The first `seen` queries see 1, 2, ..., `seen` keys; each later one sees `seen`.
        return seen * (seen + 1) // 2 + (self.query_len - seen) * seen

    @property
    def flops(self) -> int:
        """Floating-point operations: two for each multiply-add of both products, and 2.5 times as many for a backward.

        The convention of FlashAttention's benchmarks: a backward has five products of the forward's two.
        """
        forward = 2 * self.visible_pairs * (self.head_dim + self.value_dim) * self.query_heads * self.batch
        return forward * 7 // 2 if self.backward else forward

    @property
    def bytes(self) -> int:
        """Bytes of q, k, v and out, each moved once; a backward moves these and their gradients as well."""
        queries = self.query_heads * self.query_len * (self.head_dim + self.value_dim)
        keys = self.kv_heads * self.key_len * (self.head_dim + self.value_dim)
        forward = self.batch * (queries + keys) * self.dtype.itemsize
        return 3 * forward if self.backward else forward


def _self_attention(name: str, description: str, batch: int, heads: str, length: int, dims: str, **more: Any) -> Case:
    """Self-attention from the short hands of the design's table: heads "32/8", dims "128" or "192/128"."""
    query_heads, _, kv_heads = heads.partition("/")
    head_dim, _, value_dim = dims.partition("/")
    return Case(
        name=name,
        form_name="sliding_self" if "window" in more else "full_self",
        description=description,
        batch=batch,
        query_heads=int(query_heads),
        kv_heads=int(kv_heads or query_heads),
        query_len=length,
        key_len=length,
        head_dim=int(head_dim),
        value_dim=int(value_dim or head_dim),
        **more,
    )


def _segment_cross(name: str, description: str, batch: int, heads: int, lengths: str, dim: int, **more: Any) -> Case:
    """Cross-attention with as many KV heads as query heads: lengths "8192/1024" are tokens and segments."""
    query_len, _, key_len = lengths.partition("/")
    return Case(
        name=name,
        form_name="segment_cross",
        description=description,
        batch=batch,
        query_heads=heads,
        kv_heads=heads,
        query_len=int(query_len),
        key_len=int(key_len),
        head_dim=dim,
        value_dim=dim,
        **more,
    )


_LIST = (
    _self_attention(
        "causal_b4_s4096_d128", "prefill of an 8B model", 4, "32/8", 4096, "128",
        design_row="causal B4 H32/8 S4096 D128",
    ),
    _self_attention(
        "causal_b1_s16384_d128", "one long prompt", 1, "32/8", 16384, "128",
        design_row="causal B1 H32/8 S16384 D128",
    ),
    _self_attention(
        "causal_b4_s4096_d64", "small heads: half the work a key, as much softmax", 4, "32/32", 4096, "64",
        design_row="causal B4 H32/32 S4096 D64",
    ),
    _self_attention(
        "sliding_b1_s16384_d128", "a window much shorter than the prompt", 1, "32/8", 16384, "128", window=1024,
        design_row="sliding 1024, B1 H32/8 S16384 D128",
    ),
    _self_attention(
        "mla_prefill_b1_s8192_d192_128", "latent attention, decompressed: values narrower than keys",
        1, "32", 8192, "192/128", design_row="MLA prefill B1 H32 S8192 192/128",
    ),
    _segment_cross(
        "segment_cross_b8_q8192_k1024_d64", "bytes attend to patches, eight bytes a patch", 8, 16, "8192/1024", 64,
        lookback=4, design_row="segment cross B8 H16 Lq8192 Lk1024 D64 lookback 4",
    ),
    _self_attention(
        "train_causal_b4_s4096_d128", "training an 8B model", 4, "32/8", 4096, "128", backward=True,
        design_row="causal fwd+bwd B4 H32/8 S4096 D128",
    ),
    _self_attention(
        "train_causal_b8_s2048_d64", "training a small model", 8, "16/16", 2048, "64", backward=True,
        design_row="causal fwd+bwd B8 H16/16 S2048 D64",
    ),
    _self_attention("causal_prefill", "small; its generated code is kept", 2, "16/4", 1024, "128"),
    _self_attention("sliding_prefill", "small; its generated code is kept", 2, "16/4", 1024, "128", window=512),
    _segment_cross("segment_cross_small", "small; its generated code is kept", 2, 8, "1024/128", 64, lookback=4),
    _self_attention("train_causal_small", "small, forward and backward", 2, "16/4", 1024, "128", backward=True),
    _self_attention("causal_d80", "head dim that is no power of two: 5 x 16", 2, "16", 1024, "80"),
    _self_attention("causal_d96", "head dim that is no power of two: 3 x 32", 2, "16", 1024, "96"),
    _self_attention("causal_d192", "head dim above 128, no power of two", 2, "16/4", 1024, "192"),
    _self_attention("causal_d256", "the widest head: most shared memory", 2, "16/4", 1024, "256"),
    _self_attention("causal_gqa7", "seven query heads a KV head: no power of two", 2, "28/4", 1024, "128"),
)  # fmt: skip

CASES: dict[str, Case] = {case.name: case for case in _LIST}
"""Every case by name, in the order of the list."""
