"""Masks that are written for one query and one key: FlexAttention's ``mask_mod(b, h, q_idx, kv_idx)``.

``read_mod`` reads such a function's own graph; ``read_mapped`` reads what mapping one over all indices (torch's
``create_mask``: ``vmap`` four times) left in the surrounding graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch.fx.node import Node

from custom_ops.masks import k, q
from inductor_passes.recognise.graph_values import Writes, name_of
from inductor_passes.recognise.indexing import Index, Unreadable, require
from inductor_passes.recognise.mask_values import HEAD, REQUEST, MaskReader, Value, Visibility, converted

_INDICES = (REQUEST, HEAD, q, k)


class ModReader(MaskReader):
    """Reads the graph of a ``mask_mod`` (or of the conditions in a ``score_mod``) that attention ``reader`` carries."""

    def __init__(self, mod: torch.fx.Graph, outer: MaskReader, reader: Node, lengths: Mapping[str, sympy.Expr]) -> None:
        super().__init__(Writes(mod), **lengths)
        self._outer, self._reader = outer, reader
        self._captured: dict[Node, Any] = {}

    def call(self, arguments: list[Node], captured: list[Node], values: list[Any]) -> None:
        """Say what the graph is called with: b, h, q_idx and kv_idx, and what it reads of the graph around it."""
        require(len(arguments) == 4 and len(captured) == len(values), "a mask_mod of other arguments")
        for node, value in zip(arguments, _INDICES, strict=True):
            self.given(node, value)
        self._captured = dict(zip(captured, values, strict=True))

    def _operand(self, node: Node, index: Index, reader: Node) -> Value:
        raise Unreadable(f"{node.name} is computed in a way that is not known here")

    def at(self, value: Any, index: Any, reader: Node) -> Value:
        if isinstance(value, Node) and value in self._captured:
            return self._outer.at(self._captured[value], index, self._reader)
        return super().at(value, index, reader)


class _MappedReader(MaskReader):
    """Reads through functorch's levels: the element of a batched tensor is one at the level's index."""

    def __init__(self, writes: Writes, lengths: Mapping[str, sympy.Expr]) -> None:
        super().__init__(writes, **lengths)
        self._levels: dict[int, sympy.Expr] = {}

    def _interpret(self, node: Node, index: Index) -> Value:
        name = name_of(node)
        if name == "_remove_batch_dim":
            source, level, _, dim = self._arguments(node)
            require(level not in self._levels and isinstance(dim, int), f"{node.name}: a level twice")
            self._levels[level] = index[dim]
            value = self.at(source, (*index[:dim], *index[dim + 1 :]), node)
            del self._levels[level]
            return value
        if name == "_add_batch_dim":
            source, dim, level = self._arguments(node)
            require(level in self._levels and isinstance(dim, int), f"{node.name}: a level that nothing removes")
            return self.at(source, (*index[:dim], self._levels[level], *index[dim:]), node)
        return super()._interpret(node, index)

    @staticmethod
    def _arguments(node: Node) -> tuple[Any, ...]:
        return node.args


def read_mapped(mask: Node, reader: Node, writes: Writes, lengths: Mapping[str, sympy.Expr]) -> Visibility:
    """What ``mask [B or 1, H or 1, Lq, Lk]`` says, bool, made by mapping a ``mask_mod`` over all indices.

    Raises ``Unreadable``.
    """
    own = _MappedReader(writes, lengths)
    return own.visibility(converted(own.at(mask, _INDICES, reader), torch.bool))


def same(one: Visibility, other: Visibility) -> bool:
    """Whether two masks are one condition over the same elements of the same tensors."""

    def reads(seen: Visibility) -> dict[Any, Any]:
        return {operand: (read.node, read.at) for operand, read in seen.tensors.items()}

    return one.visible == other.visible and reads(one) == reads(other)
