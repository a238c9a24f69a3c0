"""What the tests of the dense Hopper kernel share: calls that take it, whichever kernel is faster."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

from custom_ops.kernels.gluon import dense_choice
from custom_ops.kernels.gluon.dense_choice import Choice, Plan


@contextlib.contextmanager
def chosen(kernel: str | None, consumers: int | None = None) -> Iterator[None]:
    """Calls that the Hopper kernel could take go to ``kernel``, eager and compiled, but to cuDNN only those that it can
    take: else to the Hopper kernel. That has so many consumers; None: as chosen."""
    from custom_ops.kernels import launch
    from custom_ops.kernels.gluon import dense_launch
    from inductor_passes import hopper

    def choose(*arguments: Any, **keywords: Any) -> Choice:
        found = dense_choice.choose(*arguments, **keywords)
        taken = kernel or found.kernel
        if kernel == "cudnn" and kernel not in dict(found.times):
            taken = "gluon"
        return dataclasses.replace(found, kernel=taken)  # type: ignore[arg-type]

    def best_plan(*arguments: Any) -> Plan:
        found = dense_choice.best_plan(*arguments)
        return found._replace(consumers=consumers or found.consumers)

    def forget() -> None:
        launch._decision.cache_clear()
        dense_launch._launch_of.cache_clear()

    with contextlib.ExitStack() as stack:
        for module in (launch, hopper):
            stack.enter_context(mock.patch.object(module, "choose", choose))
        stack.enter_context(mock.patch.object(dense_launch, "best_plan", best_plan))
        stack.callback(forget)
        forget()
        yield
