"""The demo's model is causal and really learns; its checks catch a model that differs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tools.demo import ByteModel, Comparison, DemoSettings, compare, load_text, main, run_demo, sample_batch

SMALL = DemoSettings(dim=32, n_heads=2, window=8, segment=4, lookback=2, seq_len=32, batch=4, steps=30)


def test_demo_learns_and_agrees_with_the_reference(capsys: pytest.CaptureFixture[str]) -> None:
    result = run_demo(SMALL, torch.device("cpu"))
    assert all(math.isfinite(loss) for loss in result.losses)
    assert result.losses[0] == pytest.approx(math.log(256), abs=0.7)  # before training: about a uniform guess
    assert sum(result.losses[-5:]) / 5 < result.losses[0] - 1.0
    assert [c.what for c in result.comparisons[:2]] == ["loss", "logits"]
    assert [c for c in result.comparisons if not c.within] == []
    for form in ("full_self", "sliding_self", "segment_cross"):
        assert form in result.explanation
    printed = capsys.readouterr().out
    assert "tokens/s" in printed
    assert "TOO FAR" not in printed


@pytest.mark.parametrize("backend", ["lowered", "sdpa", "flex", "reference"])
def test_no_token_sees_the_future(backend: str) -> None:
    """Other bytes from position 19 on (inside a segment) leave every logit before it as it was."""
    settings = SMALL
    model = ByteModel(settings, backend).requires_grad_(False)
    tokens, targets = sample_batch(load_text(), settings, torch.device("cpu"))
    changed = tokens.clone()
    changed[:, 19:] = (changed[:, 19:] + 1) % 256
    _, logits = model(tokens, targets)
    _, logits_changed = model(changed, targets)
    torch.testing.assert_close(logits_changed[:, :19], logits[:, :19])
    assert not torch.allclose(logits_changed[:, 19:], logits[:, 19:])


def test_comparison_catches_a_difference() -> None:
    """A model with another window is not within the tolerance, in the logits and in the gradients."""
    model = ByteModel(SMALL)
    other = ByteModel(replace(SMALL, window=SMALL.window + 1))
    other.load_state_dict(model.state_dict())
    batch = sample_batch(load_text(), SMALL, torch.device("cpu"))
    found = {c.what: c.within for c in compare(other, other, SMALL, batch)}
    assert not found["logits"]
    assert not found["gradient of embedding.weight"]
    assert all(c.within for c in compare(model, model, SMALL, batch))


def test_nan_is_never_within_the_tolerance() -> None:
    assert not Comparison("loss", compiled=math.nan, reference=0.0, tolerance=1.0).within


def test_sequence_length_must_be_whole_segments() -> None:
    with pytest.raises(ValueError, match="seq_len: expected a multiple of segment=4, got 30"):
        ByteModel(DemoSettings(seq_len=30, segment=4))


def test_main_reports_failure_when_nothing_was_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exit status tells scripts what the last line tells people."""
    from tools import demo

    bad = Comparison("loss", compiled=1.0, reference=0.0, tolerance=0.1)
    good = Comparison("loss", compiled=0.0, reference=0.0, tolerance=0.1)
    for losses, comparison, status in ([5.0, 4.0], good, 0), ([5.0, 6.0], good, 1), ([5.0, 4.0], bad, 1):
        result = demo.DemoResult(losses, [comparison], "")
        monkeypatch.setattr(demo, "run_demo", lambda settings, device, result=result: result)
        assert main(["--device", "cpu"]) == status
