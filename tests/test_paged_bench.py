"""The benchmark of paged attention without a GPU: its cases count right, its rows say what happened, its report too."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import lowered_attn  # noqa: F401  registers the ops
from custom_ops.paged.masks import paged_mask
from tools import bench, bench_paged, measure, report, report_paged, run_case, trial
from tools.latent_cases import LATENT_CASES
from tools.paged_cases import PAGED_CASES, PagedCase, Target, exact_paged
from tools.paged_variants import PAGED_VARIANTS
from tools.store_cases import STORE_CASES, StoreCase
from tools.variants import Prepared, Unavailable, Variant

CPU = torch.device("cpu")
CAUSAL = PagedCase("causal", "causal", ((7, 1), (30, 5), (0, 3)), 4, 8, 2, 64, aim_ms=0.25)
LATENTS = dataclasses.replace(
    CAUSAL, name="latents", query_heads=6, kv_heads=1, head_dim=48, value_dim=32, scale=0.2, aim_ms=None
)
BLOCKS = PagedCase("blocks", "blocks", ((8, 4), (16, 8), (0, 4)), 4, 6, 2, 64, block_size=4)


def _quietly(line: str) -> None:
    """Instead of print."""


def _half_a_ms(call: Any) -> float:
    call()
    return 0.5


# ---------------------------------------------------------------------- cases


def test_a_latent_is_counted_once() -> None:
    """128 heads make 2 * (576 + 512) operations with each of 4,096 keys, of 1,152 bytes each."""
    case = LATENT_CASES["mla_decode_b128_h128_k4096"]
    assert case.flops == 128 * 128 * 4096 * 2 * (576 + 512)
    assert case.bytes == 128 * (4096 * 576 + 128 * (576 + 512)) * 2
    assert case.aim is not None and case.flops / case.aim / 1e9 == pytest.approx(560)


@pytest.mark.parametrize("case", [CAUSAL, BLOCKS], ids=lambda case: case.name)
def test_a_token_sees_the_keys_that_its_mode_says(case: PagedCase) -> None:
    mask = paged_mask(case.mode, block_size=case.block_size)
    for cached, new in case.requests:
        lengths = {"context": torch.tensor([cached]), "valid": torch.tensor([new])}
        keys = torch.arange(cached + new)
        visible = mask.dense(keys[cached:][None], keys, lengths)[0]
        assert visible.sum(-1).tolist() == case.keys_seen(cached, new)
        assert all(row[: row.sum()].all() for row in visible), "the visible keys are not the first ones"


@pytest.mark.parametrize("case", [CAUSAL, BLOCKS, LATENTS], ids=lambda case: case.name)
@pytest.mark.parametrize("max_scores", [2**28, 1])
def test_exact_attention_is_that_of_the_op(case: PagedCase, max_scores: int) -> None:
    problem = dataclasses.replace(case, dtype=torch.float32).problem("cpu", seed=3)
    (variant,) = bench_paged.variants_of(case, ["ours"])
    prepared = variant.prepare(problem)
    (got,) = prepared.outputs(prepared.run())
    torch.testing.assert_close(got, exact_paged(problem, max_scores), rtol=1e-4, atol=1e-5)


def test_inputs_keep_the_new_keys_where_the_slots_say() -> None:
    inputs = CAUSAL.problem("cpu", seed=1).inputs
    assert inputs.cu_seqlens_q.tolist() == [0, 1, 6, 9] and inputs.context_lens.tolist() == [7, 30, 0]
    for cache, new in ((inputs.k_cache, inputs.key), (inputs.v_cache, inputs.value)):
        torch.testing.assert_close(cache.flatten(0, 1)[inputs.slot_mapping], new, rtol=0, atol=0)
    owned = [row[: -(-(c + n) // 4)] for row, (c, n) in zip(inputs.page_tables, CAUSAL.requests, strict=True)]
    assert torch.cat(owned).sort().values.tolist() == list(range(CAUSAL.pages)), "a page has two owners"
    # Request 1 has 30 tokens cached: its first new one is the third of its eighth page.
    assert inputs.slot_mapping[1] == inputs.page_tables[1, 7] * 4 + 2


def test_flops_and_bytes_of_known_cases() -> None:
    decode = PAGED_CASES["decode_b64_k4096"]
    assert decode.is_decode and decode.visible_pairs == 64 * 4096
    assert decode.flops == 4 * 64 * 4096 * 128 * 32
    assert decode.bytes == 2 * 2 * (64 * 4096 * 8 * 128 + 64 * 32 * 128)
    assert decode.aim == pytest.approx(decode.bytes / 4.15e9)
    chunk = PAGED_CASES["chunk_b16_q128_c4096"]
    assert not chunk.is_decode and chunk.mode == "block_causal" and chunk.aim == 0.24
    assert chunk.keys_seen(4096, 128) == [4096 + 32 * (i // 32 + 1) for i in range(128)]
    store = STORE_CASES["store_t64"]
    assert store.bytes == 64 * (2 * (32 + 16) * 128 * 2 + 2 * 128 * 2 + 8)


def test_the_tables_of_the_design_are_covered() -> None:
    assert len({case.design_row for case in PAGED_CASES.values() if case.design_row}) == 6
    groups = {case.query_heads // case.kv_heads for case in PAGED_CASES.values()}
    assert {1, 4, 7, 8} <= groups and {64, 128, 256} <= {case.head_dim for case in PAGED_CASES.values()}
    known = [*PAGED_VARIANTS, "separate", "eager"]
    for name, case in bench_paged.CASES.items():
        assert case.name == name and set(case.variants) <= set(known)
        assert all(t.variant in case.variants and t.peer in case.variants for t in case.targets)
    ragged = PAGED_CASES["decode_b128_ragged"].requests
    assert len(ragged) == 128 and all(128 <= cached + new <= 8192 for cached, new in ragged)


# ---------------------------------------------------------------------- a case, measured


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers that answer in their own way; `ours` is the op."""

    def half(problem: Any) -> Prepared:
        return Prepared(lambda: exact_paged(problem) / 2, lambda out: (out,))

    def right(problem: Any) -> Prepared:
        return Prepared(lambda: exact_paged(problem).bfloat16(), lambda out: (out,))

    def refuses(problem: Any) -> Prepared:
        raise Unavailable("knows no pages")

    def never(problem: Any) -> Prepared:
        raise AssertionError("it killed the process that tried it and must not run")

    for variant in (
        Variant("fa3", "Right", right),
        Variant("vllm", "Half", half),
        Variant("vllm-split", "Refuses", refuses),
        Variant("ours-direct", "Never", never, ours=True),
    ):
        monkeypatch.setitem(PAGED_VARIANTS, variant.name, variant)


def test_a_case_keeps_every_variant_as_a_row(fakes: None) -> None:
    targets = (Target("ours", "fa3", 0.99), Target("ours", "vllm", 1.3), Target("ours-direct", "fa3", 0.95))
    case = dataclasses.replace(CAUSAL, targets=targets)
    times = iter([0.4, 0.5, 0.4, 0.5, 0.06])
    split = measure.Split(host_ms=0.02, device_ms=0.01)

    def timer(call: Any) -> float:
        call()
        return next(times)

    result = bench_paged.run_case(
        case, ["ours", "ours-direct", "fa3", "vllm", "vllm-split"], run_case.Settings(rounds=2), timer, CPU, _quietly,
        lambda call: (call(), split)[1], {(case.name, "ours-direct"): "its first call was not done after 60 s"},
    )  # fmt: skip
    rows = report.rows_of(result)
    assert {name: row["status"] for name, row in rows.items()} == {
        "ours": "ok", "ours-direct": "failed", "fa3": "ok", "vllm": "wrong", "vllm-split": "unavailable",
    }  # fmt: skip
    assert rows["ours-direct"]["reason"] == "DeadError: its first call was not done after 60 s"
    assert rows["ours"]["ratios"] == {"fa3": pytest.approx(1.25), "aim": pytest.approx(0.625)}
    assert rows["ours"]["targets"] == [
        {"peer": "fa3", "at_least": 0.99, "met": True},
        {"peer": "vllm", "at_least": 1.3, "met": None},
    ]
    assert rows["ours-direct"]["ratios"] == {} and rows["ours-direct"]["targets"][0]["met"] is None
    assert result["schedule_us"] == {"ours": pytest.approx(3.0)}, "20 schedules in 0.06 ms"
    assert result["metadata"]["host_us"] == 20 and result["metadata"]["device_us"] == 10
    printed = bench_paged.table(result)
    assert "FAILED: DeadError" in printed and "WRONG: out" in printed and "MISSED" not in printed
    json.dumps(result, allow_nan=False)


def test_a_store_case_checks_what_lies_in_the_caches() -> None:
    case = StoreCase("store", 6, copies=4, query_heads=4, kv_heads=2, head_dim=64, page_size=4)
    result = bench_paged.run_case(case, ["eager"], run_case.Settings(rounds=1), _half_a_ms, CPU, _quietly)
    (row,) = result["rows"]
    assert row["status"] == "ok" and row["ms"] == 0.125, "the graph holds four calls"
    assert result["kind"] == "store" and "schedule_us" not in result
    problem = case.problem("cpu")
    from tools.store_cases import STORE_VARIANTS, exact_store

    prepared = STORE_VARIANTS["eager"].prepare(problem)
    (before,) = prepared.outputs(problem.query)
    assert before[:, 4:].isnan().all(), "an unwritten slot has to show"
    (after,) = prepared.outputs(prepared.run())
    _, wrong = measure.compare((after,), measure.Exact(exact_store(problem)), torch.bfloat16)
    assert not wrong


def test_a_graph_without_a_gpu_calls() -> None:
    calls: list[int] = []
    graph = measure.Graph(lambda: calls.append(1), CPU, copies=3)
    graph()
    graph()
    assert calls == [1, 1]


def test_a_graph_warms_up_captures_and_shows_what_a_replay_leaves_unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in for CUDA graphs, which repeats the last captured call."""
    calls: list[str] = []
    out, cache = torch.zeros(3), torch.zeros(4)
    state = "warm"

    def call() -> tuple[torch.Tensor]:
        calls.append(state)
        out[:2] = cache[:3].fill_(1).sum()  # out[2] and cache[3] are never written
        return (out,)

    class StandIn:
        def replay(self) -> None:
            call()

    @contextlib.contextmanager
    def capture(graph: StandIn) -> Any:
        nonlocal state
        state = "captured"
        yield
        state = "replayed"

    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandIn)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    graph = measure.Graph(call, torch.device("cuda"), copies=2, written=(cache,))
    assert graph() == (out,)
    assert calls == ["warm"] * 3 + ["captured"] * 2 + ["replayed"]
    assert out.isnan().tolist() == [False, False, True] and cache.isnan().tolist() == [False, False, False, True]
    graph()
    assert len(calls) == 7


@pytest.mark.gpu
@pytest.mark.parametrize("case", [CAUSAL, BLOCKS], ids=lambda case: case.name)
def test_graphs_of_our_variants_are_right_and_timed(case: PagedCase) -> None:
    names = [name for name, variant in PAGED_VARIANTS.items() if variant.ours]
    settings = run_case.Settings(rounds=1)
    timer = measure.cuda_timer(warmup_ms=1, rep_ms=2)
    result = bench_paged.run_case(case, names, settings, timer, torch.device("cuda", 0), _quietly, measure.cuda_split)
    assert {row["variant"]: (row["status"], row["reason"]) for row in result["rows"]} == dict.fromkeys(
        names, ("ok", "")
    )
    assert all(isinstance(us, float) and us > 0 for us in result["schedule_us"].values())


# ---------------------------------------------------------------------- the command


def test_cases_come_from_one_suite(capsys: pytest.CaptureFixture[str]) -> None:
    dense, paged, _ = bench.SUITES
    assert bench.choose_cases("dense")[0] is dense
    assert bench.choose_cases("paged") == (paged, [*PAGED_CASES.values(), *STORE_CASES.values()])
    assert bench.choose_cases("mla") == (paged, list(LATENT_CASES.values()))
    assert [case.name for case in bench.choose_cases("store_t64,decode_b64_k4096")[1]] == [
        "store_t64",
        "decode_b64_k4096",
    ]
    with pytest.raises(ValueError, match="got decode_b64_k4096"):
        bench.choose_cases("causal_b4_s4096_d128,decode_b64_k4096")
    assert bench.main(["--list"]) == 0
    assert "prefill_b8_q2048_c8192" in capsys.readouterr().out


class _Late(Exception):
    """Stands for the end of the process."""


def _options(tmp_path: Path, *more: str) -> list[str]:
    return ["--cases", "paged", "--output", str(tmp_path / "paged.json"), "--trial-workers", "0", *more]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A suite of small cases on a machine that only seems to have a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(bench, "host_facts", lambda command, commit: {**_document()["host"], "command": command})
    monkeypatch.setattr(bench, "cuda_timer", lambda warmup_ms, rep_ms: _half_a_ms)
    monkeypatch.setattr(bench, "cuda_split", lambda call: measure.Split(0.02, 0.01))

    def run(case: Any, *arguments: Any) -> dict[str, Any]:
        if case.name == BLOCKS.name:
            raise MemoryError("no room for the cache")
        _, settings, timer, _, *rest = arguments
        return bench_paged.run_case(case, ["ours"], settings, timer, CPU, *rest)

    small = {case.name: case for case in (CAUSAL, BLOCKS)}
    suite = dataclasses.replace(bench.SUITES[1], cases=small, run=run)
    monkeypatch.setattr(bench, "SUITES", (bench.SUITES[0], suite))


def test_a_case_that_cannot_be_made_does_not_end_the_run(machine: None, tmp_path: Path) -> None:
    assert bench.main(_options(tmp_path)) == 0
    document = json.loads((tmp_path / "paged.json").read_text())
    assert [case["name"] for case in document["cases"]] == ["causal"]
    assert document["skipped"] == {"blocks": "MemoryError: no room for the cache"} and not document["complete"]
    assert "Not measured: blocks." in report_paged.block(document, None)


def test_no_case_begins_after_the_limit(machine: None, tmp_path: Path) -> None:
    assert bench.main(_options(tmp_path, "--limit-s", "0")) == 0
    document = json.loads((tmp_path / "paged.json").read_text())
    assert document["cases"] == [] and set(document["skipped"]) == {"causal", "blocks"}
    assert document["host"]["command"].endswith("--limit-s 0.0")


def test_a_case_that_hangs_leaves_what_was_measured(
    machine: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(bench.os, "_exit", ended.append)

    def hangs(case: Any, *arguments: Any) -> dict[str, Any]:
        end = time.perf_counter() + 20
        while not ended and time.perf_counter() < end:
            time.sleep(0.01)
        raise _Late

    suite = dataclasses.replace(bench.SUITES[1], run=hangs, case_limit_s=0.1)
    monkeypatch.setattr(bench, "SUITES", (bench.SUITES[0], suite))
    bench.main(_options(tmp_path))
    assert ended[0] == bench.DEVICE_LOST
    assert json.loads((tmp_path / "paged.json").read_text())["stopped"].startswith("causal: not done after 0.1 s")


# ---------------------------------------------------------------------- trials


def try_one(job: trial.Job, seed: int) -> None:
    """What the processes of the next test run."""
    if job[1] == "raises":
        raise ValueError(f"seed {seed}")
    if job[1] == "dies":
        os._exit(7)
    if job[1] == "hangs":
        time.sleep(60)


def test_a_call_that_kills_or_hangs_its_process_is_named() -> None:
    said: list[str] = []
    jobs = [("case", name) for name in ("fine", "raises", "dies", "hangs")]
    reasons = trial.try_all(try_one, jobs, 5, workers=1, patience_s=2, say=said.append)
    assert reasons == {
        ("case", "dies"): "its first call ended the process, exit code 7",
        ("case", "hangs"): "its first call was not done after 2 s",
    }
    assert any("case raises: raised" in line and "seed 5" in line for line in said)
    assert said[-1].startswith("4 of 4 first calls tried")


def test_a_process_that_does_not_start_says_nothing_of_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(trial, "_serve", os._exit)  # takes one argument and gets three: the process ends with a TypeError
        assert trial.try_all(try_one, [("case", "fine")], 0, 1, patience_s=2, say=said.append) == {}
    assert "case fine: untried" in said[0] and "did not start, exit code 1" in said[0]


def test_after_the_limit_no_call_is_tried() -> None:
    said: list[str] = []
    assert trial.try_all(try_one, [("case", "dies")], 0, 1, patience_s=2, until_s=0, say=said.append) == {}
    assert said[-1].startswith("0 of 1 first calls tried")


# ---------------------------------------------------------------------- the report


def _row(variant: str, ms: float | None, status: str = "ok", **more: Any) -> dict[str, Any]:
    return {
        "variant": variant, "title": variant, "ours": variant.startswith("ours"), "status": status, "reason": "",
        "ms": ms, "ms_min": ms and ms * 0.99, "ms_max": ms and ms * 1.02, "rounds_ms": [ms] if ms else [],
        "device_ms": None, "host_ms": None, "tflop_per_s": ms and 1 / ms, "tb_per_s": ms and 1.07 / ms,
        "errors": {"out": {"relative": 2.1e-3, "worst_row": 4e-3}} if ms else {},
        "compile_s": None, "extra_mib": None, "decisions": [], "ratios": {}, "targets": [], **more,
    }  # fmt: skip


def _document() -> dict[str, Any]:
    host = {
        "gpu": "Some GPU", "torch": "2.11.0", "triton": "3.6.0", "cuda": "13.0", "cudnn": 91000,
        "date": "2026-01-02 03:04 UTC", "git_commit": "0123456789abcdef",
        "command": "python -m tools.bench --cases paged", "copy_tb_per_s": 4.3, "matmul_bf16_tflop_per_s": 780.4,
    }  # fmt: skip
    decode = [
        _row("ours", 0.25, targets=[{"peer": "fa3", "at_least": 1.1, "met": False}]),
        _row("ours-direct", 0.26),
        _row("ours-triton", None, "failed", reason="RuntimeError: no"),
        _row("fa3", 0.26),
        _row("vllm", 0.0111, "wrong"),
    ]
    bench_paged.add_ratios(decode, 0.24, [Target("ours", "fa3", 1.1)])
    store = [_row("ours", 0.0102), _row("separate", 0.0204), _row("eager", 0.3)]
    bench_paged.add_ratios(store, None, [])
    cases = [
        {
            "name": "decode", "kind": "attention", "title": "decode B64", "flops": 10**9, "bytes": 10**9,
            "aim_ms": 0.24, "rows": decode, "schedule_us": {"ours": 3.14, "ours-direct": "RuntimeError: no"},
            "metadata": {"host_us": 21.2, "device_us": 9.7, "bytes": 65536},
        },
        {
            "name": "store", "kind": "store", "title": "store T64", "flops": 0, "bytes": 10**6, "aim_ms": None,
            "rows": store,
        },
    ]  # fmt: skip
    settings = {"rounds": 5, "warmup_ms": 20, "rep_ms": 60, "seed": 0, "fresh_caches": True}
    return {"schema": 1, "host": host, "settings": settings, "complete": True, "cases": cases}


def test_the_tables_say_what_the_data_says() -> None:
    lines = report_paged.block(_document(), None).splitlines()
    assert lines[:3] == [
        "| case | **new keys in the cache** | new keys read directly | portable Triton | FlashAttention-3 | "
        "vLLM Triton | schedule | aim |",
        "|---|---|---|---|---|---|---|---|",
        "| decode B64 | **250.0 us, 4.28 TB/s** | 260.0 us, 4.12 TB/s, 1.00x FA3 | failed | "
        "260.0 us, 4.12 TB/s, 1.04x | wrong result | 3.1 us | 240.0 us (0.96x) |",
    ]
    assert (
        "| store T64 | **10.2 us, 104.90 TB/s** | 20.4 us, 52.45 TB/s, 2.00x | 300.0 us, 3.57 TB/s, 29.41x |" in lines
    )
    text = "\n".join(lines)
    assert "Not reached: decode B64, ours: 1.04x fa3, wanted 1.1x." in text
    assert "takes the host 21 us and the GPU 10 us" in text
    assert "11.1" not in text, "a wrong result has no time"
    assert "stopped before its last case" not in text
    assert "stopped before its last case" in report_paged.block({**_document(), "complete": False}, None)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a README that has both pairs of markers, and both results files."""
    (tmp_path / "results").mkdir()
    document = _document()
    dense = {**document, "cases": [{**document["cases"][0], "rows": [_row("ours-compiled", 2.0)]}]}
    (tmp_path / "results" / "dense.json").write_text(json.dumps(dense))
    (tmp_path / "results" / "paged.json").write_text(json.dumps(document))
    markers = "\n".join([report.BEGIN, report.END, "Between.", *report_paged.MARKERS])
    (tmp_path / "README.md").write_text(f"{markers}\nAfter.\n")
    return tmp_path


def _report(project: Path, *arguments: str) -> int:
    return report.main(["--readme", str(project / "README.md"), "--results", str(project / "results"), *arguments])


def test_the_readme_gets_both_tables(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs the extra bench")
    assert _report(project, "--check") == 1
    message = capsys.readouterr().err
    assert "paged.json gives" in message and "paged.svg: missing" in message and "dense.svg: missing" in message
    assert _report(project) == 0 and _report(project, "--check") == 0
    readme = (project / "README.md").read_text()
    assert "](results/paged.svg)" in readme and "\nBetween.\n" in readme and readme.endswith("\nAfter.\n")
    plot = (project / "results" / "paged.svg").read_text()
    assert "4.28 TB/s, 0.25 ms" in plot and "store T64" not in plot
    document = _document()
    document["cases"][1]["rows"][0]["ms"] = 0.011
    (project / "results" / "paged.json").write_text(json.dumps(document))
    assert report.stale(project / "README.md", project / "results") == [
        f"{project / 'README.md'}: the table is not what {project / 'results' / 'paged.json'} gives",
        f"{project / 'results' / 'paged.svg'}: missing, or drawn from other data",
    ]


def test_without_paged_results_their_place_stays_empty(project: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs the extra bench")
    (project / "results" / "paged.json").unlink()
    assert _report(project) == 0 and _report(project, "--check") == 0
    assert (project / "README.md").read_text().endswith("\n".join(["Between.", *report_paged.MARKERS, "After.\n"]))
    assert not (project / "results" / "paged.svg").exists()


def test_markers_that_are_missing_are_said(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = project / "README.md"
    readme.write_text(readme.read_text().replace(report_paged.MARKERS[1], ""))
    assert _report(project, "--check") == 1
    assert "expected one line <!-- paged:begin -->" in capsys.readouterr().err
