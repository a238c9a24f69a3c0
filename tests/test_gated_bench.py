"""Gated cases of the benchmark: checked against the exact gate, with who has a kernel for it, on a CPU."""

from __future__ import annotations

import dataclasses
from unittest import mock

import torch

from tools import bench, gated
from tools.cases import CASES, Case
from tools.run_case import Settings
from tools.variants import Prepared

SMALL = dataclasses.replace(
    CASES["causal_prefill"], batch=1, query_heads=4, kv_heads=2, query_len=64, key_len=64, head_dim=32, value_dim=32,
    dtype=torch.float32,
)  # fmt: skip


def measured(case: Case, *names: str) -> dict:
    def half_a_ms(run: object) -> float:
        return 0.5

    return gated.run_case(
        case, names, Settings(rounds=1), half_a_ms, torch.device("cpu"), lambda text: None, None, None
    )


def test_results_are_gated_and_the_gate_is_bytes_too() -> None:
    result = measured(SMALL, "ours", "ours-apart", "flex")
    assert [row["status"] for row in result["rows"]] == ["ok"] * 3
    assert result["title"].endswith(", gated") and result["flops"] == SMALL.flops
    assert result["bytes"] == SMALL.bytes + 64 * 4 * 32 * 4


def test_a_result_without_its_gate_is_wrong() -> None:
    ungated = dataclasses.replace(gated.VARIANTS["ours"], prepare=lambda problem: Prepared(
        lambda: gated.DENSE_VARIANTS["ours-eager"].prepare(problem).run()[0], lambda out: (out,)
    ))  # fmt: skip
    with mock.patch.dict(gated.VARIANTS, {"ours": ungated}):
        (row,) = measured(SMALL, "ours")["rows"]
    assert row["status"] == "wrong" and row["ms"] is None


def test_the_command_knows_them() -> None:
    suite, cases = bench.choose_cases("gate")
    assert suite is bench.SUITES[2] and cases == list(gated.CASES.values())
    assert all(case.name == name and case.design_row is None for name, case in gated.CASES.items())
