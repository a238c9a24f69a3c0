"""Backends: how a form's attention is run. One module each; a new one is its file and its line in BACKENDS.

Every backend takes the same tensors. q is [B, Hq, Lq, D], k [B, Hkv, Lk, D], v [B, Hv, Lk, Dv], Hq a
multiple of Hkv and Hkv one of Hv (KV head h has value head h // (Hkv / Hv), so that heads may share their values);
operands are the form's own, by name, as its op documents them; with softcap, a scaled score s counts as
softcap * tanh(s / softcap). The result is [B, Hq, Lq, Dv] in q's dtype. A query
that sees no key gives 0 and has zero gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor
from torch.fx import traceback

from custom_ops.form import Form
from custom_ops.masks import OperandValue
from inductor_passes import CHOSEN
from lowered_attn.backends import flex, lowered, reference, sdpa

Operands = Mapping[str, OperandValue]


class Backend(Protocol):
    """What each module in BACKENDS provides."""

    NAME: str

    def unsupported_reasons(
        self, form: Form, q: Tensor, k: Tensor, v: Tensor, operands: Operands, softcap: float = 0.0
    ) -> list[str]:
        """Return every reason why `run` cannot take these inputs; an empty list when it can."""

    def run(
        self,
        form: Form,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        operands: Operands,
        scale: float | None = None,
        softcap: float = 0.0,
    ) -> Tensor:
        """Return the attention output [B, Hq, Lq, Dv]; `scale` None means 1 / sqrt(D), `softcap` 0 none."""


_MODULES: tuple[Backend, ...] = (lowered, sdpa, flex, reference)
BACKENDS: dict[str, Backend] = {module.NAME: module for module in _MODULES}


class UnsupportedBackendError(ValueError):
    """The backend that was asked for cannot run these inputs. Nothing else was run in its place."""


def get_backend(name: str) -> Backend:
    """Return the backend called `name`; ValueError, listing the names, if there is none."""
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return BACKENDS[name]


def run_attention(
    backend: str,
    form: Form,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Operands,
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Run `form` on exactly the backend asked for; shapes as in the module's docstring.

    Raises ValueError for inputs that the form refuses, and UnsupportedBackendError, with every reason and the
    backends that would do, for inputs that this backend cannot run. It never falls back to another one.
    """
    chosen = get_backend(backend)
    form.check(q, k, v, dict(operands), scale, softcap)
    inputs = (form, q, k, v, operands, softcap)
    reasons = chosen.unsupported_reasons(*inputs)
    if reasons:
        able = [name for name, other in BACKENDS.items() if not other.unsupported_reasons(*inputs)]
        raise UnsupportedBackendError(
            f"backend={backend!r} cannot run {form.name}: {'; '.join(reasons)}. "
            f"Backends that can: {', '.join(map(repr, able)) or 'none'}. "
            + (f"Pass backend={able[0]!r}, or change the inputs." if able else "Change the inputs.")
        )
    with traceback.annotate({CHOSEN: backend}):  # what was asked for runs, also where a compiler knows better
        return chosen.run(form, q, k, v, operands, scale, softcap)
