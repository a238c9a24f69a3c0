"""A form: what is computed. Its mask, its operands, and how a call's operands are told apart.

``custom_ops/op.py`` makes the op that stands for a form.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

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

        def tensor(operand: Operand | None) -> Any:
            return None if operand is None else operands.get(operand.name)

        return Slots(
            key_padding=tensor(self.mask.operand("key", boolean=True)),
            q_start=operands.get("q_start"),  # type: ignore[arg-type]
            query_value=tensor(self.mask.operand("query")),
            key_value=tensor(self.mask.operand("key")),
            request_value=tensor(self.mask.operand("request")),
            ints=tuple(operands[o.name] for o in self.mask.int_operands),  # type: ignore[misc]
        )

    def mask_of(self, slots: Slots) -> Mask:
        """The mask without the conjuncts of operands that this call does not have.

        ``slots`` may hold anything that is not None where an operand is present: tensors, or a compiler's stand-ins.
        """
        return self.mask.specialise([name for name, value in self.operands_of(slots).items() if value is not None])

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
    out = query.new_empty(batch, query_len, heads, value.shape[-1]).transpose(1, 2)
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return out, query.new_empty(batch, heads, query_len, dtype=lse_dtype)


def unseeing_outputs(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse`` where no query sees a key: 0 and -inf."""
    out, lse = empty_outputs(query, value)
    return out.zero_(), lse.fill_(float("-inf"))


def empty_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised dq, dk and dv, shaped like q, k and v and token-major in memory."""
    dq, dk, dv = (t.new_empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3]).transpose(1, 2) for t in (q, k, v))
    return dq, dk, dv
