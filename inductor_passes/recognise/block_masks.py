"""Whether a BlockMask's blocks follow from its ``mask_mod``: FlexAttention reads nothing outside of the blocks.

``create_block_mask`` lists every block in which the mask is true somewhere, apart those in which it is true
everywhere: then the mask alone says what is seen. But a BlockMask can be made of any blocks
(``BlockMask.from_kv_blocks``), which then hide keys that its ``mask_mod`` shows. So the computation is followed back
from the blocks to the mask that was mapped over all indices, and that is compared with the ``mask_mod`` itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import sympy
import torch
from torch.fx.node import Node

from inductor_passes import compat
from inductor_passes.recognise.graph_values import Writes, example, name_of, shape_of
from inductor_passes.recognise.indexing import Unreadable, require
from inductor_passes.recognise.mask_values import INTEGERS, MaskReader, Visibility
from inductor_passes.recognise.scalar_masks import read_mapped, same

WHOLE = 1 << 30
"""The block size with which flex_attention says that there is no BlockMask: one block, which holds everything."""
INPUTS = (
    "its BlockMask comes from outside of the graph, and its blocks may hide what its mask_mod shows: make it in the "
    "compiled code by create_block_mask, or pass options={'trust_block_masks': True} if that made all of yours"
)
UNKNOWN = "its BlockMask's blocks are not those that create_block_mask makes of its mask_mod"


class Blocks(NamedTuple):
    """The blocks of keys that each block of queries reads."""

    partial: tuple[Node, Node]
    """How many in a row, and which; the mask is applied to them."""
    full: tuple[Node | None, Node | None]
    """The same for blocks that are read whole."""
    sizes: tuple[int, int]
    """Queries and keys a block."""


def require_following(
    blocks: Blocks, seen: Visibility, reader: Node, writes: Writes, lengths: Mapping[str, sympy.Expr], trust: bool
) -> None:
    """``Unreadable`` unless the blocks that ``reader`` gets are proved to be those of the mask ``seen``.

    ``trust``: take the user's word for blocks that are inputs of the graph.
    """
    tensors = [node for node in (*blocks.partial, *blocks.full) if node is not None]
    if all(node.op == "placeholder" for node in tensors):
        require(trust, INPUTS)
        return
    for node in _computation(tensors):
        require(not writes.between(node, node, reader), UNKNOWN)
    if blocks.sizes == (WHOLE, WHOLE):
        _require_one_block(blocks, reader, writes, lengths)
        return
    mask = _mask_of(blocks)
    try:
        mapped = read_mapped(mask, reader, writes, lengths)
    except Unreadable as reason:
        raise Unreadable(f"{UNKNOWN}: {reason}") from None
    require(same(mapped, seen), UNKNOWN)
    for read in mapped.tensors.values():
        changed = writes.between(read.node, read.reader, reader)
        require(not changed, f"{read.node.name} is written to after its BlockMask was made")


def _require_one_block(blocks: Blocks, reader: Node, writes: Writes, lengths: Mapping[str, sympy.Expr]) -> None:
    numbers = MaskReader(writes, **lengths)
    for node, expected in zip(blocks.partial, (1, 0), strict=True):
        index = tuple(sympy.Symbol(f"block_{i}") for i in range(len(shape_of(node))))
        require(sympy.Eq(numbers.at(node, index, reader), expected), UNKNOWN)
    require(blocks.full == (None, None), UNKNOWN)


def _mask_of(blocks: Blocks) -> Node:
    """The mask ``[B, H, Lq, Lk]`` whose blocks these are, told from every step of torch's computation."""
    partial = _ordered(blocks.partial)
    if blocks.full == (None, None):
        sums = _compared(partial, "gt", 0)
    else:
        whole = blocks.sizes[0] * blocks.sizes[1]
        sums = _compared(_ordered(blocks.full), "eq", whole)
        require(name_of(partial) == "bitwise_and", UNKNOWN)
        some, not_all = (_node(a) for a in partial.args)
        require(_compared(some, "gt", 0) is sums and _compared(not_all, "lt", whole) is sums, UNKNOWN)
    tiles = _called(sums, "sum", dim=[-2, -1])
    tiled = _called(tiles, "permute")
    require(_flat(tiles.args[1:]) == [0, 1, 2, 4, 3, 5], UNKNOWN)
    padded = _called(tiled, "view")
    require(len(shape_of(tiled)) == 6, UNKNOWN)
    (batch, heads, rows, height, columns, width), together = example(tiled).shape, example(padded).shape
    split = (batch, heads, rows * blocks.sizes[0], columns * blocks.sizes[1])
    pairs = [*zip(split, together, strict=True), *zip((height, width), blocks.sizes, strict=True)]
    require(all(compat.surely(a == b) for a, b in pairs), UNKNOWN)
    mask = _called(padded, "pad")
    before = _flat(padded.args[1:2])[0::2]
    require(before == [0, 0] and all(value in ("constant", None, 0) for value in padded.args[2:]), UNKNOWN)
    require(not padded.kwargs and example(mask).dtype == torch.bool, UNKNOWN)
    return mask


def _ordered(listed: Sequence[Any]) -> Node:
    """What is counted along a row and listed, true ones first: ``_dense_to_ordered``."""
    count, which = (_uncast(_node(n), INTEGERS) for n in listed)
    dense = _called(count, "sum", dim=-1)
    require(_called(which, "argsort", dim=-1, descending=True, stable=True) is dense, UNKNOWN)
    dense = _uncast(dense, (torch.int8, *INTEGERS))
    require(example(dense).dtype == torch.bool, UNKNOWN)
    return dense


def _compared(node: Node, comparison: str, number: int) -> Node:
    require(name_of(node) == comparison and len(node.args) == 2 and node.args[1] == number, UNKNOWN)
    return _node(node.args[0])


def _called(node: Node, name: str, **keywords: Any) -> Node:
    """The tensor of which ``node`` is the method or function ``name`` with these keywords."""
    require(name_of(node) == name and dict(node.kwargs) == keywords, UNKNOWN)
    return _node(node.args[0])


def _uncast(node: Node, dtypes: Sequence[torch.dtype]) -> Node:
    """Before casts to dtypes that hold every number there is."""
    while name_of(node) == "to":
        require(example(node).dtype in dtypes, UNKNOWN)
        node = _node(node.args[0])
    return node


def _node(value: Any) -> Node:
    require(isinstance(value, Node) and value.op in ("call_function", "call_method"), UNKNOWN)
    return value


def _flat(arguments: Sequence[Any]) -> list[Any]:
    first = arguments[0] if arguments else ()
    return list(first) if isinstance(first, (list, tuple)) else list(arguments)


def _computation(tensors: list[Node]) -> set[Node]:
    """Every tensor that these are computed from, inputs of the graph left out."""
    found: set[Node] = set()
    waiting = list(tensors)
    while waiting:
        node = waiting.pop()
        if node not in found and node.op != "placeholder":
            found.add(node)
            waiting += node.all_input_nodes
    return found
