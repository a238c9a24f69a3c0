"""The list of named cases: what its numbers mean, and that its calls are valid."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from custom_ops.forms import FORMS
from tools.cases import CASES, Case


def small(case: Case) -> Case:
    """The same call with short sequences and few heads."""
    factor = max(case.query_len // 64, 1)
    return dataclasses.replace(
        case,
        batch=2,
        query_heads=2 * case.query_heads // case.kv_heads,
        kv_heads=2,
        query_len=case.query_len // factor,
        key_len=case.key_len // factor,
        window=case.window and max(case.window // factor, 1),
    )


@pytest.mark.parametrize("name", CASES)
def test_a_case_calls_its_op(name: str) -> None:
    case = dataclasses.replace(small(CASES[name]), dtype=torch.float32)
    inputs = case.inputs("cpu", requires_grad=case.backward)
    assert inputs.query.requires_grad == inputs.key.requires_grad == inputs.value.requires_grad == case.backward
    out, lse = case.form.op(**inputs.arguments, scale=case.scale)
    assert out.shape == (case.batch, case.query_heads, case.query_len, case.value_dim)
    assert lse.shape == out.shape[:3] and out.isfinite().all()


@pytest.mark.parametrize("name", CASES)
def test_visible_pairs_are_those_of_the_mask(name: str) -> None:
    case = small(CASES[name])
    operands = case.inputs("cpu").operands
    mask = FORMS[case.form_name].mask.specialise(list(operands))
    queries = torch.arange(case.query_len)[None]
    visible = mask.dense(queries, torch.arange(case.key_len), operands)
    assert case.visible_pairs == visible[0].sum()


def test_flops_and_bytes_of_known_cases() -> None:
    case = CASES["causal_b4_s4096_d128"]
    assert case.flops == 2 * (4096 * 4097 // 2) * 256 * 32 * 4
    assert case.bytes == 2 * 4 * (32 * 4096 * 256 + 8 * 4096 * 256)
    train = CASES["train_causal_b4_s4096_d128"]
    assert train.flops == 3.5 * case.flops and train.bytes == 3 * case.bytes
    cross = CASES["segment_cross_b8_q8192_k1024_d64"]
    # Eight queries a segment; a segment sees itself and four earlier ones, the first four see fewer.
    assert cross.visible_pairs == 8 * (1024 * 5 - (4 + 3 + 2 + 1))


def test_inputs_depend_on_the_seed_alone() -> None:
    case = small(CASES["sliding_prefill"])
    first, again, other = case.inputs("cpu", seed=3), case.inputs("cpu", seed=3), case.inputs("cpu", seed=4)
    torch.testing.assert_close(first.query, again.query, rtol=0, atol=0)
    assert not torch.equal(first.query, other.query)
    assert first.query.transpose(1, 2).is_contiguous()


def test_the_table_of_the_design_is_covered() -> None:
    rows = [case.design_row for case in CASES.values() if case.design_row]
    assert len(rows) == len(set(rows)) == 8
    assert [name for name, case in CASES.items() if case.name != name] == []
