"""How the compiler lowers attention.

Passes that rewrite form ops to grouped ops, and lowerings that turn those into Triton templates.

This is the only package that touches Inductor's private API, behind ``inductor_passes.compat``. Importing it is
cheap; Inductor is loaded when something is compiled.
"""

from __future__ import annotations

from typing import Any

from inductor_passes import decisions

__all__ = ["LIBRARY_OPTION", "compile_with_passes", "decisions"]

LIBRARY_OPTION = "library_kernels"
"""The one option of our own in ``torch.compile(..., options=)``.

False leaves out kernels that Inductor cannot fuse into: a library's, and the Hopper one of paged attention.
"""


def compile_with_passes(gm: Any, example_inputs: Any, **keywords: Any) -> Any:
    """Compile an FX graph with Inductor and our passes; see ``inductor_passes.compile.compile_with_passes``."""
    from inductor_passes.compile import compile_with_passes as compile_now

    return compile_now(gm, example_inputs, **keywords)
