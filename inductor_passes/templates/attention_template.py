"""The Inductor frame around the tile loop.

What ``custom_ops/kernels/forward.py`` is for eager launches, with Inductor's hooks.

The loop itself is pasted in as source, with the mask's printed functions, so eager, interpreted and compiled kernels
are one text. The kernel writes ``[B, Lq, Hq, Dv]`` and the lowering returns a permuted view: that way a gate, a head
merge and a cast fuse into the store (a strided ``[B, Hq, Lq, Dv]`` layout did not fuse).
"""

from __future__ import annotations

import functools
import inspect
import pathlib
from typing import Any

from custom_ops.form import Slots
from custom_ops.kernels.specialise import kernel_operands
from custom_ops.masks import Mask
from inductor_passes.compat import SymbolicGridFn, TritonTemplate

OPERANDS = tuple(kernel_operands(Slots(None, None, None, None, None, ())))
"""Kernel arguments of the mask's tensor operands; a template has those that its calls have."""

_FRAME = (pathlib.Path(__file__).parent / "attention.py.jinja").read_text()


@SymbolicGridFn
def _grid(batch: Any, heads: Any, query_len: Any, head_dim: Any, meta: dict, *, cdiv: Any) -> tuple:
    """One program a tile of BLOCK_M packed rows of one (batch, KV head)."""
    return (cdiv(query_len * meta["G"], meta["BLOCK_M"]) * batch * meta["KV_HEADS"], 1, 1)


@functools.cache
def template_of(mask: Mask, operands: tuple[str, ...], writes_lse: bool) -> TritonTemplate:
    """The template for calls of this mask with these tensor operands.

    Template names are global in Inductor, so each is made once.
    """
    suffix = "".join(f"_{name.lower()}" for name in operands) + ("_lse" if writes_lse else "")
    arguments = ("Q", "K", "V", *(("LSE",) if writes_lse else ()), *operands)
    frame = _FRAME.replace("<ARGUMENTS>", ", ".join(f'"{name}"' for name in arguments)).replace("<MASK>", mask.name)
    absent = "".join(f"    {name} = K  # not there, never read\n" for name in OPERANDS if name not in operands)
    source = frame.replace("<ABSENT_OPERANDS>\n", absent) + raw(_functions_source(mask))
    return TritonTemplate(name=f"lowered_attn_{mask.name}{suffix}", grid=_grid, source=source)


def raw(text: str) -> str:
    """Text that the template engine must not read."""
    return "\n\n{% raw %}\n" + text + "{% endraw %}\n"


@functools.cache
def _functions_source(mask: Mask) -> str:
    """The mask's device functions and the tile loop, in the order in which they call one another."""
    from custom_ops.kernels import tile
    from custom_ops.kernels.mask_functions import decorated_source

    module = inspect.getsource(tile)
    return decorated_source(mask) + "\n\n" + module[module.index("@triton.jit") :]
