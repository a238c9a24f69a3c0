"""The Dynamo backend ``"lowered_attn"``: ``torch.compile(model, backend="lowered_attn")``.

The package's entry point (group ``torch_dynamo_backends``) makes the name known to torch, so nothing has to be
imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import lowered_attn  # noqa: F401  (importing this module as an entry point registers ops and checks the sibling packages)
from inductor_passes import compile_with_passes


def backend(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    **keywords: Any,
) -> Any:
    """Compile with Inductor, attention forms lowered to grouped kernels.

    ``mode`` and ``options`` mean what they mean for Inductor.
    """
    return compile_with_passes(gm, example_inputs, mode=mode, options=options, **keywords)
