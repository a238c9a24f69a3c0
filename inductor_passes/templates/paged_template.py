"""The Inductor frame around the paged tile loop: what ``custom_ops/kernels/paged_forward.py`` is for eager launches.

A program's loop over its items is in the frame, with one store per item, so that an epilogue (a gate, a cast to fp8)
runs where the output is stored: once a row, after split items were combined.
"""

from __future__ import annotations

import functools
import inspect
import pathlib
from typing import Any

from custom_ops.masks import Mask
from inductor_passes.compat import SymbolicGridFn, TritonTemplate
from inductor_passes.templates.attention_template import raw

ARGUMENTS = ("Q", "K", "V", "K_CACHE", "V_CACHE", "PAGE_TABLES", "SCHEDULE", "SINKS", "K_SCALE", "V_SCALE",
             "PARTS", "PART_STATS", "LSE")  # fmt: skip
"""Every tensor a kernel can take, in its order; a template has those that its calls have."""

STRIDES: dict[str, dict[str, tuple[int | None, ...]]] = {
    # Of new keys and values token and head, of caches page, token, head and, of K, a piece of a key or, of V, an
    # element: the dimensions that have them.
    "unified": {"K": (0, 1), "V": (0, 1), "K_CACHE": (0, 1, 2, None), "V_CACHE": (0, 1, 2, 3)},
    "distinct": {"K": (0, 1), "V": (0, 1), "K_CACHE": (0, 3, 1, 2), "V_CACHE": (0, 3, 1, 2)},
    "latent": {"K": (0, None), "V": (None,) * 2, "K_CACHE": (0, 1, None, None), "V_CACHE": (None,) * 4},
}
"""By layout of the caches, or for caches of latents, which have no heads and no values beside them."""

_FRAME = (pathlib.Path(__file__).parent / "paged_attention.py.jinja").read_text()


@SymbolicGridFn
def _grid(tokens: Any, heads: Any, head_dim: Any, meta: dict) -> tuple:
    """As many programs as the schedule deals out to, for each block of query heads, whatever the sizes."""
    return (meta["PROGRAMS"] * meta["HEAD_BLOCKS"], 1, 1)


@functools.cache
def template_of(mask: Mask, caches: str, arguments: tuple[str, ...]) -> TritonTemplate:
    """The template for calls of this mask with these of ``ARGUMENTS``. ``caches``: a name in ``STRIDES``.

    Template names are global in Inductor, so each is made once.
    """
    replaced = {
        "<ARGUMENTS>": ", ".join(f'"{name}"' for name in arguments),
        "<MASK>": mask.name,
        **{
            f"<STRIDE_{name.replace('_CACHE', 'C')}>": _strides(name, dims, name in arguments)
            for name, dims in STRIDES[caches].items()
        },
        "<ABSENT_OPERANDS>\n": "".join(
            f"    {name} = Q  # not there, never read\n" for name in ARGUMENTS[:-1] if name not in arguments
        ),
    }
    frame = _FRAME
    for mark, text in replaced.items():
        frame = frame.replace(mark, text)
    present = "".join(f"_{name.lower()}" for name in ("K", "SINKS", "K_SCALE", "V_SCALE", "LSE") if name in arguments)
    name = f"lowered_attn_{mask.name}_{caches}{present}"
    return TritonTemplate(name=name, grid=_grid, source=frame + raw(_functions_source(mask)))


def _strides(name: str, dims: tuple[int | None, ...], is_there: bool) -> str:
    """Template text for a tuple of an operand's strides, 0 for dimensions, and operands, that are not there."""
    return "(" + ", ".join(f'{{{{stride("{name}", {d})}}}}' if is_there and d is not None else "0" for d in dims) + ")"


@functools.cache
def _functions_source(mask: Mask) -> str:
    """The mask's device functions, the schedule's numbers, the tile loop and what becomes of an item's parts."""
    from custom_ops.kernels import paged_parts, paged_tile
    from custom_ops.kernels.mask_functions import decorated_range_source
    from custom_ops.paged import schedule_layout

    modules = (inspect.getsource(module) for module in (paged_tile, paged_parts))
    numbers = "".join(
        f"{name} = tl.constexpr({getattr(schedule_layout, name)})\n"
        for name in ("HEADER_SIZE", "ENTRY_FIELDS", "PROGRAM_FIELDS", "OF_REQUEST")
    )
    functions = (source[source.index("@triton.jit") :] for source in modules)
    return "\n\n".join([decorated_range_source(mask), numbers, *functions])
