"""`import lowered_attn` refuses a `custom_ops` or `inductor_passes` that was not installed with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SIBLINGS = ("custom_ops", "inductor_passes")


def run_import(folder: Path, path: list[Path], *flags: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """Import lowered_attn in a fresh process with `path` as PYTHONPATH; `folder` is the working directory."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, *flags, "-c", f"{before}\nimport lowered_attn\nprint(lowered_attn.__file__)"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def make_stranger(folder: Path, name: str, kind: str) -> Path:
    """Write somebody else's `name` into `folder`, as a package or a module; return its path."""
    if kind == "module":
        found = folder / f"{name}.py"
        found.write_text("")
        return found
    found = folder / name
    found.mkdir()
    (found / "__init__.py").write_text("")
    return found


@pytest.mark.parametrize("kind", ["package", "module"])
@pytest.mark.parametrize("name", SIBLINGS)
def test_a_stranger_earlier_on_the_path_is_refused(tmp_path: Path, name: str, kind: str) -> None:
    found = make_stranger(tmp_path, name, kind)
    result = run_import(tmp_path, [tmp_path, ROOT])
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert str(found) in last and str(ROOT / name) in last


def test_a_stranger_that_is_already_imported_is_refused(tmp_path: Path) -> None:
    before = "import sys, types; sys.modules['custom_ops'] = types.ModuleType('custom_ops')"
    result = run_import(tmp_path, [ROOT], before=before)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert "sys.modules['custom_ops']" in last and str(ROOT / "custom_ops") in last


def test_a_missing_sibling_is_named(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "lowered_attn", tmp_path / "lowered_attn")
    # -S leaves out site-packages, where an editable install would still find the sibling.
    result = run_import(tmp_path, [tmp_path], "-S")
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert str(tmp_path / "custom_ops") in last and "got nothing" in last


def test_our_own_siblings_are_accepted_wherever_they_are_installed(tmp_path: Path) -> None:
    site, later = tmp_path / "site", tmp_path / "later"
    later.mkdir()
    for name in ("lowered_attn", *SIBLINGS):
        shutil.copytree(ROOT / name, site / name)
    for name in SIBLINGS:
        make_stranger(later, name, "package")
    result = run_import(tmp_path, [site, later])
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(site / "lowered_attn" / "__init__.py")
