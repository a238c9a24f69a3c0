"""Random steps of compiled attention over pages, beside dense attention; and the soak notices what is wrong."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest
import torch

from tools.serve import soak
from tools.serve.dense import DenseStep, MaskRules, dense_attention
from tools.serve.population import Part, Population
from tools.serve.soak import CAUSAL, Soak, SoakResult, SoakSettings, diffusion_rules
from tools.serve.step import StepTensors

SMALL = SoakSettings(
    torch.device("cpu"), torch.float32, heads=4, kv_heads=2, head_dim=16, page_size=4, max_tokens=48,
    buckets=((8, 8), (48, 8)), reference_every=4, replay_every=3,
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_trace_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest keeps all that torch traces of every compiled call: 70 ms a step, seven times the step itself."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)


def settings(**changes: object) -> SoakSettings:
    return SoakSettings(**{**vars(SMALL), **changes})  # type: ignore[arg-type]


def run(chosen: SoakSettings, steps: int) -> SoakResult:
    torch.compiler.reset()
    found = Soak(chosen)
    found.warm_up()
    return found.run(steps)


def assert_right(result: SoakResult, steps: int) -> None:
    assert result.problems == []
    assert result.steps == steps and result.replays >= steps // 3
    assert 0 < result.worst <= 1 and 0 < result.worst_reference <= 1


def test_causal_steps() -> None:
    """Prefill, chunked prefill and decode in any mix, new keys read directly or from the cache."""
    result = run(SMALL, 200)
    assert_right(result, 200)
    assert set(result.kinds) == {"prefill", "chunked prefill", "decode", "with no new token"}
    assert min(result.kinds.values()) > 20


def test_sliding_window_in_half_precision() -> None:
    assert_right(run(settings(rules=(MaskRules(window=7),), dtype=torch.bfloat16), 40), 40)


def test_block_diffusion_steps() -> None:
    """Every mode, with random valid lengths, prefixes and stored tokens, with and without the hole."""
    result = run(settings(rules=diffusion_rules(), new_keys_in_cache=(False,), buckets=((48, 8),)), 150)
    assert_right(result, 150)


@pytest.mark.slow
@pytest.mark.parametrize("diffusion", [False, True])
def test_a_thousand_steps(diffusion: bool) -> None:
    rules = diffusion_rules(8) if diffusion else (CAUSAL,)
    chosen = settings(rules=rules, seed=9, max_tokens=160, buckets=((16, 16), (128, 16)), replay_every=1)
    assert_right(run(chosen, 1000), 1000)


# ---------------------------------------------------------------------- what the soak notices


def eager(monkeypatch: pytest.MonkeyPatch, **changes: object) -> Soak:
    """A soak whose served model is not compiled: quick to make."""
    monkeypatch.setattr(torch, "compile", lambda model, **keywords: model)
    found = Soak(settings(**changes))
    found.warm_up()
    return found


def test_a_key_too_few_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = eager(monkeypatch, reference_every=0, replay_every=0)
    served = found._run

    def tampered(model, graph):  # type: ignore[no-untyped-def]
        metadata = found.metadata[graph]
        kept = metadata.context_lens.clone()
        metadata.context_lens.sub_(1).clamp_(min=0)
        out = served(model, graph)
        metadata.context_lens.copy_(kept)
        return out

    monkeypatch.setattr(found, "_run", tampered)
    problems = found.run(20).problems
    assert problems and all("times what is allowed" in line for line in problems)


def test_reading_a_page_that_nobody_wrote_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    fill = Population.fill

    def tampered(self: Population, tensors: StepTensors, parts: Sequence[Part]) -> None:
        fill(self, tensors, parts)
        free = next(page for page in range(self.cache.pages) if page not in self.allocator.taken)
        tensors.on_device["page_tables"][:, 0] = free

    found = eager(monkeypatch, reference_every=0, replay_every=0)
    monkeypatch.setattr(Population, "fill", tampered)
    problems = found.run(20).problems
    assert problems and "error nan times what is allowed" in problems[0]


def test_bits_that_depend_on_the_pages_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = eager(monkeypatch, reference_every=0, replay_every=1)
    served = found._run

    def tampered(model, graph):  # type: ignore[no-untyped-def]
        out = served(model, graph)
        return out + 1e-9 * (found.metadata[graph].page_tables[:, 0].sum() % 7) * (out != 0)

    monkeypatch.setattr(found, "_run", tampered)
    assert any("other bits after the pages changed places" in line for line in found.run(20).problems)


def test_values_in_rows_that_see_nothing_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = eager(monkeypatch, reference_every=0, replay_every=0)
    served = found._run
    monkeypatch.setattr(found, "_run", lambda model, graph: served(model, graph).add_(1e-12))
    assert any("are not 0 in rows that see nothing" in line for line in found.run(5).problems)


def test_dense_attention_is_attention() -> None:
    """One causal request in one step, beside torch's own attention; a row that is not valid stays 0."""
    q, k, v = (torch.randn(6, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    history = torch.zeros(2, 1, 16, 2, 8, dtype=torch.float64)
    step = DenseStep([0], [6], [0], [5], [0], [0], [0], [0], [[]], CAUSAL)
    found = dense_attention(q, k, v, *history, step, 0.5)
    heads_first = [t[None, :5].transpose(1, 2) for t in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *heads_first, is_causal=True, scale=0.5, enable_gqa=True
    )
    torch.testing.assert_close(found[:5], expected[0].transpose(0, 1))
    assert not found[5:].any()


def test_command_reports_what_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, **keywords: model)
    arguments = ["--steps", "4", "--head-dim", "16"]
    assert soak.main(arguments) == 0
    assert "all outputs right, all replays bitwise equal" in capsys.readouterr().out
    monkeypatch.setattr(soak, "ERROR_RATIO", 0.0)
    monkeypatch.setattr(soak, "FLOOR_UNITS", 0.0)
    assert soak.main(arguments) == 1
    assert "something is wrong" in capsys.readouterr().out
