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


READ_QUERY = """\
    rows_at = batch.to(tl.int64) * stride_q[0] + head.to(tl.int64) * stride_q[1] + query.to(tl.int64) * stride_q[2]
    q, q_high = load_query(Q, rows_at, row_valid, D, D_PAD)
"""
"""Queries that lie in memory, with any strides."""

COMPUTE_QUERY = """\
    q_batch = batch.to(tl.int64)
    q_head = head[:, None].to(tl.int64)
    q_token = query[:, None].to(tl.int64)
    q_column = tl.arange(0, D_PAD)[None, :]
    q_present = row_valid[:, None] & (q_column < D)
    {{load_input("Q", "q", <INDICES>, mask="q_present", index_shape=("BLOCK_M", "D_PAD"))}}
    if D != D_PAD:
        q = tl.where(q_present, q, 0.0)  # Inductor trusts masked loads to give 0, and Triton does not say so
    q_high = q
"""
"""Queries that Inductor computes where they are read, once an element: its prologue replaces the load."""

QUERY_ORDERS: dict[tuple[int, ...], str] = {
    (0, 1, 2, 3): '("q_batch", "q_head", "q_token", "q_column")',
    (0, 2, 1, 3): '("q_batch", "q_token", "q_head", "q_column")',
}
"""Orders of a query's dimensions (batch, head, token, element) in memory which a template can compute it in."""


@functools.cache
def template_of(
    mask: Mask, operands: tuple[str, ...], writes_lse: bool, query_order: tuple[int, ...] | None = None
) -> TritonTemplate:
    """The template for calls of this mask with these tensor operands.

    With ``query_order``, one of ``QUERY_ORDERS``, Q comes with its dimensions in that order, and may be computed where
    it is read. Template names are global in Inductor, so each is made once.
    """
    suffix = "".join(f"_{name.lower()}" for name in operands) + ("_lse" if writes_lse else "")
    if query_order is not None:
        suffix += "_query_" + "".join("bhsd"[dim] for dim in query_order)
    arguments = ("Q", "K", "V", *(("LSE",) if writes_lse else ()), *operands)
    frame = _FRAME.replace("<ARGUMENTS>", ", ".join(f'"{name}"' for name in arguments)).replace("<MASK>", mask.name)
    if query_order is None:
        frame = frame.replace("<STRIDE_Q>", '    stride_q = ({{stride("Q")}},)\n').replace("<LOAD_QUERY>\n", READ_QUERY)
    else:
        load = COMPUTE_QUERY.replace("<INDICES>", QUERY_ORDERS[query_order])
        frame = frame.replace("<STRIDE_Q>", "").replace("<LOAD_QUERY>\n", load)
    frame = frame.replace("<QUERY_DIM>", str((query_order or (0, 1, 2, 3)).index(2)))
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
