"""What a spelling finds: attention as the user wrote it, ready to be compared with the forms."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TypeAlias

import sympy
from torch.fx.node import Node

from custom_ops.masks import Operand
from inductor_passes.recognise.mask_values import Read

Axes: TypeAlias = tuple[int | None, ...]
"""Where a tensor has B, H, L and D, in this order; None for one head that is no dimension."""
IN_ORDER: Axes = (0, 1, 2, 3)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One call of attention. Repetitions of k and v are not peeled yet."""

    op: str
    """What the user wrote, for people."""
    node: Node
    """The form's op is called here."""
    replaced: Mapping[Node, int]
    """Nodes to replace, by which output of the form replaces them: 0 for out, 1 for lse. Cast to their dtypes."""
    query: Node
    """``[B, Hq, Lq, D]``, in the order of ``axes[0]``."""
    key: Node
    """``[B, Hkv, Lk, D]``, in the order of ``axes[1]``, Hkv dividing Hq."""
    value: Node
    """``[B, Hkv, Lk, Dv]``, in the order of ``axes[2]``."""
    visible: sympy.Basic
    """Which keys are seen, as ``match_form`` takes it."""
    tensors: Mapping[Operand, Read | Node]
    """The tensors that ``visible`` reads. A node stands for itself, of the shape and dtype that its operand takes."""
    scale: float | None
    """What scores are multiplied by; None for ``1 / sqrt(D)``."""
    finite: bool = False
    """Whether scores are hidden by a finite number: rows that see nothing are then the mean of all values."""
    softcap: float = 0.0
    """Scaled scores ``s`` count as ``softcap * tanh(s / softcap)``; 0 for none."""
    axes: tuple[Axes, Axes, Axes] = (IN_ORDER, IN_ORDER, IN_ORDER)
    """How q, k and v lie. Where they are not in order, a permuted view of them is attention's."""
    out_axes: Axes = IN_ORDER
    """How the replaced output lies. Without a dimension for heads, they are folded into the requests."""


@dataclasses.dataclass(frozen=True)
class Refused:
    """Attention that keeps the user's own path."""

    node: Node
    op: str
    """What the user wrote, for people."""
    reason: str
    """Why, as half a sentence."""
