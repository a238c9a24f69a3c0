"""`torch.compile(model, backend="lowered_attn")`: entry point, modes, training, shapes, caches, other passes."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lowered_attn
from inductor_passes import compat, decisions
from inductor_passes.graph_pass import GraphPass

OPS = torch.ops.lowered_attn


def gated(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """Causal attention, heads merged, times a gate: what a layer does with the op."""
    out, _ = OPS.full_self(q, k, v)
    return out.transpose(1, 2).flatten(2) * torch.sigmoid(gate)


def gated_by_sdpa(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(2) * torch.sigmoid(gate)


def inputs(length: int, batch: int = 2, requires_grad: bool = False) -> tuple[Tensor, ...]:
    q, k, v = (torch.randn(batch, heads, length, 16, requires_grad=requires_grad) for heads in (4, 2, 2))
    return q, k, v, torch.randn(batch, length, 64, requires_grad=requires_grad)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("mode", [None, "default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes_compute_the_same(mode: str | None) -> None:
    arguments = inputs(33)
    compiled = torch.compile(gated, backend="lowered_attn", mode=mode, fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), gated_by_sdpa(*arguments))


def test_unknown_mode_and_keyword_are_errors() -> None:
    with pytest.raises(Exception, match="no-such-mode"):
        torch.compile(gated, backend="lowered_attn", mode="no-such-mode")(*inputs(8))
    with pytest.raises(TypeError, match="expected mode and options, got also .'colour'"):
        lowered_attn.compile.backend(None, [], colour="red")  # type: ignore[attr-defined]


def test_training_gives_the_gradients_of_sdpa() -> None:
    arguments = inputs(40, requires_grad=True)
    weight = torch.randn(2, 40, 64)
    compiled = torch.compile(gated, backend="lowered_attn", fullgraph=True)
    ours = torch.autograd.grad((compiled(*arguments) * weight).sum(), arguments)
    theirs = torch.autograd.grad((gated_by_sdpa(*arguments) * weight).sum(), arguments)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize(("value_heads", "value_dim"), [(1, 16), (2, 40)])
def test_values_that_heads_share_are_not_for_torchs_kernel(value_heads: int, value_dim: int) -> None:
    """torch's CPU kernel wants a value head a KV head: even where all else fits it, the chunked path runs."""
    q, k, v = (
        torch.randn(2, heads, 33, dim, requires_grad=True)
        for heads, dim in ((4, 16), (4, 16), (value_heads, value_dim))
    )
    gate = torch.randn(2, 33, 4 * value_dim)
    with decisions.recording() as log:
        out = torch.compile(gated, backend="lowered_attn", fullgraph=True)(q, k, v, gate)
    grouped, lowered = log.records
    assert grouped.detail.endswith(f"share {value_heads} value head{'s' if value_heads == 2 else ''}")
    assert lowered.facts["kernel"] == "cpu_chunks" and "values that KV heads share" in lowered.detail
    expected = gated(q, k, v, gate)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    ours, theirs = (torch.autograd.grad((o * weight).sum(), (q, k, v)) for o in (out, expected))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_a_soft_cap_is_not_for_torchs_kernel() -> None:
    """Even where all else fits it: torch's CPU kernel has none."""

    def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return OPS.full_self(q, k, v, softcap=2.0)[0]

    arguments = inputs(33, requires_grad=True)[:3]
    with decisions.recording() as log:
        out = torch.compile(capped, backend="lowered_attn", fullgraph=True)(*arguments)
    grouped, lowered = log.records
    assert grouped.detail.endswith("2 query heads each, scores capped at 2")
    assert lowered.facts["kernel"] == "cpu_chunks" and lowered.detail.startswith("explicit scores, capped")
    expected = capped(*arguments)
    torch.testing.assert_close(out, expected)
    assert (expected - OPS.full_self(*arguments)[0]).abs().max() > 0.01
    ours, theirs = (torch.autograd.grad(o.square().sum(), arguments) for o in (out, expected))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_backward_does_not_run_the_forward_again() -> None:
    """The forward's out and lse are saved, not recomputed: each graph holds one attention op."""
    with decisions.recording() as log:
        torch.compile(gated, backend="lowered_attn", fullgraph=True)(*inputs(24, requires_grad=True)).sum().backward()
    assert [d.stage for d in log.records].count("grouped") == 1


def test_options_reach_inductor_and_global_config_stays() -> None:
    before = compat.config.get_config_copy()
    torch.compile(gated, backend="lowered_attn", options={"epilogue_fusion": False})(*inputs(16))
    after = compat.config.get_config_copy()
    assert before == after
    with pytest.raises(Exception, match="no_such_option"):
        torch.compile(gated, backend="lowered_attn", options={"no_such_option": 1})(*inputs(17))


def test_a_user_pass_in_the_same_hook_runs_after_ours() -> None:
    seen: list[bool] = []

    class Users(GraphPass):
        def rewrite(self, graph: torch.fx.Graph) -> int:
            seen.append(bool(graph.find_nodes(op="call_function", target=OPS.grouped_attention.default)))
            return 0

    torch.compile(gated, backend="lowered_attn", options={"post_grad_custom_pre_pass": Users()})(*inputs(19))
    assert seen == [True]


def test_fifty_random_shapes_compile_twice_at_most() -> None:
    """With dynamic=True: the first shape, at most one more, and never again; no graph break (fullgraph)."""
    compiles = 0

    def counting(gm: torch.fx.GraphModule, example_inputs: list, **keywords: object) -> object:
        nonlocal compiles
        compiles += 1
        return lowered_attn.compile.backend(gm, example_inputs, **keywords)  # type: ignore[attr-defined]

    def layer(q: Tensor, k: Tensor, v: Tensor, segments: Tensor, padding: Tensor) -> Tensor:
        full, _ = OPS.full_self(q, k, v)
        sliding, _ = OPS.sliding_self(q, k, v, 5, padding)
        cross, lse = OPS.segment_cross(q, k, v, segments, 1)
        return (full + sliding + cross) * torch.isfinite(lse)[..., None]

    compiled = torch.compile(layer, backend=counting, dynamic=True, fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    counts = []
    for _ in range(50):
        batch, length = (int(torch.randint(2, high, (), generator=generator)) for high in (5, 200))
        q, k, v, _ = inputs(length, batch)
        segments = torch.randint(-1, length, (batch, length), generator=generator)
        padding = torch.rand(batch, length, generator=generator) < 0.2
        torch.testing.assert_close(
            compiled(q, k, v, segments, padding), layer(q, k, v, segments, padding), rtol=1e-4, atol=1e-5
        )
        counts.append(compiles)
    assert counts[-1] == counts[1] <= 2, counts


def test_only_form_ops_are_grouped() -> None:
    """A near miss: torch's own attention beside ours stays torch's where nobody asked to recognise it."""

    def both(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return gated(q, k, v, gate) + gated_by_sdpa(q, k, v, gate)

    arguments = inputs(21)
    with decisions.recording() as log:
        options = {"force_disable_caches": True, "recognise": False}
        out = torch.compile(both, backend="lowered_attn", options=options)(*arguments)
    torch.testing.assert_close(out, 2 * gated_by_sdpa(*arguments))
    assert [d.stage for d in log.records] == ["grouped", "refused", "lowered"]
    (name, before, after) = log.graphs[0]
    assert name == "GroupForms"
    assert before.count("lowered_attn.full_self") == 1 and "grouped_attention" not in before
    assert after.count("lowered_attn.grouped_attention") == 1 and "lowered_attn.full_self" not in after


@pytest.mark.parametrize(
    ("call", "kernel"),
    [
        (lambda q, k, v: OPS.full_self(q, k, v)[0], "cpu_flash"),
        (lambda q, k, v: OPS.full_self(q, k, v[..., :8])[0], "cpu_chunks"),
        (lambda q, k, v: OPS.sliding_self(q, k, v, 4)[0], "cpu_chunks"),
        (lambda q, k, v: OPS.full_self(q, k, v, q_start=torch.ones(2, dtype=torch.int32))[0], "cpu_chunks"),
    ],
)
def test_cpu_lowering(call: object, kernel: str) -> None:
    """Plain causal attention becomes torch's own op, so it costs what SDPA costs; the rest keeps the CPU path."""
    q, k, v, _ = inputs(18)
    with decisions.recording() as log:
        out = torch.compile(call, backend="lowered_attn", options={"force_disable_caches": True})(q, k, v)
    torch.testing.assert_close(out, call(q, k, v))  # type: ignore[operator]
    assert [d.facts["kernel"] for d in log.records if d.stage == "lowered"] == [kernel]


def test_empty_inputs_compile() -> None:
    q, k, v, gate = inputs(0)
    assert torch.compile(gated, backend="lowered_attn")(q, k, v, gate).shape == (2, 0, 64)


def test_lse_is_an_output_under_compile() -> None:
    q, k, v, _ = inputs(23)
    compiled = torch.compile(lambda q, k, v: OPS.full_self(q, k, v), backend="lowered_attn", fullgraph=True)
    for mine, eager in zip(compiled(q, k, v), OPS.full_self(q, k, v), strict=True):
        torch.testing.assert_close(mine, eager)
        assert mine.shape == eager.shape


# ---------------------------------------------------------------------- fresh processes

FRESH = """
import json, sys, torch

def attend(q, k, v, gate):
    out, lse = torch.ops.lowered_attn.sliding_self(q, k, v, 8)
    return out.transpose(1, 2).flatten(2) * torch.sigmoid(gate)

{body}
torch.manual_seed(0)
q, k, v = (torch.randn(2, 4, 32, 16, requires_grad=True) for _ in range(3))
torch.compile(model, backend="lowered_attn", fullgraph=True)(q, k, v, torch.randn(2, 32, 64)).sum().backward()
from torch._dynamo.utils import counters
print(json.dumps({{
    "fx_hit": counters["inductor"]["fxgraph_cache_hit"], "fx_miss": counters["inductor"]["fxgraph_cache_miss"],
    "aot_hit": counters["aot_autograd"]["autograd_cache_hit"],
    "aot_miss": counters["aot_autograd"]["autograd_cache_miss"],
    "grad": q.grad.sum().item(),
}}))
"""

PLAIN_MODEL = """
def model(q, k, v, gate):
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.transpose(1, 2).flatten(2) * torch.sigmoid(gate)
"""


def run_fresh(body: str, cache: pathlib.Path) -> dict:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
    script = textwrap.dedent(FRESH).format(body=body)
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_entry_point_needs_no_import(tmp_path: pathlib.Path) -> None:
    """A fresh process that never imports the package compiles with the backend's name alone."""
    assert run_fresh(PLAIN_MODEL, tmp_path)["fx_miss"] >= 1


@pytest.mark.slow
def test_second_process_hits_the_cache(tmp_path: pathlib.Path) -> None:
    body = "import lowered_attn\nmodel = attend"
    first, second = run_fresh(body, tmp_path), run_fresh(body, tmp_path)
    assert first["fx_hit"] == 0 and first["fx_miss"] >= 2, first
    assert second["fx_miss"] == 0 and second["aot_miss"] == 0, second
    assert second["fx_hit"] + second["aot_hit"] >= 1, second
    assert second["grad"] == first["grad"]
