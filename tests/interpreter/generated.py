"""Run what Inductor generated, in Triton's interpreter. The code comes from a process of its own: here nothing can be
compiled."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

DECORATOR = re.compile(r"@triton_heuristics\.\w+\(.*?\n\)\n(?=@triton\.jit)", re.DOTALL)
"""Inductor's autotuner, which asks for a GPU."""


def sources_of(module: str, folder: pathlib.Path) -> dict[str, Any]:
    """What ``python -m module folder`` writes there."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = pathlib.Path(__file__).parents[2]
    subprocess.run([sys.executable, "-m", module, str(folder)], check=True, cwd=root, env=environment)
    return json.loads((folder / "sources.json").read_text())


def kernel(source: str, path: pathlib.Path) -> Any:
    """The kernel of a generated module, interpreted; Triton reads its source from ``path``."""
    source = DECORATOR.sub("", source).replace("triton_helpers.set_driver_to_gpu()", "")
    path.write_text(source.replace("libdevice.rsqrt", "tl.rsqrt"))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (name,) = re.findall(r"^def (triton_(?:per|red|tem)_\w+)\(", source, re.MULTILINE)
    return getattr(module, name)
