"""The measurement of whole Transformers models: what is compared, what is timed, and what is reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tools import report_models

ROW = {"status": "ok", "reason": "", "ms": 2.0, "rounds_ms": [2.0], "tokens_per_s": 8000}


def document(**changes: Any) -> dict[str, Any]:
    """Results of one case."""
    rows = [
        {**ROW, "variant": "ours", "ratios": {"sdpa": 1.5, "flex": 1.25}},
        {**ROW, "variant": "sdpa", "ratios": {"flex": 0.8}},
        {"variant": "flex", "status": "wrong", "reason": "error 1"},
    ]
    host = {"transformers": "5.17.0", "gpu": "a GPU", "torch": "2.11", "date": "today"}
    host |= {"git_commit": "0" * 40, "command": "c"}
    case = {"name": "decode", "requests": 64, "tokens": 4096, "rows": rows}
    return {"host": host, "layers": 8, "dtype": "torch.bfloat16", "rounds": 5, "cases": [case], **changes}


def test_the_report_says_what_the_data_says() -> None:
    text = report_models.block(document(), None)
    assert "| decode, static cache, CUDA graph: 64 x 4,096 | 8.0 (1.50x, 1.25x) | 8.0 | WRONG |\n" in text
    assert "Medians of 5 interleaved rounds. a GPU, torch 2.11" in text and "stopped" not in text


def test_the_report_says_that_a_run_was_stopped() -> None:
    assert "\nThe run was stopped before its last case.\n" in report_models.block(document(complete=False), None)
    assert "stopped" not in report_models.block(document(complete=True), None)


def test_a_tiny_model_is_measured_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="the extra 'transformers' is not installed")
    from tools import whole_models

    output = tmp_path / "models.json"
    command = ["--device", "cpu", "--size", "tiny", "--layers", "1", "--rounds", "2", "--repeats", "2"]
    chosen = ["--cases", "prefill-causal,decode", "--variants", "ours,sdpa", "--output", str(output)]
    assert whole_models.main([*command, *chosen]) == 0, capsys.readouterr().out
    written = json.loads(output.read_text())
    assert written["complete"] is True
    cases = {case["name"]: case for case in written["cases"]}
    assert list(cases) == ["prefill-causal", "decode"]
    for case in cases.values():
        ours, sdpa = case["rows"]
        assert ours["variant"] == "ours" and ours["kernels"] and sdpa["kernels"] is None
        assert 0 < ours["error"] <= 2 * case["eager_error"]
        assert len(ours["rounds_ms"]) == 2 and ours["ratios"]["sdpa"] == pytest.approx(sdpa["ms"] / ours["ms"])


def test_a_wrong_variant_has_no_time(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="the extra 'transformers' is not installed")
    from tools import whole_models

    monkeypatch.setattr(whole_models, "ALLOWED", 0.0)
    command = ["--device", "cpu", "--size", "tiny", "--layers", "1", "--rounds", "1", "--repeats", "1"]
    assert whole_models.main([*command, "--cases", "prefill-causal", "--variants", "ours"]) == 1
    printed = capsys.readouterr().out
    assert "ours        WRONG: error" in printed and "tokens/s" not in printed


class Stopped(Exception):
    pass


def test_a_run_that_is_stopped_keeps_the_cases_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="the extra 'transformers' is not installed")
    from tools import whole_models

    output = tmp_path / "new" / "models.json"
    measured: list[str] = []

    def measure(whole: Any, case: str, *rest: Any) -> dict[str, Any]:
        if len(measured) == 2:
            raise Stopped
        measured.append(case)
        return {**document()["cases"][0], "name": case, "eager_error": 0.0, "rows": []}

    monkeypatch.setattr(whole_models, "measure", measure)
    command = ["--device", "cpu", "--size", "tiny", "--layers", "1", "--output", str(output)]
    with pytest.raises(Stopped):
        whole_models.main(command)
    written = json.loads(output.read_text())
    assert [case["name"] for case in written["cases"]] == measured == ["prefill", "prefill-causal"]
    assert written["complete"] is False
    measured.clear()
    assert whole_models.main([*command, "--cases", "decode"]) == 0
    written = json.loads(output.read_text())
    assert [case["name"] for case in written["cases"]] == ["decode"] and written["complete"], "replaced, not added to"


def test_logits_that_are_not_finite_are_written_as_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="the extra 'transformers' is not installed")
    from tools import whole_models

    run = whole_models.Run(lambda: torch.full((2, 256), torch.nan), lambda: None)
    monkeypatch.setattr(whole_models.WholeModel, "runner", lambda self, case, variant: run)
    output = tmp_path / "models.json"
    command = ["--device", "cpu", "--size", "tiny", "--layers", "1", "--rounds", "1", "--repeats", "1"]
    command += ["--cases", "prefill", "--variants", "ours", "--output", str(output)]
    assert whole_models.main(command) == 1
    (row,) = json.loads(output.read_text())["cases"][0]["rows"]
    assert (row["status"], row["error"]) == ("wrong", None)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cases", "training"], "training: expected some of prefill, prefill-causal, decode"),
        (["--variants", "theirs"], "theirs: expected some of ours, recognised"),
        (["--repeats", "0"], "--repeats: expected 1 to 100, got 0"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="the extra 'transformers' is not installed")
    from tools import whole_models

    with pytest.raises(SystemExit):
        whole_models.main(["--device", "cpu", "--size", "tiny", *arguments])
    assert said in capsys.readouterr().err
