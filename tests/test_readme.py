"""The README's Python blocks run as they stand, each in its own process; CONTRIBUTING's examples work too."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def blocks(text: str, language: str) -> list[tuple[int, str]]:
    """Return (line number, code) of each fenced block in that language, in a list item or not."""
    pattern = re.compile(rf"^( *)```{language}\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, m.start()) + 1, textwrap.dedent(m[2])) for m in pattern.finditer(text)]


def run(block: str) -> str:
    """Run a block in a fresh process, where no test has imported anything; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"
    return done.stdout


# Appended to the form of CONTRIBUTING: the op against the reference, and its bounds as the page shows them.
USE_FORM = """
import torch
from custom_ops.forms import FORMS
from custom_ops.reference import reference_attention

FORMS[FORM.name] = FORM
q, k, v = (torch.randn(2, 4, 40, 16, requires_grad=True) for _ in range(3))
out, lse = torch.ops.lowered_attn.local_blocks(q, k, v, 8)
(out.sum() + lse.sum()).backward()
exact, _ = reference_attention(q, k, v, FORM, {"block": 8})
torch.testing.assert_close(out, exact)
inside = torch.block_diag(*[torch.ones(8, 8)] * 5).tril().bool()
torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=inside))
print(MASK.tile_bounds())
"""
# Appended to the backend of CONTRIBUTING: what it runs, and what it refuses.
USE_BACKEND = """
import torch
from custom_ops.forms import FORMS
from custom_ops.reference import reference_attention

full, sliding = FORMS["full_self"], FORMS["sliding_self"]
q, k, v = (torch.randn(2, 4, 40, 16) for _ in range(3))
assert unsupported_reasons(full, q, k, v, {"key_padding": None}) == []
torch.testing.assert_close(run(full, q, k, v, {}), reference_attention(q, k, v, full, {})[0])
print(unsupported_reasons(sliding, q, k, v, {"window": 4}))
print(unsupported_reasons(full, q, k, v, {"key_padding": torch.zeros(2, 40, dtype=torch.bool)}))
"""

USAGE, *OTHERS = blocks(README, "python")


def test_usage_example_says_what_was_lowered() -> None:
    printed = run(USAGE[1])
    assert "sliding_self" in printed
    assert "full_self" in printed


@pytest.mark.parametrize("block", [pytest.param(text, id=f"line_{line}") for line, text in OTHERS])
def test_python_block_runs(block: str) -> None:
    run(block)


def test_form_example_of_contributing() -> None:
    (_, form), _ = blocks(CONTRIBUTING, "python")
    assert run(form + USE_FORM).strip() in CONTRIBUTING


def test_backend_example_of_contributing() -> None:
    _, (_, backend) = blocks(CONTRIBUTING, "python")
    assert "takes no mask" in (printed := run(backend + USE_BACKEND))
    assert "takes no key_padding" in printed


def test_make_targets_exist() -> None:
    """Every `make` target that README or CONTRIBUTING names is one of the Makefile's."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z]+)", "".join(text for _, text in blocks(README + CONTRIBUTING, "sh"))))
    assert named
    assert named <= targets


def test_tools_exist() -> None:
    """Every `python -m tools.x` that README or CONTRIBUTING names is a file."""
    for name in set(re.findall(r"python -m tools\.([a-z_]+)", README + CONTRIBUTING)):
        assert (ROOT / "tools" / f"{name}.py").exists() or (ROOT / "tools" / name / "__main__.py").exists(), name


def test_results_markers_are_in_place() -> None:
    """tools.report fills what stands between these two lines."""
    begin, end = README.index("<!-- results:begin -->"), README.index("<!-- results:end -->")
    assert begin < end
