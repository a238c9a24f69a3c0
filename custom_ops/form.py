"""A form: what is computed. Its mask, its operands, and how a call's operands are told apart.

``custom_ops/op.py`` makes the op that stands for a form.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from custom_ops.checks import check_call
from custom_ops.masks import Mask, Operand, OperandValue

NAMESPACE = "lowered_attn"
Q_START = Operand("q_start", "request", 0, optional=True)
"""Position of each request's first query among the keys, int32 ``[B]``; 0 where None."""
KEYWORDS = "float? scale=None, float softcap=0.0"
"""Keyword-only arguments of every form: the scores' scale, and their soft-cap, 0 for none."""


class Slots(NamedTuple):
    """A call's operands by what they are instead of by name: what every kernel takes, whatever the form."""

    key_padding: Tensor | None
    """bool ``[B, Lk]``, True = hidden."""
    q_start: Tensor | None
    """int32 ``[B]``, position of the first query; 0 where None."""
    query_value: Tensor | None
    """int ``[B, Lq]``, the mask's per-query operand."""
    key_value: Tensor | None
    """int ``[B, Lk]``, the mask's per-key operand."""
    request_value: Tensor | None
    """int ``[B]``, the mask's per-request operand."""
    ints: tuple[int, ...]
    """The mask's int operands, in its order."""


@dataclasses.dataclass(frozen=True)
class Form:
    """An attention form. ``self_attention``: queries and keys share positions, so the op also takes ``q_start``."""

    mask: Mask
    self_attention: bool

    # Set once per form, and no part of its identity: an eager call does not look its operands up again.
    _slot_names: ClassVar[Any]
    _int_names: ClassVar[Any]

    def __post_init__(self) -> None:
        mask = self.mask
        operands = (
            mask.operand("key", boolean=True),
            Q_START,
            mask.operand("query"),
            mask.operand("key"),
            mask.operand("request"),
        )
        object.__setattr__(self, "_slot_names", tuple(None if o is None else o.name for o in operands))
        object.__setattr__(self, "_int_names", tuple(o.name for o in mask.int_operands))

    @property
    def name(self) -> str:
        """The op's name in ``torch.ops.lowered_attn``."""
        return self.mask.name

    @property
    def operands(self) -> tuple[Operand, ...]:
        """What the op takes after q, k and v, in order."""
        return (*self.mask.operands, Q_START) if self.self_attention else self.mask.operands

    @property
    def operand_names(self) -> tuple[str, ...]:
        return tuple(o.name for o in self.operands)

    @property
    def op(self) -> Any:
        """The op, ``torch.ops.lowered_attn.<name>``."""
        return getattr(torch.ops.lowered_attn, self.name)

    @property
    def schema(self) -> str:
        """The op's arguments and results in torch's schema language."""
        types = {"int": "SymInt"}
        arguments = [
            f"{types.get(o.kind, 'Tensor')}{'?' if o.optional else ''} {o.name}{'=None' if o.optional else ''}"
            for o in self.operands
        ]
        return f"(Tensor q, Tensor k, Tensor v, {', '.join(arguments)}, *, {KEYWORDS}) -> (Tensor, Tensor)"

    def check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        operands: dict[str, OperandValue],
        scale: float | None = None,
        softcap: float = 0.0,
    ) -> None:
        """Raise ValueError on a bad call; see ``custom_ops.checks``."""
        check_call(self, query, key, value, operands, scale, softcap)

    def slots(self, operands: Mapping[str, OperandValue]) -> Slots:
        """The operands by slot."""
        values: Any = [None if name is None else operands.get(name) for name in self._slot_names]
        return Slots(*values, ints=tuple([operands[name] for name in self._int_names]))  # type: ignore[misc]

    def mask_of(self, slots: Slots) -> Mask:
        """The mask without the conjuncts of operands that this call does not have.

        ``slots`` may hold anything that is not None where an operand is present: tensors, or a compiler's stand-ins.
        """
        present = [name for name, value in zip(self._slot_names, slots[:-1], strict=True) if value is not None]
        return self.mask.specialise(present)

    def operands_of(self, slots: Slots) -> dict[str, OperandValue]:
        """The inverse of ``slots``: operands by name."""
        named: dict[str, OperandValue] = {}
        ints = iter(slots.ints)
        for o in self.operands:
            if o.kind == "int":
                named[o.name] = next(ints)
            elif o.name == "q_start":
                named[o.name] = slots.q_start
            else:
                named[o.name] = slots.key_padding if o.boolean else getattr(slots, f"{o.kind}_value")
        return named


def default_scale(query: Tensor, scale: float | None) -> float:
    """``1 / sqrt(D)`` where no scale was given."""
    return query.shape[-1] ** -0.5 if scale is None else scale


def empty_outputs(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised ``out [B, Hq, Lq, Dv]`` and ``lse [B, Hq, Lq]``.

    ``out`` is token-major in memory, so that merging heads is a view.
    """
    batch, heads, query_len, _ = query.shape
    value_dim = value.shape[-1]
    row = heads * value_dim
    out = query.new_empty_strided((batch, heads, query_len, value_dim), (query_len * row, value_dim, row, 1))
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return out, query.new_empty((batch, heads, query_len), dtype=lse_dtype)


def unseeing_outputs(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` where no query sees a key: 0 and -inf."""
    out, lse = empty_outputs(query, value)
    return out.zero_(), lse.fill_(float("-inf"))


def empty_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised dq, dk and dv, shaped like q, k and v and token-major in memory."""
    dq, dk, dv = (t.new_empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3]).transpose(1, 2) for t in (q, k, v))
    return dq, dk, dv
