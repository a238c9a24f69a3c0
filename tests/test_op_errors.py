"""Bad calls: refused before any kernel runs, naming the operand, what was expected, what came and the remedy."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from custom_ops import cpu
from custom_ops.forms import FORMS
from custom_ops.reference import reference_attention
from tests.helpers import Case, make

SELF = tuple(name for name, form in FORMS.items() if form.self_attention)
META = torch.device("meta")
ALL_MESSAGES = r"lowered_attn::\w+: .+: expected .+, got .+; .+"


@dataclasses.dataclass(frozen=True)
class BadCall:
    """What is wrong with an otherwise good call, and the message after ``lowered_attn::<form>: ``."""

    changes: dict[str, Any]
    """By argument: a dtype or device to convert it to, the sizes of a new tensor, or any other value in its place."""
    message: str
    forms: tuple[str, ...] = tuple(FORMS)

    def arguments(self, name: str) -> dict[str, Any]:
        arguments = good_call(name)
        for argument, value in self.changes.items():
            if isinstance(value, (torch.dtype, torch.device)):
                value = arguments[argument].to(value)
            elif isinstance(value, tuple):
                value = arguments[argument].new_zeros(value)
            arguments[argument] = value
        return arguments


def good_call(name: str) -> dict[str, Any]:
    """B 2, Hq 4, Hkv 2, Lq and Lk 6, D 16, Dv 24, fp32, with every operand and a scale."""
    call = make(Case(name, lengths=(6, 6), dims=(16, 24), padding="some", q_start=True))
    return {"q": call.q, "k": call.k, "v": call.v, **call.operands, "scale": 0.5}


RANK = "expected 4 dimensions [B, H, S, D], got shape {}; add or fold dimensions"
BATCH = "batch size: expected the same for q, k and v, got {}; expand them: there is no broadcast"
DTYPES = "dtype: expected the same for q, k and v, got {}; cast q, k and v to one dtype, or use autocast"
DEVICES = "device: expected the same for q, k and v, got {}; move q, k and v to one device"
FLOATS = "q, k, v: expected float16, bfloat16, float32 (or float64 on a CPU), got {}; cast them"
HEADS = "q: expected a head count divisible by k's 2, got {}; each KV head serves Hq / Hkv query heads"
VALUE_HEADS = (
    "v: expected a head count that divides k's {}, got {}; "
    "each value head serves Hkv / Hv KV heads: pass one a KV head, or one that all share"
)
SHAPE = "expected shape {}, got {}; there is no broadcast: expand it"
MOVE = "expected device cpu, got meta; move it with .to('cpu')"
SCALE = "scale: expected a finite number, at least 0, got {}; negate q for a negative scale"

SOFTCAP = "softcap: expected a finite number, at least 0, got {}; 0 means no soft-cap"

BAD_CALLS = {
    "q-rank": BadCall({"q": (4, 6, 16)}, "q: " + RANK.format([4, 6, 16])),
    "k-rank": BadCall({"k": (2, 1, 2, 6, 16)}, "k: " + RANK.format([2, 1, 2, 6, 16])),
    "v-rank": BadCall({"v": (6,)}, "v: " + RANK.format([6])),
    "k-device": BadCall({"k": META}, DEVICES.format("q cpu, k meta, v cpu")),
    "q-device": BadCall({"q": META}, DEVICES.format("q meta, k cpu, v cpu")),
    "mixed-dtypes": BadCall({"v": torch.bfloat16}, DTYPES.format("q torch.float32, k torch.float32, v torch.bfloat16")),
    "fp64-and-fp32": BadCall({"q": torch.float64}, DTYPES.format("q torch.float64, k torch.float32, v torch.float32")),
    "int": BadCall(dict.fromkeys("qkv", torch.int32), FLOATS.format("torch.int32")),
    "bool": BadCall(dict.fromkeys("qkv", torch.bool), FLOATS.format("torch.bool")),
    "complex": BadCall(dict.fromkeys("qkv", torch.complex64), FLOATS.format("torch.complex64")),
    "fp8": BadCall(dict.fromkeys("qkv", torch.float8_e4m3fn), FLOATS.format("torch.float8_e4m3fn")),
    "k-v-batch": BadCall({"k": (3, 2, 6, 16), "v": (3, 2, 6, 24)}, BATCH.format("2, 3, 3")),
    "broadcast-batch": BadCall({"k": (1, 2, 6, 16), "v": (1, 2, 6, 24)}, BATCH.format("2, 1, 1")),
    "v-batch": BadCall({"v": (1, 2, 6, 24)}, BATCH.format("2, 2, 1")),
    "more-v-heads-than-k": BadCall({"v": (2, 4, 6, 24)}, VALUE_HEADS.format(2, 4)),
    "v-heads": BadCall({"k": (2, 4, 6, 16), "v": (2, 3, 6, 24)}, VALUE_HEADS.format(4, 3)),
    "no-v-heads": BadCall({"v": (2, 0, 6, 24)}, VALUE_HEADS.format(2, 0)),
    "v-length": BadCall({"v": (2, 2, 5, 24)}, "v: expected the length of k, 6, got 5; pass one value a key"),
    "shared-v-length": BadCall({"v": (2, 1, 7, 24)}, "v: expected the length of k, 6, got 7; pass one value a key"),
    "q-heads": BadCall({"q": (2, 3, 6, 16)}, HEADS.format(3)),
    "fewer-q-heads-than-k": BadCall({"q": (2, 1, 6, 16)}, HEADS.format(1)),
    "no-k-heads": BadCall(
        {"k": (2, 0, 6, 16), "v": (2, 0, 6, 24)},
        "k: expected at least 1 head, got 0; pass at least one KV head",
    ),
    "head-dims-differ": BadCall(
        {"k": (2, 2, 6, 8)}, "k: expected head dim of q, 16, got 8; project q and k to one head dim"
    ),
    "wide-heads": BadCall(
        {"q": (2, 4, 6, 257), "k": (2, 2, 6, 257)},
        "head dim of q and k: expected 1 to 256, got 257; split or pad the heads",
    ),
    "wide-values": BadCall({"v": (2, 2, 6, 513)}, "head dim of v: expected 1 to 512, got 513; split or pad the heads"),
    "no-values": BadCall({"v": (2, 1, 6, 0)}, "head dim of v: expected 1 to 512, got 0; split or pad the heads"),
    "no-head-dim": BadCall(
        {"q": (2, 4, 6, 0), "k": (2, 2, 6, 0)},
        "head dim of q and k: expected 1 to 256, got 0; split or pad the heads",
    ),
    "negative-scale": BadCall({"scale": -0.5}, SCALE.format(-0.5)),
    "nan-scale": BadCall({"scale": math.nan}, SCALE.format("nan")),
    "infinite-scale": BadCall({"scale": math.inf}, SCALE.format("inf")),
    "negative-softcap": BadCall({"softcap": -50.0}, SOFTCAP.format(-50.0)),
    "nan-softcap": BadCall({"softcap": math.nan}, SOFTCAP.format("nan")),
    "infinite-softcap": BadCall({"softcap": math.inf}, SOFTCAP.format("inf")),
    "padding-dtype": BadCall(
        {"key_padding": torch.int32},
        "key_padding: expected dtype bool, got int32; cast it with .to(torch.bool)",
    ),
    "padding-float": BadCall(
        {"key_padding": torch.float32},
        "key_padding: expected dtype bool, got float32; cast it with .to(torch.bool)",
    ),
    "padding-one-row": BadCall({"key_padding": (6,)}, "key_padding: " + SHAPE.format([2, 6], [6])),
    "padding-broadcast": BadCall({"key_padding": (1, 6)}, "key_padding: " + SHAPE.format([2, 6], [1, 6])),
    "padding-length": BadCall({"key_padding": (2, 7)}, "key_padding: " + SHAPE.format([2, 6], [2, 7])),
    "padding-4d": BadCall({"key_padding": (2, 1, 1, 6)}, "key_padding: " + SHAPE.format([2, 6], [2, 1, 1, 6])),
    "padding-device": BadCall({"key_padding": META}, "key_padding: " + MOVE),
    "start-int64": BadCall(
        {"q_start": torch.int64},
        "q_start: expected dtype int32, got int64; cast it with .to(torch.int32)",
        SELF,
    ),
    "start-float": BadCall(
        {"q_start": torch.float32},
        "q_start: expected dtype int32, got float32; cast it with .to(torch.int32)",
        SELF,
    ),
    "start-scalar": BadCall({"q_start": ()}, "q_start: " + SHAPE.format([2], []), SELF),
    "start-batch": BadCall({"q_start": (3,)}, "q_start: " + SHAPE.format([2], [3]), SELF),
    "start-2d": BadCall({"q_start": (2, 1)}, "q_start: " + SHAPE.format([2], [2, 1]), SELF),
    "start-device": BadCall({"q_start": META}, "q_start: " + MOVE, SELF),
    "lengths-differ": BadCall(
        {"q": (2, 4, 5, 16), "q_start": None},
        "q: expected as many queries as keys (6) when q_start is None, got 5; "
        "pass q_start, the position of each request's first query among the keys",
        # Where an operand has a value a query, its own length is wrong first.
        tuple(name for name in SELF if FORMS[name].mask.operand("query") is None),
    ),
    "no-window": BadCall(
        {"window": 0},
        "window: expected at least 1, got 0; window counts keys: pass a larger number",
        ("sliding_self",),
    ),
    "negative-window": BadCall(
        {"window": -4},
        "window: expected at least 1, got -4; window counts keys: pass a larger number",
        ("sliding_self",),
    ),
    "negative-lookback": BadCall(
        {"lookback": -1},
        "lookback: expected at least 0, got -1; lookback counts keys: pass a larger number",
        ("segment_cross",),
    ),
    "segments-float": BadCall(
        {"query_segments": torch.float32},
        "query_segments: expected dtype int32 or int64, got float32; cast it with .to(torch.int32)",
        ("segment_cross",),
    ),
    "segments-int16": BadCall(
        {"query_segments": torch.int16},
        "query_segments: expected dtype int32 or int64, got int16; cast it with .to(torch.int32)",
        ("segment_cross",),
    ),
    "segments-one-row": BadCall(
        {"query_segments": (6,)}, "query_segments: " + SHAPE.format([2, 6], [6]), ("segment_cross",)
    ),
    "segments-length": BadCall(
        {"query_segments": (2, 5)}, "query_segments: " + SHAPE.format([2, 6], [2, 5]), ("segment_cross",)
    ),
    "segments-device": BadCall({"query_segments": META}, "query_segments: " + MOVE, ("segment_cross",)),
}
on_bad_calls = pytest.mark.parametrize(
    "name, bad",
    [pytest.param(name, bad, id=f"{name}-{id}") for id, bad in BAD_CALLS.items() for name in bad.forms],
)


@pytest.fixture
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that runs is a failure of its own."""

    def ran(*_: object) -> None:
        raise AssertionError("a kernel ran")

    monkeypatch.setattr(cpu, "forward", ran)


@pytest.mark.parametrize("name", FORMS)
def test_the_good_call_is_good(name: str) -> None:
    arguments = good_call(name)
    assert FORMS[name].op(**arguments)[0].shape == (2, 4, 6, 24)
    del arguments["scale"]
    for changes in ({}, {"key_padding": None}):
        FORMS[name].op(**{**arguments, **changes})


@on_bad_calls
@pytest.mark.usefixtures("no_kernel")
def test_eager_calls_are_refused(name: str, bad: BadCall) -> None:
    with pytest.raises(ValueError, match=ALL_MESSAGES) as error:
        FORMS[name].op(**bad.arguments(name))
    assert str(error.value) == f"lowered_attn::{name}: {bad.message}"


@on_bad_calls
@pytest.mark.usefixtures("no_kernel")
def test_the_reference_refuses_the_same(name: str, bad: BadCall) -> None:
    arguments = bad.arguments(name)
    q, k, v, scale = (arguments.pop(n) for n in ("q", "k", "v", "scale"))
    softcap = arguments.pop("softcap", 0.0)
    with pytest.raises(ValueError) as error:
        reference_attention(q, k, v, FORMS[name], arguments, scale, softcap=softcap)
    assert str(error.value) == f"lowered_attn::{name}: {bad.message}"


@on_bad_calls
@pytest.mark.usefixtures("no_kernel")
def test_compiled_calls_are_refused_while_tracing(name: str, bad: BadCall) -> None:
    torch._dynamo.reset()
    arguments = bad.arguments(name)
    tensors = {n: t for n, t in arguments.items() if isinstance(t, Tensor)}
    rest = {n: value for n, value in arguments.items() if n not in tensors}

    @torch.compile(backend="lowered_attn", fullgraph=True)
    def attend(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return FORMS[name].op(**tensors, **rest)

    # Dynamo may wrap the error in one of its own.
    with pytest.raises(Exception) as error:
        attend(tensors)
    assert f"lowered_attn::{name}: {bad.message}" in str(error.value)


@pytest.mark.parametrize("value, message", [(None, "None"), (2.5, "float"), ("5", "str")], ids=str)
def test_what_the_schema_refuses_is_refused_by_torch(value: Any, message: str) -> None:
    q, k, v = (good_call("sliding_self")[n] for n in "qkv")
    with pytest.raises((RuntimeError, TypeError), match="window|" + message):
        torch.ops.lowered_attn.sliding_self(q, k, v, value)


@pytest.mark.gpu
def test_fp64_is_refused_on_cuda() -> None:
    q = torch.randn(1, 2, 8, 16, dtype=torch.float64, device="cuda")
    with pytest.raises(
        ValueError, match="q, k, v: expected float16, bfloat16 or float32 on CUDA, got float64; cast them"
    ):
        torch.ops.lowered_attn.full_self(q, q, q)


@pytest.mark.gpu
def test_operands_on_another_device_are_refused_on_cuda() -> None:
    q = torch.randn(1, 2, 8, 16, device="cuda")
    with pytest.raises(
        ValueError, match=r"key_padding: expected device cuda:0, got cpu; move it with \.to\('cuda:0'\)"
    ):
        torch.ops.lowered_attn.full_self(q, q, q, torch.zeros(1, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="device: expected the same for q, k and v, got q cuda:0, k cpu, v cpu"):
        torch.ops.lowered_attn.full_self(q, q.cpu(), q.cpu())
