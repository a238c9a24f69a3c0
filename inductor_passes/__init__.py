"""How the compiler lowers attention.

Passes that rewrite form ops to grouped ops, and lowerings that turn those into Triton templates.

This is the only package that touches Inductor's private API, behind ``inductor_passes.compat``. Importing it is
cheap; Inductor is loaded when something is compiled.
"""

from __future__ import annotations

from typing import Any

from inductor_passes import decisions

__all__ = [
    "BLOCK_MASKS_OPTION",
    "CHOSEN",
    "EPILOGUES_OPTION",
    "LIBRARY_OPTION",
    "QUERIES_OPTION",
    "RECOGNISE_OPTION",
    "compile_with_passes",
    "decisions",
    "package_with_passes",
]

BLOCK_MASKS_OPTION = "trust_block_masks"
"""An option of our own in ``torch.compile(..., options=)``, False by default.

True says that FlexAttention's BlockMasks that come from outside of the compiled code are made by ``create_block_mask``
of the ``mask_mod`` that they carry, which nothing in the graph can prove.
"""

CHOSEN = "lowered_attn.backend"
"""Key of ``torch.fx.traceback.annotate`` for code that was chosen by name: no spelling is recognised in it."""
LIBRARY_OPTION = "library_kernels"
"""An option of our own in ``torch.compile(..., options=)``, True by default.

False leaves out kernels that Inductor cannot fuse into: a library's, and the Hopper ones of forms and paged attention.
"""
EPILOGUES_OPTION = "hopper_epilogues"
"""An option of our own in ``torch.compile(..., options=)``, True by default.

True computes what follows attention elementwise, such as a sigmoid gate or a residual, in the forms' Hopper kernel;
False leaves it to a kernel of Inductor's.
"""
QUERIES_OPTION = "compute_queries"
"""An option of our own in ``torch.compile(..., options=)``, False by default.

True computes in the attention kernel what makes its queries, elementwise, where registers allow. Off: a whole
decoding step on an H200 took 3.496 ms with it and 3.498 without. A query that was computed lies in registers, where
Hopper's matrix instructions read shared memory otherwise.
"""
RECOGNISE_OPTION = "recognise"
"""An option of our own, True by default.

False leaves attention that the user wrote without our ops, such as ``scaled_dot_product_attention``, as it is.
"""


def compile_with_passes(gm: Any, example_inputs: Any, **keywords: Any) -> Any:
    """Compile an FX graph with Inductor and our passes; see ``inductor_passes.compile.compile_with_passes``."""
    from inductor_passes.compile import compile_with_passes as compile_now

    return compile_now(gm, example_inputs, **keywords)


def package_with_passes(program: Any, path: Any, options: Any) -> Any:
    """Package an exported program with AOTInductor and our passes; see ``inductor_passes.package``."""
    from inductor_passes.package import package_with_passes as package_now

    return package_now(program, path, options)
