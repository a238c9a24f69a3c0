"""Masks as Triton device functions: the text printed from the mask's expression, made callable from kernels.

The compiler's templates paste the same text, so a mask has one Triton spelling in eager, interpreted and generated
code.
"""

from __future__ import annotations

import functools
import linecache
import zlib
from typing import Any, NamedTuple

import sympy
import triton
import triton.language as tl

from custom_ops.mask_printing import interval_source, range_source, triton_source
from custom_ops.masks import Mask


class MaskFunctions(NamedTuple):
    """Device functions of one mask; see ``custom_ops.mask_printing.triton_source`` for their arguments."""

    visible: Any
    key_visible: Any
    bounds: Any


class HopperFunctions(NamedTuple):
    """Device functions of one mask in Gluon."""

    visible: Any
    key_visible: Any
    bounds: Any
    interval: Any
    """See ``custom_ops.mask_printing.interval_source``; None where the mask is not one interval."""


class PagedFunctions(NamedTuple):
    """Device functions of one paged mask; see ``custom_ops.mask_printing.range_source`` for their arguments."""

    range: Any
    visible: Any


@functools.cache
def mask_functions(mask: Mask) -> MaskFunctions:
    """``mask``'s device functions. Masks are few (a form, with or without padding), so they are kept for good."""
    scope = device_functions(mask.name, triton_source(mask), gluon=False)
    return MaskFunctions(*(scope[f"{mask.name}_{part}"] for part in MaskFunctions._fields))


@functools.cache
def hopper_functions(mask: Mask) -> HopperFunctions:
    """``mask``'s device functions for Gluon kernels; kept for good."""
    source = triton_source(mask, "gl")
    if mask.interval() is not None:
        source += f"\n\n{interval_source(mask, 'gl')}"
    scope = device_functions(mask.name, source, gluon=True)
    return HopperFunctions(*(scope.get(f"{mask.name}_{part}") for part in HopperFunctions._fields))


@functools.cache
def paged_functions(mask: Mask, gluon: bool = False) -> PagedFunctions:
    """A paged mask's device functions, for Triton kernels or for Gluon ones; kept for good."""
    scope = _run(mask.name, decorated_range_source(mask, gluon), _scope(gluon))
    return PagedFunctions(*(scope[f"{mask.name}_{part}"] for part in PagedFunctions._fields))


def decorated_source(mask: Mask) -> str:
    """``triton_source(mask)`` with each function under ``@triton.jit``."""
    return _decorated(triton_source(mask), gluon=False)


def decorated_range_source(mask: Mask, gluon: bool = False) -> str:
    """``range_source(mask)`` with each function under ``@triton.jit``, or in Gluon under ``@gluon.jit``."""
    return _decorated(range_source(mask, "gl" if gluon else "tl"), gluon)


def device_functions(name: str, functions: str, gluon: bool, **scope: Any) -> dict[str, Any]:
    """What ``functions``, the text of device functions in Gluon or in Triton, defines; ``name`` is for tracebacks.

    ``scope``: what they call, by name.
    """
    return _run(name, _decorated(functions, gluon), _scope(gluon) | scope)


def reads_keys(mask: Mask) -> bool:
    """Whether the mask has a per-key predicate, which is then applied to every tile."""
    return mask.per_key != sympy.true


def _decorated(functions: str, gluon: bool) -> str:
    return functions.replace("def ", f"@{'gluon' if gluon else 'triton'}.jit\ndef ")


def _scope(gluon: bool) -> dict[str, Any]:
    """What the text of device functions reads."""
    if gluon:
        from triton.experimental import gluon as gluon_module
        from triton.experimental.gluon import language as gl

        return {"gluon": gluon_module, "gl": gl}
    return {"triton": triton, "tl": tl}


def _run(name: str, functions: str, scope: dict[str, Any]) -> dict[str, Any]:
    """The names that ``functions``, the text of what is called ``name``, defines with those of ``scope`` imported."""
    gluon = "from triton.experimental import gluon\nfrom triton.experimental.gluon import language as gl\n"
    imports = gluon if "gluon" in scope else "import triton\nimport triton.language as tl\n"
    source = f"{imports}\n\n{functions}"
    # Triton reads a function's text through inspect, which finds it here: so each text has its own name, whatever the
    # masks are called.
    filename = f"<lowered_attn {name} {zlib.crc32(source.encode()):08x}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    scope = {**scope, "__name__": "custom_ops.kernels.generated"}
    exec(compile(source, filename, "exec"), scope)
    return scope
