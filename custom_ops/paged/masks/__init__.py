"""The masks of paged attention, one file a mode. A new mode is one file here plus one line below.

A strategy's own mode needs no change here: ``register_mode(PagedMode(...))`` makes it known by its name.

    >>> from custom_ops.masks import k, q
    >>> from custom_ops.paged.masks import BLOCK, PagedMode, end_of_block, paged_mask, register_mode
    >>> own_block = k >= end_of_block() - BLOCK.symbol
    >>> mode = register_mode(PagedMode("own_block", own_block & (k < end_of_block()), doc="the token's block alone"))
    >>> print(paged_mask("own_block", block_size=2).draw_text(4, 8, {"context": 4, "valid": 4}, q_start=4))
    ····██··
    ····██··
    ······██
    ······██
"""

from __future__ import annotations

import functools

from sympy.logic.boolalg import Boolean

from custom_ops.checks import fail
from custom_ops.mask_printing import range_source
from custom_ops.masks import Mask, Operand, k, q
from custom_ops.paged.masks.block_causal import MODE as BLOCK_CAUSAL
from custom_ops.paged.masks.cache_only import MODE as CACHE_ONLY
from custom_ops.paged.masks.causal import MODE as CAUSAL
from custom_ops.paged.masks.common import (
    BLOCK,
    CONTEXT,
    DECODING,
    FAR,
    MAX_EXTRAS,
    PADDED_PREFIX,
    PREFIX,
    STATUS,
    VALID,
    PagedMode,
    end_of_block,
    from_query,
    where,
)
from custom_ops.paged.masks.plain import MODE as PLAIN
from custom_ops.paged.masks.prefix_causal import MODE as PREFIX_CAUSAL
from custom_ops.paged.masks.prefix_full import MODE as PREFIX_FULL

MODES: dict[str, PagedMode] = {
    mode.name: mode for mode in (PLAIN, CAUSAL, BLOCK_CAUSAL, PREFIX_FULL, PREFIX_CAUSAL, CACHE_ONLY)
}
"""Every mode by its name, the registered ones included."""

HOLE_OPERANDS = (PREFIX, PADDED_PREFIX)
"""What the prefix hole reads. It hides cached keys only: ``prefix <= k < padded_prefix``, from the request's start."""

_OP = "paged_attention"


def register_mode(mode: PagedMode) -> PagedMode:
    """Make ``mode`` known by its name to every paged op of this process, and return it.

    Raises ValueError where the name is taken, and where kernels could not use the mode: it reads something unknown, or
    a later query may see fewer of the last keys, or more of the first, than an earlier one.
    """
    if mode.name in MODES:
        fail(_OP, "mode", "a new name", f"{mode.name!r}, which is taken", "rename the mode")
    range_source(_mask(mode, 2, None, False))
    MODES[mode.name] = mode
    return mode


def request_operand_names(mode: str, prefix_hole: bool = False) -> tuple[str, ...]:
    """The per-request values that ``mode`` reads besides context and valid, in the order of ``request_values``.

    Raises ValueError where there is no such mode.
    """
    return tuple(o.name for o in _extras(_mode(mode), prefix_hole))


def paged_mask(mode: str, *, block_size: int = 1, window: int | None = None, prefix_hole: bool = False) -> Mask:
    """The mask of a paged mode: query ``q`` of a request sees key ``k``, both counted from the request's start.

    The mode's expression with the block's size in it, for keys ``k < context + valid``. ``window``: a query also sees
    the ``window`` latest keys only, its own included (None or 0: no window). ``prefix_hole``: cached keys
    ``prefix <= k < padded_prefix`` are hidden. Its operands are all per-request: context, valid, and those of
    ``request_operand_names``. That rows past ``valid`` see nothing is left to who computes them.

    Raises ValueError where there is no such mode, the block is not positive or the window is negative.
    """
    found = _mode(mode)
    if block_size < 1:
        fail(_OP, "block_size", "at least 1", f"{block_size}", "it counts the tokens of a block")
    if window is not None and window < 0:
        fail(_OP, "window", "at least 1, or 0 for none", f"{window}", "it counts the keys that a query sees")
    return _mask(found, block_size if found.reads_block else 1, window or None, bool(prefix_hole))


def _mode(name: str) -> PagedMode:
    if name not in MODES:
        fail(_OP, "mode", f"one of {', '.join(MODES)}", repr(name), "use one of them, or register_mode your own")
    return MODES[name]


def _extras(mode: PagedMode, prefix_hole: bool) -> tuple[Operand, ...]:
    extras = (*mode.operands, *(o for o in HOLE_OPERANDS if prefix_hole and o not in mode.operands))
    if len(extras) > MAX_EXTRAS:
        names = [o.name for o in extras]
        fail(_OP, "prefix_hole", f"at most {MAX_EXTRAS} values a request", f"{names}", "fold two operands into one")
    return extras


@functools.cache
def _mask(mode: PagedMode, block_size: int, window: int | None, prefix_hole: bool) -> Mask:
    visible: Boolean = (k < CONTEXT.symbol + VALID.symbol) & mode.visible.xreplace({BLOCK.symbol: block_size})
    name = f"paged_{mode.name}"
    if mode.reads_block:
        name += f"_block{block_size}"
    if window is not None:
        visible, name = visible & (q - k < window), f"{name}_window{window}"
    if prefix_hole:
        shown = (k < PREFIX.symbol) | (k >= PADDED_PREFIX.symbol) | (k >= CONTEXT.symbol)
        visible, name = visible & shown, f"{name}_hole"
    return Mask(name, visible, (CONTEXT, VALID, *_extras(mode, prefix_hole)))


__all__ = [
    "BLOCK",
    "CONTEXT",
    "DECODING",
    "FAR",
    "HOLE_OPERANDS",
    "MAX_EXTRAS",
    "MODES",
    "PADDED_PREFIX",
    "PREFIX",
    "STATUS",
    "VALID",
    "PagedMode",
    "end_of_block",
    "from_query",
    "paged_mask",
    "register_mode",
    "request_operand_names",
    "where",
]
