"""The sweep without a GPU: its points cover what they should, one point is measured, and the report says what was."""

from __future__ import annotations

import dataclasses
import functools
import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import lowered_attn  # noqa: F401  registers the ops
from custom_ops.reference import reference_attention
from tools import report, report_sweep, run_case, sweep, sweep_cases, sweep_entries, variants
from tools.cases import Case
from tools.measure import Exact, cuda_timer
from tools.sweep_cases import POINTS
from tools.variants import Prepared, Problem, Unavailable, Variant

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
SETTINGS = run_case.Settings(rounds=2)
SMALL = dataclasses.replace(
    POINTS["causal_d128_h32g8_b1_s1000"], batch=2, query_heads=4, kv_heads=2, query_len=40, key_len=40, head_dim=16,
    value_dim=16,
)  # fmt: skip
MULTIPROCESSORS = 132


# ---------------------------------------------------------------------- points


def test_the_points_cover_what_the_sweep_is_for() -> None:
    assert 140 <= len(POINTS) <= 160
    assert len(sweep_cases._points()) == len(POINTS), "two points of one name"
    shapes = {dataclasses.replace(point, name="") for point in POINTS.values()}
    assert len(shapes) == len(POINTS), "a shape is measured twice"
    assert {point.batch for point in POINTS.values()} >= {1, 2, 4, 8, 16, 32}
    lengths = {point.query_len for point in POINTS.values()}
    assert min(lengths) == 128 and max(lengths) == 32768 and {1000, 4001} <= lengths
    masks = Counter(sweep_cases.mask_of(point) for point in POINTS.values())
    assert set(masks) == set(report_sweep.MASKS) and min(masks.values()) >= 10
    for mask in ("causal", "full"):
        dims = {sweep_cases.dims_of(p) for p in POINTS.values() if sweep_cases.mask_of(p) == mask}
        assert dims == {"64", "96", "128", "192/128", "256"}
        groups = {p.query_heads // p.kv_heads for p in POINTS.values() if sweep_cases.mask_of(p) == mask}
        assert groups >= {1, 4, 8}


def test_every_point_is_a_call_that_the_time_allows() -> None:
    for point in POINTS.values():
        assert point.query_heads % point.kv_heads == 0 and point.query_len == point.key_len
        assert point.window is None or point.window < point.query_len, "a window that hides nothing is another mask"
        assert point.flops <= 2.5e12 and point.bytes < 2**30, point.name


def test_a_run_that_is_cut_off_has_seen_every_mask_with_every_head_dim() -> None:
    kinds = [(sweep_cases.mask_of(p), sweep_cases.dims_of(p)) for p in POINTS.values()]
    count = len(set(kinds))
    assert len(set(kinds[:count])) == count == 17


def test_points_are_named_by_patterns() -> None:
    found = sweep_cases.chosen("full_d256*, *_s4001")
    assert [p.name for p in found] == [n for n in POINTS if n.startswith("full_d256") or n.endswith("_s4001")]
    assert sweep_cases.chosen(None) == list(POINTS.values())
    with pytest.raises(ValueError, match="--only: expected patterns of points .*, got 'causal_d65'"):
        sweep_cases.chosen("full*,causal_d65")


@pytest.mark.parametrize("form", ["full_self", "bidirectional", "sliding_self"])
def test_work_is_counted_as_the_mask_has_it(form: str) -> None:
    point = dataclasses.replace(SMALL, form_name=form, window=7 if form == "sliding_self" else None)
    problem = sweep_cases.problem_of(point, "cpu", seed=1)
    assert point.visible_pairs == variants.dense_mask(problem).expand(1, 1, 40, 40).sum()
    assert sweep_cases.items_of(point) == 2 * 4 * 1 and sweep_cases.scores_of(point) == 2 * 4 * 40 * 40
    assert problem.query.transpose(1, 2).is_contiguous(), "token-major, as a projection leaves it"
    assert not problem.query.equal(sweep_cases.problem_of(point, "cpu", seed=2).query)


def test_a_class_says_mask_dims_length_and_work() -> None:
    point = POINTS["causal_d192v128_h32g32_b1_s1024"]
    assert sweep_cases.items_of(point) == 256
    assert sweep_cases.class_of(point, 132) == ("causal", "192/128", sweep_cases.SHORT, sweep_cases.SOME)
    assert sweep_cases.class_of(point, 300)[3] == sweep_cases.FEW
    assert sweep_cases.class_of(POINTS["sliding256_d128_h32g8_b1_s32768"], 132) == (
        "sliding 256", "128", sweep_cases.LONG, sweep_cases.MANY,
    )  # fmt: skip


# ---------------------------------------------------------------------- entries


FA3_ARGUMENTS = (
    "k_new v_new q_v out cu_seqlens_q cu_seqlens_k cu_seqlens_k_new seqused_q seqused_k max_seqlen_q max_seqlen_k "
    "page_table kv_batch_idx leftpad_k rotary_cos rotary_sin seqlens_rotary q_descale k_descale v_descale "
    "softmax_scale is_causal window_size_left window_size_right softcap is_rotary_interleaved scheduler_metadata "
    "num_splits pack_gqa sm_margin s_aux cp_world_size cp_rank cp_tot_seqused_k"
).split()
"""Of the op's schema, q, k and v left out; none has a default."""


@pytest.mark.parametrize("form", ["full_self", "bidirectional", "sliding_self"])
def test_peers_compute_what_the_point_is(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention-3 on a stand-in for its op that takes exactly the op's arguments; SDPA on its math backend."""
    given: dict[str, Any] = {}
    point = dataclasses.replace(SMALL, form_name=form, window=7 if form == "sliding_self" else None)
    problem = sweep_cases.problem_of(point, "cpu", seed=1)
    exact, _ = reference_attention(problem.query, problem.key, problem.value, point.form, problem.operands)

    def fwd(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **arguments: Any) -> list[torch.Tensor]:
        given.update(arguments)
        assert q.shape == (80, 4, 16) and k.shape == v.shape == (80, 2, 16)
        return [exact.transpose(1, 2).flatten(0, 1)]

    monkeypatch.setattr(sweep_entries, "peers_with_fa3", lambda: mock.Mock(fa3_op=lambda: fwd))
    prepared = sweep_entries.ENTRIES["fa3"].prepare(problem)
    (out,) = prepared.outputs(prepared.run())
    assert torch.equal(out, exact)
    assert set(given) == set(FA3_ARGUMENTS)
    assert given["cu_seqlens_q"].tolist() == [0, 40, 80] and given["softmax_scale"] == 0.25
    band = (given["is_causal"], given["window_size_left"], given["window_size_right"])
    assert band == {"full_self": (True, -1, -1), "bidirectional": (False, -1, -1), "sliding_self": (True, 6, 0)}[form]
    if form == "sliding_self":
        with pytest.raises(Unavailable, match="takes a window only as a mask"):
            sweep_entries.ENTRIES["cudnn"].prepare(problem)
    else:
        (out,) = variants._sdpa(problem, "MATH").run()
        torch.testing.assert_close(out, exact, rtol=2e-2, atol=2e-2)


def test_our_kernels_are_called_as_they_are_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton.experimental.gluon", reason="the Hopper kernel is written in Gluon")
    from custom_ops.kernels import launch
    from custom_ops.kernels.gluon import dense_launch

    problem = sweep_cases.problem_of(dataclasses.replace(SMALL, head_dim=64, value_dim=64), "cpu", seed=1)
    portable = mock.create_autospec(launch.forward, return_value=(problem.query, None))
    hopper = mock.create_autospec(dense_launch.forward)
    monkeypatch.setattr(launch, "forward", portable)
    monkeypatch.setattr(dense_launch, "forward", hopper)
    (out,) = sweep_entries.ENTRIES["portable"].prepare(problem).run()
    assert out is problem.query and portable.call_args.kwargs["config"] is not None
    (tiling,) = sweep_entries.tilings('{"few": {"stages": 2, "consumers": 1}}')
    (out,) = tiling.variant.prepare(problem).run()
    assert out.shape == problem.query.shape
    shape = hopper.call_args.kwargs["shape"]
    assert (shape.stages, shape.value_stages, shape.consumers, shape.group) == (2, 2, 1, 2)
    taken = sweep_entries.choice(problem)
    assert taken["kernel"] == "triton" and "architecture: expected 90" in taken["against"][0]
    monkeypatch.setattr(launch, "kernel_for", mock.create_autospec(launch.kernel_for, return_value=("gluon", "why")))
    taken = sweep_entries.choice(problem)
    assert (taken["kernel"], taken["why"]) == ("gluon", "why") and "128 rows x 128 keys" in taken["tiling"]
    two, three = (sweep_entries.shipped_shape(problem, consumers) for consumers in (2, 3))
    assert (two.consumers, three.consumers) == (2, 3)
    (tiling,) = sweep_entries.tilings('{"other": {"shipped": 3, "stages": 2}}')
    tiling.variant.prepare(problem).run()
    assert hopper.call_args.kwargs["shape"] == dataclasses.replace(three, stages=2, value_stages=2)


def test_tilings_come_from_json(tmp_path: Path) -> None:
    path = tmp_path / "tilings.json"
    path.write_text('{"shipped": {}, "two": {"consumers": 2, "only": "causal*,full_d64*"}}')
    shipped, two = sweep_entries.tilings(str(path))
    assert dict(two.overrides) == {"consumers": 2}
    causal, windowed = POINTS["causal_d128_h32g8_b1_s1000"], POINTS["sliding256_d128_h32g8_b1_s4096"]
    names = ["ours", "fa3"]
    assert [e.name for e in sweep_entries.entries_of(causal, names, [shipped, two])] == [*names, "shipped", "two"]
    assert [e.name for e in sweep_entries.entries_of(windowed, names, [shipped, two])] == [*names, "shipped"]
    with pytest.raises(ValueError, match="two: expected fields of group, .*, got consumer"):
        sweep_entries.tilings('{"two": {"consumer": 2}}')
    with pytest.raises(ValueError, match="names other than ours, .*, got portable"):
        sweep_entries.tilings('{"portable": {}}')


def test_a_kernel_is_compiled_beforehand_once() -> None:
    l2_bytes = 60 * 2**20
    jobs = sweep_entries.jobs_of(list(POINTS.values()), list(sweep_entries.ENTRIES), [], l2_bytes)
    assert len(set(jobs.values())) == len(jobs)
    assert Counter(entry for _, entry in jobs.values()).keys() == {"ours", "portable"}
    assert len([entry for _, entry in jobs.values() if entry == "ours"]) < 50
    assert [entry for _, entry in jobs.values()] == sorted(entry for _, entry in jobs.values()), "slow ones first"
    few = [POINTS[f"causal_d256_h16g4_b{size}"] for size in ("1_s512", "1_s2048", "1_s16384")]  # of one tiling
    assert list(sweep_entries.jobs_of(few, ["ours", "fa3"], [], l2_bytes).values()) == [(few[2].name, "ours")]
    assert len(sweep_entries.jobs_of(few, ["portable"], [], l2_bytes)) == 2, "heads together differ"


# ---------------------------------------------------------------------- one point, measured


def _half_a_ms(call: Any) -> float:
    call()
    return 0.5


def _attend(problem: Problem, factor: float = 1.0) -> Prepared:
    call = functools.partial(reference_attention, problem.query, problem.key, problem.value, problem.form)
    return Prepared(lambda: (call(problem.operands)[0] * factor,))


def _raises(problem: Problem) -> Prepared:
    raise ZeroDivisionError("no kernel\n image")


def _entries() -> list[Variant[Problem]]:
    def refuses(problem: Problem) -> Prepared:
        raise Unavailable("takes no such mask")

    return [
        sweep_entries.ENTRIES["ours"],
        Variant("fa3", "FA3", _attend),
        Variant("cudnn", "cuDNN", refuses),
        Variant("portable", "Triton", functools.partial(_attend, factor=1.5), ours=True),
        Variant("two", "two", _raises, ours=True),
        Variant("hangs", "hangs", _raises, ours=True),
    ]


def test_a_point_keeps_every_entry_as_a_row_and_times_only_right_ones() -> None:
    fatal = {"hangs": "its first call was not done after 60 s"}
    result = sweep.run_point(SMALL, _entries(), SETTINGS, _half_a_ms, CPU, MULTIPROCESSORS, fatal)
    rows = report.rows_of(result)
    assert {name: row["status"] for name, row in rows.items()} == {
        "ours": "ok", "fa3": "ok", "cudnn": "unavailable", "portable": "wrong", "two": "failed", "hangs": "failed",
    }  # fmt: skip
    assert rows["ours"]["rounds_ms"] == [0.5, 0.5] and 0 < rows["ours"]["error"] < 5e-3
    assert rows["portable"]["ms"] is None and rows["portable"]["rounds_ms"] == []
    assert rows["two"]["reason"] == "ZeroDivisionError: no kernel image"
    assert "not done after 60 s" in rows["hangs"]["reason"]
    assert result["compared_with"] == "float32" and result["class"] == ["causal", "16", "S to 1k", "under 1 item an SM"]
    json.dumps(result, allow_nan=False)
    text = report_sweep.line({**result, "choice": {"kernel": "gluon"}})
    assert "gluon  1.000     us: ours 500.0, fa3 500.0, cudnn UNAVAILABLE, portable WRONG" in text
    assert "two failed: ZeroDivisionError: no kernel image" in text and "takes no such mask" not in text


def test_a_peer_stands_in_where_float32_would_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = sweep_cases.problem_of(SMALL, CPU, 0)
    monkeypatch.setattr(sweep_entries, "ENTRIES", {})  # the sweep has its own name for them
    peers = {"fa3": Variant("fa3", "FA3", _raises), "cudnn": Variant("cudnn", "cuDNN", _attend)}
    monkeypatch.setattr(sweep, "ENTRIES", peers)
    exact, name = sweep.reference(SMALL, problem, exact_scores=1)
    assert name == "cudnn" and exact.out.dtype == torch.float32
    peers["fa3"] = peers["cudnn"]
    assert sweep.reference(SMALL, problem, exact_scores=1)[1] == "fa3"
    assert sweep.reference(SMALL, problem, exact_scores=1, fatal={"fa3": "hangs"})[1] == "cudnn"
    assert sweep.reference(SMALL, problem)[1] == "float32"
    peers["fa3"] = peers["cudnn"] = Variant("none", "none", _raises)
    exact, name = sweep.reference(SMALL, problem, exact_scores=1)
    assert name == "float32" and isinstance(exact, Exact)


@pytest.mark.gpu
@pytest.mark.parametrize("mask", ["causal", "sliding256", "full"])
def test_our_entries_are_right_and_timed(mask: str) -> None:
    point = next(p for p in POINTS.values() if p.name.startswith(f"{mask}_d128_h32g8"))
    entries = [sweep_entries.ENTRIES[name] for name in ("ours", "portable")]
    result = sweep.run_point(point, entries, SETTINGS, cuda_timer(1, 2), torch.device("cuda", 0), MULTIPROCESSORS, {})
    assert [(row["variant"], row["status"], row["reason"]) for row in result["rows"]] == [
        ("ours", "ok", ""), ("portable", "ok", ""),
    ]  # fmt: skip
    assert result["choice"]["kernel"] in ("gluon", "triton")


# ---------------------------------------------------------------------- all points


class _Clock:
    """Seconds that pass only where a point is measured."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def _run(measure: Any, limit_s: float | None = None) -> tuple[dict[str, Any], list[int], list[str], Any]:
    """Three points, ten seconds each: the document, how many cases each write had, what was said, and any error."""
    clock, said, kept = _Clock(), list[str](), list[int]()
    document: dict[str, Any] = {"cases": [], "complete": False}
    cases = [dataclasses.replace(SMALL, name=name) for name in "abc"]

    def timed(case: Case) -> dict[str, Any]:
        clock.now += 10
        return measure(case)

    lost = None
    try:
        sweep.sweep(cases, timed, document, lambda d: kept.append(len(d["cases"])), limit_s, clock, said.append)
    except run_case.DeviceLostError as error:
        lost = error
    return document, kept, said, lost


def _measured(case: Case) -> dict[str, Any]:
    return _point(case.name, "causal", "128", {"ours": 1.0, "fa3": 1.1})


def test_the_file_is_written_after_every_point() -> None:
    document, kept, said, _ = _run(_measured)
    assert kept == [1, 2, 3, 3] and document["complete"]
    assert [text.split()[0] for text in said] == ["1/3", "2/3", "3/3"]


def test_a_limit_stops_between_points_and_says_how_many_were_reached() -> None:
    document, kept, said, _ = _run(_measured, limit_s=15)
    assert [case["name"] for case in document["cases"]] == ["a", "b"] and document["not_reached"] == ["c"]
    assert not document["complete"] and kept[-1] == 2
    assert said[-1] == "stopped after 15 s: 2 of 3 points reached"


def test_a_point_that_cannot_be_made_is_named() -> None:
    def measure(case: Case) -> dict[str, Any]:
        if case.name == "b":
            raise MemoryError("out of memory")
        return _measured(case)

    document, _, said, _ = _run(measure)
    assert document["skipped"] == {"b": "MemoryError: out of memory"} and not document["complete"]
    assert [case["name"] for case in document["cases"]] == ["a", "c"]
    assert any("b: not measured: MemoryError" in text for text in said)


def test_a_lost_device_ends_the_run_and_keeps_what_there_is() -> None:
    def measure(case: Case) -> dict[str, Any]:
        if case.name == "b":
            raise run_case.DeviceLostError("two broke the CUDA context")
        return _measured(case)

    document, kept, _, lost = _run(measure)
    assert lost is not None and kept == [1, 1]
    assert document["stopped"] == "b: two broke the CUDA context" and document["not_reached"] == ["b", "c"]


def test_a_first_call_travels_to_another_process() -> None:
    extra = sweep_entries.tilings('{"two": {"consumers": 2}}')
    first = pickle.loads(pickle.dumps(functools.partial(sweep_entries.first_call, extra)))
    taken: list[str] = []
    gluon = mock.Mock(
        side_effect=lambda problem, overrides, shipped: Prepared(lambda: taken.append(str(dict(overrides))))
    )
    with mock.patch.multiple(sweep_entries, POINTS={SMALL.name: SMALL}, _gluon=gluon):
        sweep_entries.first_call(extra, (SMALL.name, "two"), 0, device="cpu")
    assert taken == ["{'consumers': 2}"] and first.args == (extra,)


def test_the_command_says_what_is_wrong(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, expected in (
        (["--only", "nothing"], "got 'nothing'"),
        (["--entries", "ours,flax"], "got ours,flax"),
        (["--variants", '{"a": {"b": 1}}'], "got b"),
        (["--variants", "no-such-file"], "no-such-file"),
    ):
        assert sweep.main(arguments) == 2
        assert expected in capsys.readouterr().err
    assert sweep.main(["--list", "--only", "causal_d64*"]) == 0
    assert "causal B1 H32 S128 D64" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sweep.main([]) == 2
    assert "expected a CUDA device" in capsys.readouterr().err


# ---------------------------------------------------------------------- the report


def _point(
    name: str, mask: str, dims: str, ms: dict[str, float | None], kernel: str = "gluon", length: int = 4096
) -> dict[str, Any]:
    rows = [
        {
            "variant": entry, "ours": entry not in report_sweep.PEERS, "status": "failed" if t is None else "ok",
            "reason": "RuntimeError: no" if t is None else "", "ms": t, "rounds_ms": [] if t is None else [t],
            "error": None if t is None else 2.1e-3, "worst_row": None if t is None else 4e-3,
        }
        for entry, t in ms.items()
    ]  # fmt: skip
    return {
        "name": name, "title": f"{mask} {name}", "class": [mask, dims, "S to 4k", "more items"], "items": 1024,
        "q": [1, 32, length, 128], "flops": 10**11, "bytes": 10**8, "compared_with": "float32",
        "choice": {"kernel": kernel, "tiling": "", "against": []}, "rows": rows,
    }  # fmt: skip


def _document() -> dict[str, Any]:
    host = {
        "gpu": "Some GPU", "torch": "2.11.0", "triton": "3.6.0", "cuda": "13.0", "cudnn": 91000,
        "date": "2026-01-02 03:04 UTC", "git_commit": "0123456789abcdef", "command": "python -m tools.sweep",
        "copy_tb_per_s": 4.3, "matmul_bf16_tflop_per_s": 780.4,
    }  # fmt: skip
    cases = [
        _point("A", "causal", "128", {"ours": 1.0, "fa3": 1.21, "cudnn": 1.3, "portable": 1.5}),
        _point("B", "causal", "128", {"ours": 1.0, "fa3": 1.0, "cudnn": 0.9, "portable": 1.5}),
        _point("C", "sliding 256", "64", {"ours": 0.5, "fa3": 0.6, "cudnn": None, "portable": 0.4}, kernel="triton"),
        {
            **_point("D", "full", "192/128", {"ours": None, "fa3": 2.0, "cudnn": 2.0, "portable": 3.0}, length=8192),
            "compared_with": "fa3",
        },
    ]
    settings = {"rounds": 3, "warmup_ms": 2, "rep_ms": 8, "seed": 0}
    return {"schema": 1, "host": host, "settings": settings, "points": 5, "complete": False, "cases": cases,
            "not_reached": ["E"]}  # fmt: skip


def test_the_table_says_what_the_data_says() -> None:
    lines = report_sweep.block(_document(), "results/sweep.svg").splitlines()
    assert lines[0] == "![The better peer's time over ours at every point of the sweep](results/sweep.svg)"
    assert [line for line in lines if line.startswith("|")] == [
        "| mask | D | points | kernel | FlashAttention-3 | cuDNN | better of the two | portable Triton | below 0.95x |",
        "|---|---|---|---|---|---|---|---|---|",
        "| causal | 128 | 2 | gluon | 1.10 (1.00) | 1.08 (0.90) | 1.04 (0.90) | 1.50 (1.50) | 1 |",
        "| sliding 256 | 64 | 1 | triton | 1.20 (1.20) | – | 1.20 (1.20) | 0.80 (0.80) | 0 |",
        "| full | 192/128 | 1 | gluon | – | – | 0.00 (0.00) | – | 1 |",
    ]
    text = "\n".join(lines)
    assert "Below 0.95x the better of the two: full D 0.000; causal B 0.900." in text, "no time of ours counts as 0"
    assert "Without a time: cudnn at 1 points (failed: RuntimeError: no); ours at 1 points" in text
    assert "largest relative error against float32 is 2.1e-03; at the longest points" in text
    assert "The run ended with 4 of its 5 points measured." in text and "commit 0123456789ab." in text


def test_the_terminal_says_by_class_what_is_slow_and_what_to_choose() -> None:
    text = report_sweep.summary(_document())
    assert "2 of 4 points below 0.95x the better of FlashAttention-3 and cuDNN:\n  0.000 D\n  0.900 B" in text
    (causal,) = [line for line in text.splitlines() if line.startswith("causal")]
    assert causal.split()[-7:] == ["2", "1.10", "1.08", "1.50", "1.04", "0.900", "LOW"]
    assert "1 points not reached" in text
    table = report_sweep.choices(_document())
    assert "ours 0.949 (0.900) 1/2, cudnn 0.877 (0.769) 1/2, portable 0.632 (0.600) 0/2" in table
    assert "B                                          cudnn 900.0 us; ours (gluon) 1.111x as long" in table
    assert "C                                          portable 400.0 us; ours (triton) 1.250x as long" in table
    assert "D                                          cudnn 2000.0 us; ours (gluon) no time" in table


def test_readme_and_plot_follow_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs the extra bench")
    readme, results = tmp_path / "README.md", tmp_path / "results"
    results.mkdir()
    (results / "dense.json").write_text((ROOT / report.RESULTS / "dense.json").read_text())
    begin, end = report_sweep.MARKERS
    readme.write_text(f"{report.BEGIN}\n{report.END}\n{begin}\n{end}\n")
    where = ["--readme", str(readme), "--results", str(results)]
    assert report.main(where) == 0
    assert f"{begin}\n{end}\n" in readme.read_text() and not (results / "sweep.svg").exists(), "there is no data yet"
    (results / "sweep.json").write_text(json.dumps(_document()))
    assert report.main(["--check", *where]) == 1
    assert "sweep.svg: missing" in capsys.readouterr().err
    assert report.main(where) == 0 and report.main(["--check", *where]) == 0
    assert "](results/sweep.svg)" in readme.read_text()
    plot = (results / "sweep.svg").read_text()
    assert all(f">{mask}</text>" in plot for mask in report_sweep.MASKS) and "D 192/128" in plot
    assert report.main(where) == 0 and (results / "sweep.svg").read_text() == plot
    assert sweep.main(["--show", str(results / "sweep.json")]) == 0
    shown = capsys.readouterr().out
    assert "0.900 LOW us: ours 1000.0, fa3 1000.0, cudnn 900.0" in shown and "choices:" in shown
