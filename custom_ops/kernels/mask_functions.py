"""Masks as Triton device functions: the text printed from the mask's expression, made callable from kernels.

The compiler's templates paste the same text, so a mask has one Triton spelling in eager, interpreted and generated
code.
"""

from __future__ import annotations

import functools
import linecache
from typing import Any, NamedTuple

import sympy
import triton
import triton.language as tl

from custom_ops.mask_printing import triton_source
from custom_ops.masks import Mask


class MaskFunctions(NamedTuple):
    """Device functions of one mask; see ``custom_ops.mask_printing.triton_source`` for their arguments."""

    visible: Any
    key_visible: Any
    bounds: Any


@functools.cache
def mask_functions(mask: Mask) -> MaskFunctions:
    """``mask``'s device functions. Masks are few (a form, with or without padding), so they are kept for good."""
    operands = "_".join(o.name for o in mask.operands) or "none"
    filename = f"<lowered_attn mask {mask.name} of {operands}>"
    source = "import triton\nimport triton.language as tl\n\n\n" + decorated_source(mask)
    # Triton reads a function's text through inspect, which finds it here.
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    scope: dict[str, Any] = {"triton": triton, "tl": tl, "__name__": "custom_ops.kernels.generated"}
    exec(compile(source, filename, "exec"), scope)
    return MaskFunctions(*(scope[f"{mask.name}_{part}"] for part in MaskFunctions._fields))


def decorated_source(mask: Mask) -> str:
    """``triton_source(mask)`` with each function under ``@triton.jit``."""
    return triton_source(mask).replace("def ", "@triton.jit\ndef ")


def reads_keys(mask: Mask) -> bool:
    """Whether the mask has a per-key predicate, which is then applied to every tile."""
    return mask.per_key != sympy.true
