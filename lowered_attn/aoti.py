"""Ahead of time: an exported program as a package that runs without compiling."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import IO, Any

import torch

from inductor_passes import package_with_passes
from lowered_attn.checks import fail


def aoti_compile_and_package(
    exported_program: torch.export.ExportedProgram,
    *,
    package_path: str | os.PathLike[str] | IO[bytes] | None = None,
    inductor_configs: Mapping[str, Any] | None = None,
) -> str | IO[bytes]:
    """Compile with AOTInductor, attention lowered as `torch.compile(..., backend="lowered_attn")` lowers it.

    In place of `torch._inductor.aoti_compile_and_package`, with its arguments: `exported_program` comes from
    `torch.export.export` and stays as it is; `package_path` ends in ".pt2", or is a file that can be written and
    sought, or None for a path in Inductor's cache; `inductor_configs` holds Inductor's options, and our own:
    `recognise`, `library_kernels` and `compute_queries`. Returns `package_path`, or the path that was chosen.

    Form ops become grouped kernels; attention that is written without them is recognised in the exported graph first,
    but for FlexAttention, whose block masks cannot be read there; stores and paged attention are lowered, and one tile
    schedule serves all layers. `inductor_passes.decisions.recording` keeps what was decided. Sizes are static unless
    the export's `dynamic_shapes` say otherwise. A package is for inference: nothing in it has a backward.

    `torch._inductor.aoti_load_package` loads it. What is not compiled into a package is called as an op, so the
    process that loads it imports `lowered_attn` (or `custom_ops`) first: on a CPU for all but plain attention, on CUDA
    for the tile schedule of paged attention and wherever no Triton template was taken.

    ValueError for what is no exported program, for one without example inputs, and for a path without ".pt2".
    """
    where = "aoti_compile_and_package"
    if not isinstance(exported_program, torch.export.ExportedProgram):
        got = type(exported_program).__name__
        fail(where, "exported_program", "an ExportedProgram", got, "pass torch.export.export(model, inputs)")
    if exported_program.example_inputs is None:
        remedy = "export it again, or set its example_inputs: (arguments, keywords)"
        fail(where, "exported_program", "example inputs, which shapes come from", None, remedy)
    path = os.fspath(package_path) if isinstance(package_path, os.PathLike) else package_path
    if isinstance(path, str) and not path.endswith(".pt2"):
        fail(where, "package_path", 'a path that ends in ".pt2"', repr(path), "add the ending")
    return package_with_passes(exported_program, path, inductor_configs or {})
