"""What the tests of ops and kernels share: calls of a form, the oracle, the derived tolerance, pairwise combinations.

The tolerance is derived, never picked: the error against fp64 may be at most twice the error that attention in the
inputs' dtype makes by itself, plus a floor (see ``floors``).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from custom_ops.form import Form, default_scale
from custom_ops.forms import FORMS
from custom_ops.masks import OperandValue
from custom_ops.reference import query_positions, reference_attention

LAYOUTS = ("contiguous", "token_major", "sliced", "expanded", "strided_last")
"""``token_major`` a transposed ``[B, S, H, D]``; ``sliced`` part of a wider tensor in every dimension; ``expanded``
one request seen as many, stride 0; ``strided_last`` a last stride of 2.
"""
DOCUMENTS = 4
"""How many documents ``make_operands`` packs into a request."""
PADDINGS = ("none", "some", "first", "all")
"""Which keys ``key_padding`` hides: there is none, about a third, the first half (queries there are blind), all."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of a form, by its sizes; ``make`` turns it into tensors."""

    form: str
    dtype: torch.dtype = torch.float32
    heads: tuple[int, int] = (4, 2)
    """Query heads, KV heads."""
    lengths: tuple[int, int] = (37, 37)
    """Queries, keys."""
    dims: tuple[int, int] = (16, 16)
    """Head dim of q and k, and of v."""
    padding: str = "none"
    q_start: bool = False
    """Whether a self-attention form gets ``q_start``: its queries sit anywhere, one request's before the first key."""
    layout: str = "contiguous"
    scale: float | None = None
    softcap: float = 0.0
    band: int = 5
    """The window, or the lookback."""
    batch: int = 2
    value_heads: int | None = None
    """Heads of v, where KV heads share them; None = as many as KV heads."""

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.").replace("float", "fp").replace("bfp", "bf")
        parts = [
            self.form,
            name,
            "h{}x{}".format(*self.heads),
            "s{}x{}".format(*self.lengths),
            "d{}x{}".format(*self.dims),
        ]
        parts += [] if self.value_heads is None else [f"v{self.value_heads}"]
        parts += [] if self.padding == "none" else [f"pad_{self.padding}"]
        parts += ["q_start"] * self.q_start + [] if self.layout == "contiguous" else [self.layout]
        parts += [] if self.scale is None else [f"scale{self.scale}"]
        parts += [f"cap{self.softcap:g}"] if self.softcap else []
        return "-".join(parts)


@dataclasses.dataclass
class Call:
    """Tensors of a call: ``q [B, Hq, Lq, D]``, ``k [B, Hkv, Lk, D]``, ``v [B, Hv, Lk, Dv]``, operands by name."""

    form: Form
    q: Tensor
    k: Tensor
    v: Tensor
    operands: dict[str, OperandValue]
    scale: float | None = None
    softcap: float = 0.0

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    @property
    def keywords(self) -> dict[str, Any]:
        """The op's keyword-only arguments."""
        return {"scale": self.scale, "softcap": self.softcap}

    def to(self, *where: Any) -> Call:
        """The same call with q, k and v in another dtype, or everything on another device."""
        moves = [w for w in where if not isinstance(w, torch.dtype)]
        operands = {n: t.to(*moves) if moves and isinstance(t, Tensor) else t for n, t in self.operands.items()}
        q, k, v = (t.to(*where) for t in self.qkv)
        return Call(self.form, q, k, v, operands, **self.keywords)


class Results(NamedTuple):
    """Everything a form computes. Gradients are None where there was no backward."""

    out: Tensor
    lse: Tensor
    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None


Grads = tuple[Tensor | None, Tensor | None] | None
"""Gradients that arrive at ``out`` and ``lse``; None for an output that nothing reads, or for no backward at all."""


# ---------------------------------------------------------------------- inputs


def make(case: Case, device: str = "cpu") -> Call:
    """Random tensors of ``case``, drawn on the CPU from torch's generator, so that every device gets the same."""
    form = FORMS[case.form]
    (query_heads, kv_heads), (query_len, key_len), (head_dim, value_dim) = case.heads, case.lengths, case.dims
    shapes = (
        (query_heads, query_len, head_dim),
        (kv_heads, key_len, head_dim),
        (kv_heads if case.value_heads is None else case.value_heads, key_len, value_dim),
    )
    q, k, v = (
        lay_out(torch.randn(case.batch, *shape, dtype=torch.float64).to(device, case.dtype), case.layout)
        for shape in shapes
    )
    operands = make_operands(form, case.batch, query_len, key_len, case.band, case.padding, case.q_start)
    operands = {n: t.to(device) if isinstance(t, Tensor) else t for n, t in operands.items()}
    return Call(form, q, k, v, operands, case.scale, case.softcap)


def make_operands(
    form: Form,
    batch: int,
    query_len: int,
    key_len: int,
    band: int = 5,
    padding: str = "none",
    q_start: bool = False,
) -> dict[str, OperandValue]:
    """Every operand of ``form``, absent ones as None, on the CPU.

    Segments rise by uneven steps from -2 (sees nothing) to past the last key; positions start before, inside and at
    the end of the keys; prefixes are as long as the band, empty, longer than the keys and half of them. Documents are
    a few, in order in every other request and mixed in the others; the first query's has no keys. Starts rise from
    before the first key to past the last.
    """
    operands: dict[str, OperandValue] = {"key_padding": make_padding(padding, batch, key_len)}
    for operand in form.mask.int_operands:
        operands[operand.name] = band
    if form.self_attention:
        starts = torch.tensor([max(key_len - query_len, 0), -2, key_len // 2, key_len + 3]).repeat(batch)[:batch]
        operands["q_start"] = starts.to(torch.int32) if q_start else None
    for operand in form.mask.request_operands:
        prefixes = torch.tensor([band, 0, key_len + 3, key_len // 2]).repeat(batch)[:batch]
        operands[operand.name] = prefixes.to(torch.int32)
    if "query_documents" in form.operand_names:
        documents = [torch.randint(DOCUMENTS, (batch, length)) for length in (query_len, key_len)]
        for ids in documents:
            ids[::2] = ids[::2].sort(1)[0]
        documents[0][:, :1] = DOCUMENTS if query_len > 2 else 0
        operands["query_documents"], operands["key_documents"] = documents
    if "query_starts" in form.operand_names:
        operands["query_starts"] = torch.randint(-2, key_len + 2, (batch, query_len)).sort(1)[0]
    if "query_segments" in form.operand_names:
        segments = torch.randint(-2, key_len + band + 2, (batch, query_len)).sort(1)[0]
        if query_len > 2:
            segments[:, 0], segments[:, -1] = -2, key_len + band + 1
        operands["query_segments"] = segments
    return {name: operands[name] for name in form.operand_names}


def make_padding(padding: str, batch: int, key_len: int) -> Tensor | None:
    """bool ``[B, Lk]``, True = hidden; see ``PADDINGS``."""
    if padding == "none":
        return None
    if padding == "some":
        return torch.rand(batch, key_len) < 0.3
    hidden = (key_len + 1) // 2 if padding == "first" else key_len
    return (torch.arange(key_len) < hidden).expand(batch, key_len).contiguous()


def lay_out(t: Tensor, layout: str) -> Tensor:
    """The values of ``t [B, H, S, D]`` (of its first request, for ``expanded``) in another memory layout."""
    if layout == "token_major":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":
        wide = t.new_full([s + 3 for s in t.shape], math.nan)
        inside = wide[tuple(slice(1, s + 1) for s in t.shape)]
        return inside.copy_(t)
    if layout == "expanded":
        return t[:1].expand_as(t)
    if layout == "head_dim_first":
        return t.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "strided_last":
        return t.new_full((*t.shape, 2), math.nan)[..., 0].copy_(t)
    return t


# ---------------------------------------------------------------------- results


def cotangents(call: Call) -> tuple[Tensor, Tensor]:
    """Random gradients for ``out`` and ``lse``, in those outputs' dtypes, rows that see nothing included."""
    shape = (*call.q.shape[:3], call.v.shape[3])
    grad_out = torch.randn(shape, dtype=torch.float64).to(call.q.device, call.q.dtype)
    return grad_out, torch.randn(shape[:3], dtype=torch.float64).to(call.q.device, accumulator(call.q.dtype))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and of lse."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def run(attend: Callable[..., tuple[Tensor, Tensor]], call: Call, grads: Grads = None) -> Results:
    """Results of ``attend(q, k, v, **operands, scale=, softcap=)``; where ``grads`` are given, gradients too."""
    leaves = [t.detach().requires_grad_(grads is not None) for t in call.qkv]
    out, lse = attend(*leaves, **call.operands, **call.keywords)
    if grads is None:
        return Results(out, lse)
    used = [(o, g.to(o.dtype)) for o, g in zip((out, lse), grads, strict=True) if g is not None]
    gradients = torch.autograd.grad([o for o, _ in used], leaves, [g for _, g in used], materialize_grads=True)
    return Results(out.detach(), lse.detach(), *gradients)


def on_cpu(grads: Grads) -> Grads:
    if grads is None:
        return None
    grad_out, grad_lse = (None if g is None else g.cpu() for g in grads)
    return grad_out, grad_lse


def oracle(call: Call, grads: Grads = None) -> Results:
    """Results in fp64, on the CPU: the forms refuse fp64 on CUDA."""
    exact = call.to("cpu", torch.float64)

    def attend(
        q: Tensor, k: Tensor, v: Tensor, scale: float | None, softcap: float, **operands: OperandValue
    ) -> tuple[Tensor, Tensor]:
        return reference_attention(q, k, v, call.form, operands, scale, torch.float64, softcap)

    return run(attend, exact, on_cpu(grads))


def low_precision(call: Call, grads: Grads = None) -> Results:
    """Results as arithmetic in the inputs' dtype gives them, on the CPU.

    What a matrix unit can do at best: products of the inputs summed in fp32, softmax in fp32, weights (and so their
    gradients) rounded to the inputs' dtype before they are multiplied again, results rounded to it. For fp32 and fp64
    nothing is rounded.
    """
    dtype, wide = call.q.dtype, accumulator(call.q.dtype)

    def attend(
        q: Tensor, k: Tensor, v: Tensor, scale: float | None, softcap: float, **operands: OperandValue
    ) -> tuple[Tensor, Tensor]:
        visible = dense_mask(call.form, q, k, operands)
        padding = operands.get("key_padding")
        if isinstance(padding, Tensor):
            k, v = (t.masked_fill(padding[:, None, :, None], 0) for t in (k, v))
        k, v = (t.to(wide).repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        scores = (q.to(wide) @ k.transpose(-1, -2)) * default_scale(q, scale)
        if softcap:
            scores = softcap * (scores / softcap).tanh()
        scores = scores.masked_fill(~visible, -math.inf)
        blind = ~visible.any(-1)
        lse = scores.masked_fill(blind[..., None], 0).logsumexp(-1)
        weights = (scores - lse[..., None]).exp().to(dtype)
        return (weights.to(wide) @ v).to(dtype), lse.masked_fill(blind, -math.inf)

    return run(attend, call.to("cpu"), on_cpu(grads))


def dense_mask(form: Form, q: Tensor, k: Tensor, operands: Mapping[str, OperandValue]) -> Tensor:
    """bool ``[B or 1, 1, Lq, Lk]`` of ``form``."""
    kept = {name: value for name, value in operands.items() if name != "q_start"}
    return form.mask.dense(query_positions(q, operands), torch.arange(k.shape[2], device=k.device), kept)[:, None]


# ---------------------------------------------------------------------- the derived tolerance


def floors(call: Call, exact: Results, grads: Grads = None) -> dict[str, float]:
    """What no error bound may undercut, by result.

    Half a unit in the last place of the largest result, since results are rounded to their dtype; and ``SUM_ERROR``
    units of the sums that make up a result, for where the reference's own error happens to be 0: where a query sees
    one key, its dq is a difference of equal sums, whose order differs between kernels. Sums are estimated from root
    mean squares.
    """
    dtype, padding = call.q.dtype, call.operands.get("key_padding")
    head_dim, value_dim, scale = call.q.shape[3], call.v.shape[3], default_scale(call.q, call.scale)
    q, k, v = root_mean_square(call.q), root_mean_square(call.k, padding), root_mean_square(call.v, padding)
    grad_out, grad_lse = grads or (None, None)
    g = 0.0 if grad_out is None else root_mean_square(grad_out)
    grad_score = scale * (
        g * v * math.sqrt(value_dim) + (0.0 if grad_lse is None else root_mean_square(grad_lse[..., None]))
    )
    sums = {
        "out": v,
        "lse": 1 + scale * q * k * math.sqrt(head_dim),
        "dq": grad_score * k,
        "dk": grad_score * q,
        "dv": g,
    }
    found = {name: SUM_ERROR * torch.finfo(accumulator(dtype)).eps * size for name, size in sums.items()}
    for name, t in exact._asdict().items():
        if t is not None and t.numel() and name != "lse":
            found[name] += torch.finfo(dtype).eps / 2 * float(t.abs().max())
    if call.q.device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
        found["lse"] += HALF_EXP_ERROR
    return found


SUM_ERROR = 16.0
"""Units in the last place by which two orders of one sum may differ: the root of its terms, at most 256 here."""
HALF_EXP_ERROR = 2.0**-13
"""torch's CPU flash kernel approximates exp for half dtypes on AVX-512: measured, lse is off by up to 7.2e-5."""


def root_mean_square(t: Tensor, padding: OperandValue = None) -> float:
    """Of the elements of ``t [B, H, S, D]``, padded rows left out."""
    squares = t.detach().cpu().double().square()
    if isinstance(padding, Tensor):
        squares = squares.movedim(1, 2)[~padding.cpu()]
    return float(squares.mean().sqrt()) if squares.numel() else 0.0


def largest_error(actual: Tensor, exact: Tensor) -> float:
    """The largest absolute difference; infinities must stand in the same places, NaN nowhere."""
    actual = actual.detach().cpu().double()
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert not actual.isnan().any(), "NaN"
    assert torch.equal(actual.isinf(), exact.isinf()), "infinite in the wrong places"
    errors = torch.where(actual == exact, 0, (actual - exact).abs())
    return float(errors.max()) if errors.numel() else 0.0


def tolerances(call: Call, exact: Results, grads: Grads = None) -> dict[str, float]:
    """The largest error against ``exact`` that each result may have: twice the reference's own, plus ``floors``.

    Gradients are made of weights recomputed from lse, so they inherit lse's tolerance as a relative one. fp64's own
    error is the fp32 reference's, in fp64's units.
    """
    if call.q.dtype == torch.float64:
        rounded = call.to(torch.float32)
        low, true = low_precision(rounded, grads), oracle(rounded, grads)
        unit = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    else:
        low, true, unit = low_precision(call, grads), exact, 1.0
    allowed = floors(call, exact, grads)
    for name, t in exact._asdict().items():
        if t is not None:
            allowed[name] += 2 * unit * largest_error(getattr(low, name), getattr(true, name))
            if name.startswith("d") and t.numel():
                allowed[name] += allowed["lse"] * float(t.abs().max())
    return allowed


def assert_as_exact_as_the_reference(actual: Results, call: Call, grads: Grads = None) -> None:
    """``actual`` is as close to fp64 as ``call``'s dtype allows; see ``tolerances``."""
    exact = oracle(call, grads)
    allowed = tolerances(call, exact, grads)
    for name, value in actual._asdict().items():
        if value is not None:
            error = largest_error(value, getattr(exact, name))
            assert error <= allowed[name], f"{name}: error {error:.3e} against fp64, allowed {allowed[name]:.3e}"


def assert_outputs_are_well_formed(out: Tensor, lse: Tensor, call: Call) -> None:
    """Shapes, dtypes and layout that every call promises: out token-major, lse contiguous and at least fp32."""
    batch, heads, query_len, _ = call.q.shape
    assert out.shape == (batch, heads, query_len, call.v.shape[3]) and out.dtype == call.q.dtype
    assert lse.shape == (batch, heads, query_len) and lse.dtype == accumulator(call.q.dtype)
    assert out.transpose(1, 2).is_contiguous() and lse.is_contiguous()


# ---------------------------------------------------------------------- combinations


def pairwise(factors: Mapping[str, Sequence[Hashable]]) -> list[dict[str, Any]]:
    """Few combinations in which every two values of different factors meet at least once. The same each time."""
    names = list(factors)
    rank = {(name, value): (i, j) for i, name in enumerate(names) for j, value in enumerate(factors[name])}
    uses = dict.fromkeys(rank, 0)
    open_pairs = {(s, t) for s, t in itertools.combinations(rank, 2) if s[0] != t[0]}

    def new_pairs(setting: tuple[str, Hashable], row: Mapping[str, Hashable]) -> int:
        return sum(
            (min(setting, s, key=rank.__getitem__), max(setting, s, key=rank.__getitem__)) in open_pairs
            for s in row.items()
        )

    rows: list[dict[str, Any]] = []
    while open_pairs:
        row = dict(min(open_pairs, key=lambda pair: (rank[pair[0]], rank[pair[1]])))
        for name in names:
            if name not in row:
                settings = [(name, value) for value in factors[name]]
                gains = [(new_pairs(setting, row), -uses[setting]) for setting in settings]
                row[name] = settings[gains.index(max(gains))][1]
        row = {name: row[name] for name in names}
        open_pairs -= set(itertools.combinations(row.items(), 2))
        for setting in row.items():
            uses[setting] += 1
        rows.append(row)
    return rows
