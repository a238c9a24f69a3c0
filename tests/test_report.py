"""Benchmark tools without a GPU:

errors find wrong results, rounds interleave, and the report shows what the data says.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from custom_ops.forms import FORMS
from custom_ops.reference import reference_attention
from tools import bench, measure, report, report_step, run_case
from tools.variants import Prepared, Problem, Unavailable, Variant

ROOT = Path(__file__).resolve().parent.parent


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize("name", ["full_self", "sliding_self", "segment_cross"])
@pytest.mark.parametrize("shifted", [False, True])
def test_exact_attention_in_pieces_equals_the_reference_in_one(name: str, shifted: bool) -> None:
    form = FORMS[name]
    if shifted and not form.self_attention:
        pytest.skip("only self-attention forms take q_start")
    problem = _problem(name, dtype=torch.float32, requires_grad=True, shifted=shifted)
    assert problem.grad_out is not None
    pieces = measure.exact_attention(
        form,
        problem.query,
        problem.key,
        problem.value,
        problem.operands,
        None,
        problem.grad_out,
        max_scores=700,
    )
    whole, _ = reference_attention(problem.query, problem.key, problem.value, form, problem.operands)
    gradients = torch.autograd.grad(whole, (problem.query, problem.key, problem.value), problem.grad_out)
    for got, expected in zip(pieces.named.values(), (whole.detach(), *gradients), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_rounding_to_bf16_passes() -> None:
    exact = measure.Exact(torch.randn(2, 4, 256, 64))
    errors, wrong = measure.compare((exact.out.bfloat16(),), exact, torch.bfloat16)
    assert not wrong
    assert 1e-4 < errors["out"].relative < 4e-3


@pytest.mark.parametrize("damage", ["nan", "one zero row", "one tile from elsewhere", "scaled by 1.02", "other shape"])
def test_a_damaged_result_is_found(damage: str) -> None:
    exact = measure.Exact(torch.randn(1, 8, 4096, 64))
    got = exact.out.clone()
    if damage == "nan":
        got[0, 3, 77, 5] = math.nan
    elif damage == "one zero row":  # moves the norm over all rows by less than the tolerance
        got[0, 3, 77] = 0
    elif damage == "one tile from elsewhere":
        got[0, 3, :64] = got[0, 4, :64]
    elif damage == "scaled by 1.02":
        got *= 1.02
    else:
        got = got.transpose(1, 2)
    _, wrong = measure.compare((got,), exact, torch.bfloat16)
    assert len(wrong) == 1 and wrong[0].startswith("out")


def test_hidden_rows_have_to_be_zero() -> None:
    zeros = torch.zeros(1, 1, 8, 4)
    assert measure.errors_of(zeros, zeros) == measure.Errors(0.0, 0.0)
    assert measure.errors_of(zeros + 1e-3, zeros).relative == math.inf
    half = torch.randn(1, 1, 8, 4)
    half[:, :, :4] = 0
    assert not measure.errors_of(half + 0.5, half).within(measure.tolerance("out", torch.bfloat16))


def test_an_unknown_dtype_has_no_tolerance() -> None:
    with pytest.raises(ValueError, match=r"dtype: expected one of .*bfloat16.*, got torch.float8_e4m3fn"):
        measure.tolerance("out", torch.float8_e4m3fn)


def test_worse_keeps_nan() -> None:
    kept = measure.Errors(1.0, math.nan).worse(measure.Errors(0.5, 3.0))
    assert kept.relative == 1.0 and math.isnan(kept.worst_row)
    assert math.isnan(measure.Errors(0.5, 3.0).worse(measure.Errors(1.0, math.nan)).worst_row)


# ---------------------------------------------------------------------- rounds


def test_rounds_interleave_and_a_broken_call_is_left_out() -> None:
    order: list[str] = []

    def call(name: str) -> Any:
        def run() -> None:
            order.append(name)
            if name == "b" and order.count("b") == 2:
                raise RuntimeError("broke in round 2")

        return run

    def timer(run: Any) -> float:
        run()
        return float(len(order))

    times, broken = measure.interleaved({name: call(name) for name in "abc"}, timer, rounds=3)
    assert "".join(order) == "abcabcac"
    assert set(times) == {"a", "c"} and str(broken["b"]) == "broke in round 2"
    assert times["a"].rounds_ms == (1.0, 4.0, 7.0)
    assert times["a"].ms == 4.0 and times["a"].spread == 1.5


# ---------------------------------------------------------------------- one case, on a CPU


def _problem(name: str, dtype: torch.dtype, requires_grad: bool = False, shifted: bool = False) -> Problem:
    batch, query_heads, kv_heads, query_len, dim = 2, 4, 2, 40, 16
    key_len = 12 if name == "segment_cross" else 55 if shifted else query_len

    def draw(heads: int, length: int) -> Tensor:
        return torch.randn(batch, heads, length, dim, dtype=dtype).requires_grad_(requires_grad)

    operands: dict[str, Any] = {"window": 7} if name == "sliding_self" else {}
    if name == "segment_cross":
        operands = {
            "query_segments": torch.arange(query_len).div(5, rounding_mode="floor").repeat(batch, 1),
            "lookback": 2,
        }
    if shifted:
        operands["q_start"] = torch.tensor([15, 3], dtype=torch.int32)
    query, key, value = draw(query_heads, query_len), draw(kv_heads, key_len), draw(kv_heads, key_len)
    grad_out = torch.randn_like(query) if requires_grad else None
    return Problem(FORMS[name], query, key, value, operands, None, grad_out)


def _case(name: str = "full_self") -> Any:
    problem = _problem(name, torch.bfloat16)
    inputs = SimpleNamespace(query=problem.query, key=problem.key, value=problem.value, operands=problem.operands)
    return SimpleNamespace(
        name="small", title="small case", form=FORMS[name], backward=False, scale=None,
        flops=10**6, bytes=10**5,
        inputs=lambda device, seed, requires_grad: inputs,
    )  # fmt: skip


def _variants(calls: list[str]) -> list[Variant]:
    def attend(problem: Problem, factor: float, name: str) -> Prepared:
        def run() -> tuple[Tensor]:
            calls.append(name)
            operands = dict(problem.operands)
            return (reference_attention(problem.query, problem.key, problem.value, problem.form, operands)[0] * factor,)

        return Prepared(run)

    def refuses(problem: Problem) -> Prepared:
        raise Unavailable("takes no windows")

    def raises(problem: Problem) -> Prepared:
        def run() -> tuple[Tensor]:
            raise ZeroDivisionError("kernel\n fell over")

        return Prepared(run)

    return [
        Variant("right", "Right", lambda p: attend(p, 1.0, "right"), compiled=True),
        Variant("off", "Off", lambda p: attend(p, 1.5, "off")),
        Variant("refuses", "Refuses", refuses),
        Variant("raises", "Raises", raises),
    ]


def test_a_case_keeps_every_variant_as_a_row_and_times_only_right_ones() -> None:
    calls: list[str] = []
    timed: list[str] = []

    def timer(run: Any) -> float:
        run()
        timed.append(calls[-1])
        return 0.5

    said: list[str] = []
    settings = run_case.Settings(rounds=3)
    split = measure.Split(host_ms=0.1, device_ms=0.4)
    result = run_case.run_case(
        _case(), _variants(calls), settings, timer, torch.device("cpu"), said.append, lambda run: split
    )
    rows = report.rows_of(result)
    assert {name: row["status"] for name, row in rows.items()} == {
        "right": "ok", "off": "wrong", "refuses": "unavailable", "raises": "failed",
    }  # fmt: skip
    assert timed == ["right"] * 3
    assert rows["right"]["ms"] == 0.5 and rows["right"]["tflop_per_s"] == pytest.approx(2e-3)
    assert (rows["right"]["host_ms"], rows["right"]["device_ms"]) == (0.1, 0.4)
    assert rows["right"]["rounds_ms"] == [0.5] * 3 and rows["right"]["compile_s"] > 0
    assert (
        rows["off"]["ms"] is None
        and rows["off"]["rounds_ms"] == []
        and "relative error 5.0e-01" in rows["off"]["reason"]
    )
    assert rows["refuses"]["reason"] == "takes no windows"
    assert rows["raises"]["reason"] == "ZeroDivisionError: kernel fell over"
    printed = bench.table(result)
    assert "WRONG: out: relative error" in printed and "FAILED: ZeroDivisionError" in printed
    json.dumps(result, allow_nan=False)


def test_a_result_that_turns_wrong_while_timed_loses_its_times() -> None:
    problem_calls: list[str] = []
    variant = _variants(problem_calls)[0]

    def prepare(problem: Problem) -> Prepared:
        prepared = variant.prepare(problem)

        def run() -> Any:
            (out,) = prepared.run()
            return (out if len(problem_calls) < 4 else out + math.nan,)

        return Prepared(run)

    racing = Variant("racing", "Racing", prepare)
    result = run_case.run_case(
        _case(), [racing], run_case.Settings(rounds=2), _run_once, torch.device("cpu"), lambda line: None
    )
    (row,) = result["rows"]
    assert row["status"] == "wrong" and row["ms"] is None and row["errors"]["out"]["relative"] == "nan"


def _run_once(run: Any) -> float:
    run()
    return 1.0


def test_bench_without_a_gpu_says_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert bench.main(["--output", str(tmp_path / "x.json")]) == 2
    assert "expected a CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


def test_bench_names_the_choices_when_a_name_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--variants", "flex,flax"]) == 2
    message = capsys.readouterr().err
    assert "got flax" in message and "fa3" in message
    assert bench.main(["--cases", "nothing-like-it"]) == 2
    assert "got nothing-like-it" in capsys.readouterr().err


# ---------------------------------------------------------------------- the report


def _row(variant: str, ms: float | None, ours: bool = False, status: str = "ok", reason: str = "") -> dict[str, Any]:
    timed = ms is not None
    return {
        "variant": variant, "title": variant, "ours": ours, "status": status, "reason": reason,
        "ms": ms, "ms_min": ms and ms * 0.99, "ms_max": ms and ms * 1.02, "rounds_ms": [ms] if timed else [],
        "device_ms": ms, "host_ms": 0.05,
        "tflop_per_s": ms and 1000 / ms, "tb_per_s": ms and 0.1 / ms,
        "errors": {"out": {"relative": 2.1e-3, "worst_row": 4e-3}} if timed else {},
        "compile_s": None, "extra_mib": None, "decisions": [],
    }  # fmt: skip


def _document() -> dict[str, Any]:
    host = {
        "gpu": "Some GPU", "torch": "2.11.0", "triton": "3.6.0", "cuda": "13.0", "cudnn": 91000,
        "date": "2026-01-02 03:04 UTC",
        "git_commit": "0123456789abcdef", "command": "python -m tools.bench --cases dense",
        "copy_tb_per_s": 4.3, "matmul_bf16_tflop_per_s": 780.4,
    }  # fmt: skip
    first = [
        _row("ours-compiled", 2.0, ours=True),
        _row("ours-eager", 2.1, ours=True),
        _row("fa3", 2.5),
        _row("flex", 3.1),
        _row("sdpa-flash", None, status="unavailable", reason="no kernel"),
    ]
    second = [
        _row("ours-compiled", 0.0824, ours=True),
        # A time that must never show: the row says that its result was wrong.
        {**_row("flex", 0.0111), "status": "wrong", "reason": "out: relative error 3.0e-01"},
        _row("fa3", None, status="failed", reason="OSError: built for another torch"),
    ]
    cases = [
        {"name": "a", "title": "causal A", "flops": 10**12, "bytes": 10**8, "rows": first},
        {"name": "b", "title": "cross B", "flops": 10**9, "bytes": 10**8, "rows": second},
    ]
    settings = {"rounds": 5, "warmup_ms": 20, "rep_ms": 100, "seed": 0, "fresh_caches": True}
    return {"schema": 1, "host": host, "settings": settings, "complete": True, "cases": cases}


def test_the_table_says_what_the_data_says() -> None:
    assert report.table(_document()) == "\n".join(
        [
            "| case | **compiled** | eager | FlashAttention-3 | FlexAttention |",
            "|---|---|---|---|---|",
            "| causal A | **2.00 ms, 500 TFLOP/s** | 2.10 ms, 476 TFLOP/s | 2.50 ms, 400 TFLOP/s, 1.25x "
            "| 3.10 ms, 323 TFLOP/s, 1.55x |",
            "| cross B | **0.0824 ms, 1.21 TB/s** | – | failed | wrong result |",
            "",
            "Time and rate of one call; at peers, how many times as long as compiled lowered-attn they take "
            "(above 1, lowered-attn is faster). Rows with backward time forward and backward together. "
            "A dash: it cannot run the case, or was not run on it.",
            "",
            "Some GPU, torch 2.11.0, triton 3.6.0, CUDA 13.0, cuDNN 91000, 2026-01-02 03:04 UTC, "
            "commit 0123456789ab. On the same machine a copy ran at 4.30 TB/s and an 8192^3 bf16 matrix "
            "product at 780 TFLOP/s.",
            "Median of 5 interleaved rounds, L2 flushed before every call; the widest spread between rounds "
            "is 3.0%, the largest relative error against float32 2.1e-03.",
            "",
            "```",
            "python -m tools.bench --cases dense",
            "```",
        ]
    )


def test_a_wrong_row_is_never_a_speed() -> None:
    document = _document()
    document["cases"][1]["rows"][0] = {**_row("ours-compiled", 0.0824, ours=True), "status": "wrong"}
    text = report.table(document)
    assert "0.0111" not in text and "0.0824" not in text
    assert "| cross B | wrong result | – | failed | wrong result |" in text
    assert "0.0111" not in bench.table(document["cases"][1])


def test_a_call_that_the_host_holds_up_shows_the_time_on_the_gpu() -> None:
    document = _document()
    document["cases"][1]["rows"][0]["device_ms"] = 0.0611
    text = report.table(document)
    assert "| cross B | **0.0824 ms (GPU 0.0611), 1.21 TB/s** |" in text
    assert "In brackets, the time on the GPU alone" in text


def test_the_caption_says_that_a_run_was_stopped() -> None:
    assert "stopped before its last case" in report.table({**_document(), "complete": False})


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a README that has the markers, and a results file."""
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "dense.json").write_text(json.dumps(_document()))
    (tmp_path / "README.md").write_text(f"# Title\n\n{report.BEGIN}\nold\n{report.END}\n\nAfter.\n")
    return tmp_path


def _report(project: Path, *arguments: str) -> int:
    return report.main(["--readme", str(project / "README.md"), "--results", str(project / "results"), *arguments])


def test_check_fails_until_the_report_is_written_and_after_the_data_change(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs the extra bench")
    assert _report(project, "--check") == 1
    message = capsys.readouterr().err
    assert "README.md: the table is not what" in message and "dense.svg: missing" in message
    assert _report(project) == 0
    assert _report(project, "--check") == 0
    readme = (project / "README.md").read_text()
    assert readme.startswith(f"# Title\n\n{report.BEGIN}\n![") and readme.endswith(f"{report.END}\n\nAfter.\n")
    assert "](results/dense.svg)" in readme and "old" not in readme
    plot = (project / "results" / "dense.svg").read_text()
    assert "500 TFLOP/s, 2 ms" in plot and "0.0111" not in plot
    assert _report(project) == 0
    assert (project / "results" / "dense.svg").read_text() == plot, "the same data gave another plot"
    document = _document()
    document["cases"][0]["rows"][0]["ms"] = 1.9
    (project / "results" / "dense.json").write_text(json.dumps(document))
    assert _report(project, "--check") == 1
    assert "dense.svg: missing, or drawn from other data" in capsys.readouterr().err


def test_check_sees_an_old_table(project: Path) -> None:
    plot = project / "results" / "dense.svg"
    plot.write_text(f"<svg>data {report.digest(_document())}</svg>")
    readme = project / "README.md"
    assert report.stale(readme, project / "results") == [
        f"{readme}: the table is not what {project / 'results' / 'dense.json'} gives"
    ]
    readme.write_text(report.replaced(readme.read_text(), report.block(_document(), "results/dense.svg")))
    assert report.stale(readme, project / "results") == []


@pytest.mark.parametrize(
    ("readme", "data", "expected"),
    [
        ("no markers", None, "expected one line <!-- results:begin -->"),
        (f"{report.END}\n{report.BEGIN}\n", None, "expected one line <!-- results:begin -->"),
        (None, {"schema": 0}, "expected schema 1, got 0"),
    ],
)
def test_what_is_missing_is_said(
    project: Path, capsys: pytest.CaptureFixture[str], readme: str | None, data: dict | None, expected: str
) -> None:
    if readme is not None:
        (project / "README.md").write_text(readme)
    if data is not None:
        (project / "results" / "dense.json").write_text(json.dumps(data))
    for arguments in ([], ["--check"]):
        assert _report(project, *arguments) == 1
        assert expected in capsys.readouterr().err


def test_no_results_is_said(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "results" / "dense.json").unlink()
    assert _report(project, "--check") == 1
    assert "expected results, got no file; run python -m tools.bench" in capsys.readouterr().err


def test_the_committed_readme_is_what_the_committed_results_give() -> None:
    if not (ROOT / "tools" / "results" / "dense.json").exists():
        pytest.skip("tools/results/dense.json is not there")
    done = subprocess.run(
        [sys.executable, "-m", "tools.report", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_whole_step_is_reported_from_its_own_file(tmp_path: Path) -> None:
    """It has no plot, and README is out of date when its data changes."""
    readme, results = tmp_path / "README.md", tmp_path / "results"
    results.mkdir()
    for name in ("dense.json", "whole_step.json"):
        (results / name).write_text((ROOT / "tools" / "results" / name).read_text())
    begin, end = report_step.MARKERS
    readme.write_text(f"{report.BEGIN}\n{report.END}\n{begin}\n{end}\n")
    assert report.main(["--readme", str(readme), "--results", str(results)]) == 0
    document = json.loads((results / "whole_step.json").read_text())
    step = document["steps"][0]
    assert f"{step['tokens_per_s']:,} |" in readme.read_text() and not (results / "whole_step.svg").exists()
    assert report.main(["--check", "--readme", str(readme), "--results", str(results)]) == 0
    step["step_ms"] += 1
    (results / "whole_step.json").write_text(json.dumps(document))
    assert report.main(["--check", "--readme", str(readme), "--results", str(results)]) == 1
