"""FLOP formulas of the ops for ``torch.utils.flop_counter``, registered when that module is first imported.

Importing the counter imports triton where it is installed, and importing ``custom_ops`` must not: so nothing here
imports it. A post-import hook adds the formulas the moment somebody else does.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from custom_ops.form import Form

_COUNTER = "torch.utils.flop_counter"
_waiting: list[Callable[[types.ModuleType], None]] = []


def forward_flops(form: Form, query_shape: Sequence[int], key_len: int, value_dim: int, ints: Sequence[int]) -> int:
    """Multiply-adds count twice.

    ``2 * pairs * (D + Dv)`` a head, over the pairs that the mask lets be visible (see ``Mask.visible_pairs``).
    """
    batch, heads, query_len, head_dim = query_shape
    named = dict(zip((o.name for o in form.mask.int_operands), ints, strict=True))
    return 2 * batch * heads * form.mask.visible_pairs(query_len, key_len, named) * (head_dim + value_dim)


def backward_flops(form: Form, query_shape: Sequence[int], key_len: int, value_dim: int, ints: Sequence[int]) -> int:
    """Five products where the forward has two: S, dQ and dK cost ``D`` a pair, dP and dV cost ``Dv``."""
    batch, heads, query_len, head_dim = query_shape
    named = dict(zip((o.name for o in form.mask.int_operands), ints, strict=True))
    return 2 * batch * heads * form.mask.visible_pairs(query_len, key_len, named) * (3 * head_dim + 2 * value_dim)


def register_when_counted(form: Form) -> None:
    """Give ``form``'s op its FLOP formula, now or when torch's counter is imported."""

    def register(counter: types.ModuleType) -> None:
        def formula(q: Sequence[int], k: Sequence[int], v: Sequence[int], *arguments: Any, **_: Any) -> int:
            ints = [a for a, o in zip(arguments, form.operands, strict=False) if o.kind == "int"]
            return forward_flops(form, q, k[2], v[3], ints)

        counter.register_flop_formula(form.op)(formula)

    _when_imported(register)


def register_grouped_when_counted(forms: dict[str, Form]) -> None:
    """The same for the grouped ops, which name their form and carry its ints after the tensors."""

    def register(counter: types.ModuleType) -> None:
        import torch

        def grouped(q: Sequence[int], k: Sequence[int], v: Sequence[int], *slots: Any, **_: Any) -> int:
            form, ints = slots[5:7]
            return forward_flops(forms[form], q, k[2], v[3], ints)

        def backward(
            grad_out: Any, grad_lse: Any, q: Sequence[int], k: Sequence[int], v: Sequence[int], out: Any, lse: Any,
            *slots: Any, **_: Any,
        ) -> int:  # fmt: skip
            form, ints = slots[5:7]
            return backward_flops(forms[form], q, k[2], v[3], ints)

        counter.register_flop_formula(torch.ops.lowered_attn.grouped_attention)(grouped)
        counter.register_flop_formula(torch.ops.lowered_attn.attention_with_epilogue)(grouped)
        counter.register_flop_formula(torch.ops.lowered_attn.attention_backward)(backward)

    _when_imported(register)


def _when_imported(register: Callable[[types.ModuleType], None]) -> None:
    counter = sys.modules.get(_COUNTER)
    if counter is not None:
        register(counter)
        return
    if not _waiting:
        sys.meta_path.insert(0, _Hook())
    _waiting.append(register)


class _Hook(importlib.abc.MetaPathFinder):
    """Finds the counter as everybody else would, and runs what waits for it after its body has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: types.ModuleType) -> None:
            execute(module)
            for register in _waiting:
                register(module)
            _waiting.clear()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
