"""Epilogues: their text, the op that takes them, on a CPU, and what it refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from custom_ops import epilogue_op
from custom_ops.epilogue import CASTS, OPERATIONS, apply, number, parse
from custom_ops.form import default_scale
from tests.epilogue_cases import CASES, exact, extra_of, rounding
from tests.helpers import Call, Case, largest_error, low_precision, make, oracle

OP = torch.ops.lowered_attn.attention_with_epilogue
BASE = Case("full_self", torch.bfloat16, heads=(4, 2), lengths=(37, 37), dims=(16, 16))
CALLS = (
    BASE,
    dataclasses.replace(BASE, form="sliding_self", dims=(24, 16), padding="some", softcap=5.0),
    dataclasses.replace(BASE, form="segment_cross", lengths=(20, 37), layout="token_major"),
)


def arguments(call: Call, text: str, extra: Tensor | None) -> tuple[Any, ...]:
    slots = call.form.slots(call.operands)
    scale = default_scale(call.q, call.scale)
    return (*call.qkv, *slots[:-1], call.form.name, list(slots.ints), scale, call.softcap, text, extra)


def sizes_of(call: Call) -> tuple[int, int, int, int]:
    batch, heads, length, _ = call.q.shape
    return batch, heads, length, call.v.shape[3]


# ---------------------------------------------------------------------- text


@pytest.mark.parametrize("name", CASES)
def test_an_epilogue_has_one_text(name: str) -> None:
    epilogue = parse(CASES[name])
    assert str(epilogue) == CASES[name] and parse(str(epilogue)) is epilogue
    assert epilogue.reads_extra == (name != "no further tensor")


def test_every_operation_is_in_a_case() -> None:
    assert {s.operation for text in CASES.values() for s in parse(text).statements} == OPERATIONS.keys()
    assert set(CASTS.values()) == {torch.float32, torch.bfloat16, torch.float16}


@pytest.mark.parametrize(
    "text, reason",
    (
        ("v0 = tanh(x); v1 = bfloat16(v0)", "epilogue: expected one of add, sub, mul, div, .*, got operation 'tanh'"),
        ("v1 = bfloat16(x)", "epilogue: expected a statement 'v0 = operation"),
        ("v0 = bfloat16(x);v1 = bfloat16(v0)", "epilogue: expected a statement 'v0 = operation"),
        ("v0 = add(x); v1 = bfloat16(v0)", "epilogue: expected 2 operands of add"),
        ("v0 = neg(x, y); v1 = bfloat16(v0)", "epilogue: expected 1 operands of neg"),
        ("v0 = neg(v0); v1 = bfloat16(v0)", "epilogue: expected x, y, an earlier v<number> or a .*, got 'v0'"),
        ("v0 = add(x, z); v1 = bfloat16(v0)", "got 'z'"),
        ("v0 = add(x, 1); v1 = bfloat16(v0)", "got '1'"),
        ("v0 = add(x, inf); v1 = bfloat16(v0)", "got 'inf'"),
        ("v0 = add(1.0, x); v1 = bfloat16(v0)", "epilogue: expected a number as the second operand, or as the first"),
        ("v0 = sub(1.0, 2.0); v1 = bfloat16(v0)", "where the second is none"),
        ("v0 = mul(x, 2.0)", "epilogue: expected a cast to one of .* at the end"),
        ("v0 = float32(x)", "epilogue: expected a cast to one of .*bfloat16, torch.float16.* at the end"),
        ("v0 = bfloat16(y)", "epilogue: expected a statement that reads x"),
        ("", "epilogue: expected a statement 'v0 = operation"),
    ),
)
def test_what_is_no_epilogue_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse(text)


@pytest.mark.parametrize("value, text", ((1, "1.0"), (-448, "-448.0"), (1e-20, "1e-20"), (0.1, "0.1"), (1e30, "1e+30")))
def test_numbers_have_one_spelling(value: float, text: str) -> None:
    assert number(value) == text
    assert parse(f"v0 = mul(x, {text}); v1 = bfloat16(v0)").statements[0].operands[1] == text


@pytest.mark.parametrize("value", (float("inf"), float("nan")))
def test_numbers_are_finite(value: float) -> None:
    with pytest.raises(ValueError, match="epilogue: expected a finite number"):
        number(value)


def test_casts_round_and_nothing_else_does() -> None:
    x = torch.tensor([1.0, 1.0 + 2.0**-12, 300.0, -2.5])
    assert torch.equal(apply(parse("v0 = float16(x); v1 = bfloat16(v0)"), x, None), x.half().bfloat16())
    assert torch.equal(apply(parse("v0 = mul(x, 1.5); v1 = bfloat16(v0)"), x, None), (x * 1.5).bfloat16())
    assert apply(parse("v0 = neg(x); v1 = float16(v0)"), x.bfloat16(), None).dtype == torch.float16


# ---------------------------------------------------------------------- the op


@pytest.mark.parametrize("shape", CALLS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_results_are_as_exact_as_the_reference(name: str, shape: Case) -> None:
    torch.manual_seed(3)
    call, text = make(shape), CASES[name]
    extra = extra_of(text, sizes_of(call), torch.bfloat16, "cpu")
    result = OP(*arguments(call, text, extra))
    assert result.shape == sizes_of(call) and result.dtype == torch.bfloat16
    assert result.transpose(1, 2).is_contiguous()
    expected, low = exact(text, oracle(call).out, extra), exact(text, low_precision(call).out.double(), extra)
    assert largest_error(result, expected) <= 2 * largest_error(low, expected) + rounding(result, expected)


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str) -> None:
    torch.manual_seed(3)
    call = make(BASE)
    extra = extra_of(CASES[name], sizes_of(call), torch.bfloat16, "cpu")
    found = torch.library.opcheck(OP.default, arguments(call, CASES[name], extra))
    assert set(found.values()) == {"SUCCESS"}


def test_no_queries_and_no_keys() -> None:
    for lengths in ((0, 5), (5, 0)):
        call = make(dataclasses.replace(BASE, lengths=lengths))
        extra = extra_of(CASES["gate"], sizes_of(call), torch.bfloat16, "cpu")
        result = OP(*arguments(call, CASES["gate"], extra))
        assert result.shape == sizes_of(call) and not result.any()


@pytest.mark.parametrize(
    "change, reason",
    (
        (lambda extra: None, r"extra: expected a tensor, as v0 = .* reads it, got none"),
        (lambda extra: extra.float(), r"extra: expected .* of torch.bfloat16 on cpu, .*, got .* of torch.float32"),
        (lambda extra: extra[0], r"extra: expected \[B, Hq, Lq, Dv\] \[2, 4, 37, 16\] of .*, got \[4, 37, 16\]"),
        (lambda extra: extra[:, :2], r"extra: .*, got \[2, 2, 37, 16\]"),
        (lambda extra: extra.to("meta"), r"extra: expected .* on cpu, .* on meta"),
    ),
)
def test_what_it_reads_is_checked(change: Any, reason: str) -> None:
    call = make(BASE)
    extra = change(extra_of(CASES["gate"], sizes_of(call), torch.bfloat16, "cpu"))
    with pytest.raises(ValueError, match=reason):
        epilogue_op.check_epilogue(parse(CASES["gate"]), call.q, call.v, extra)
    if extra is None or not extra.is_meta:
        with pytest.raises(ValueError, match=reason):
            OP(*arguments(call, CASES["gate"], extra))


def test_results_have_the_dtype_of_q_and_nothing_is_given_that_is_not_read() -> None:
    call = make(BASE)
    with pytest.raises(ValueError, match="epilogue: expected a cast to q's dtype torch.bfloat16 at the end"):
        OP(*arguments(call, "v0 = neg(x); v1 = float16(v0)", None))
    with pytest.raises(ValueError, match="extra: expected none, as v0 = .* reads it, got a tensor"):
        OP(*arguments(call, "v0 = neg(x); v1 = bfloat16(v0)", torch.zeros(sizes_of(call), dtype=torch.bfloat16)))


def test_no_gradient_passes() -> None:
    call = make(BASE)
    call.q.requires_grad_()
    extra = extra_of(CASES["gate"], sizes_of(call), torch.bfloat16, "cpu")
    result = OP(*arguments(call, CASES["gate"], extra))
    with pytest.raises(RuntimeError, match="attention_with_epilogue: expected no gradient through this op"):
        result.float().sum().backward()


def test_its_flops_are_attentions() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    call = make(BASE)
    extra = extra_of(CASES["gate"], sizes_of(call), torch.bfloat16, "cpu")
    counts = []
    for run in (
        lambda: call.form.op(*call.qkv, **call.operands),
        lambda: OP(*arguments(call, CASES["gate"], extra)),
    ):
        with FlopCounterMode(display=False) as counter:
            run()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
