"""Whether a dense call takes the Hopper kernel, which is opaque to Inductor, and every reason why not.

The call is then the grouped op itself, which decides again at run time with the lengths and addresses at hand: what is
decided here with hints is never more than a choice of speed. It is faster than the template with a gate in it even with
a kernel of its own for the gate: 0.95 against 1.33 ms (H200, bf16, causal B4 H32/8 S4096 D128).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from custom_ops.form import Slots
from custom_ops.forms import FORMS
from custom_ops.kernels.gluon.dense_choice import Choice, choose
from custom_ops.kernels.gluon.dense_cost import Sizes
from custom_ops.kernels.gluon.dense_shape import dense_reasons
from custom_ops.kernels.specialise import architecture, gpu_of, kernel_operands
from custom_ops.kernels.tile_config import DESCRIPTOR_ALIGNMENT
from custom_ops.masks import Mask
from custom_ops.op import kernels_for
from inductor_passes import LIBRARY_OPTION, compat
from inductor_passes.graph_pass import GraphPass
from inductor_passes.group import GROUPED, form_of

ARCHITECTURE = 90
"""Hopper's, as ``custom_ops.kernels.specialise.architecture`` counts."""
OPAQUE = (
    "Inductor fuses nothing into the Hopper kernel; "
    f'options={{"{LIBRARY_OPTION}": False}} takes the template, which fuses'
)
SWITCHED_OFF = f"{LIBRARY_OPTION}: expected True, got False"
CPP_WRAPPER = "cpp_wrapper: expected a wrapper in Python, which launches the kernel, got one in C++, as packages have"
TIMED = "it is timed beside the Hopper kernel, which reads it from memory"
"""Why no template computes queries."""
_KEEPS = "lowered_attn.keeps_template"
_CHOICE = "lowered_attn.choice"
"""Keys in a node's meta: that its call keeps the template, and what was chosen for it with cuDNN at hand."""


class Verdict(NamedTuple):
    """Whether the Hopper kernel takes a dense call, as the compiler sees it."""

    against: list[str]
    """Why not; empty where it does."""
    choice: Choice | None = None
    """By predicted time, where nothing else is against it."""

    @property
    def facts(self) -> dict[str, object]:
        """Of a decision: the reasons, and predicted microseconds by kernel where kernels were compared."""
        return {"against_hopper": self.against, "predicted_us": dict(self.choice.times) if self.choice else {}}


class KeepTemplate(GraphPass):
    """Mark every dense call as one that does not take the Hopper kernel, because the user switched it off."""

    def rewrite(self, graph: torch.fx.Graph) -> int:
        for node in graph.nodes:
            if node.target is GROUPED or form_of(node) is not None:
                node.meta[_KEEPS] = True
        return 0  # a mark is no change of the graph


def judge(
    node: torch.fx.Node, mask: Mask, slots: Slots, sizes: Sizes, *, device: torch.device, dtype: torch.dtype,
    softcap: float, aligned: bool = True, cudnn: bool = False,
) -> Verdict:  # fmt: skip
    """Whether the Hopper kernel takes a dense call, ``node``.

    ``sizes``: with hints for symbolic ones. ``aligned``: whether q, k and v are such as ``can_copy`` says. ``cudnn``:
    whether cuDNN may take the call instead, where that is faster.
    """
    reasons = dense_reasons(
        architecture=architecture(device), dtype=dtype, head_dim=sizes.head_dim, value_dim=sizes.value_dim,
        query_len=sizes.query_len, width=mask.width_for(slots.ints), softcap=softcap, aligned=aligned,
    )  # fmt: skip
    if compat.config.cpp_wrapper:
        reasons.append(CPP_WRAPPER)
    if node.meta.get(_KEEPS):
        reasons.append(SWITCHED_OFF)
    if reasons:
        return Verdict(reasons)
    present: Any = tuple(operand is not None for operand in kernel_operands(slots).values())
    choice = node.meta.get(_CHOICE) or choose(
        mask, slots.ints, present, sizes, has_softcap=softcap != 0.0, gpu=gpu_of(device), cudnn=cudnn
    )
    return Verdict([] if choice.kernel == "gluon" else [choice.reason], choice)


def remember(node: torch.fx.Node, choice: Choice) -> None:
    """What was chosen for a call when cuDNN could have been, which is then not asked about again."""
    node.meta[_CHOICE] = choice


def can_copy(box: Any) -> bool:
    """Whether the copy engine can read a value in memory ``[B, H, L, D]``, whatever its symbolic sizes are.

    As ``custom_ops.kernels.launch.can_copy``, which finds out at run time what nothing proves here: that a symbolic
    stride is not 0, and addresses.
    """
    layout, itemsize = box.get_layout(), box.get_dtype().itemsize
    *outer, last = layout.stride
    apart = [
        stride for size, stride in zip(layout.size, outer, strict=False) if not compat.known_true(compat.equal(size, 1))
    ]
    aligned = all(compat.multiple_of(at * itemsize, DESCRIPTOR_ALIGNMENT) for at in (layout.offset, *apart))
    repeated = any(compat.known_true(compat.equal(stride, 0)) for stride in apart)
    return aligned and not repeated and compat.known_true(compat.equal(last, 1))


def attend_into(
    query: Tensor, key: Tensor, value: Tensor, *operands: Tensor, form: str, names: Sequence[str],
    ints: Sequence[int], scale: float, softcap: float, out: Tensor,
) -> None:  # fmt: skip
    """Fills ``out [B, Lq, Hq, Dv]``, contiguous. ``names``: those of ``operands`` in kernels."""
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)  # the kernel writes it, and nothing reads it
    slots = slots_with(Slots(None, None, None, None, None, tuple(ints)), dict(zip(names, operands, strict=True)))
    outputs = (out.transpose(1, 2), lse)
    kernels_for(query.device).forward(FORMS[form], query, key, value, slots, scale, softcap, outputs=outputs)


CHOICE = compat.ExternKernelChoice(attend_into, name="lowered_attn_attend_into")
"""The Hopper kernel beside templates in autotuning, for calls whose log-sum-exp nothing reads: a choice has one output,
and Inductor would not know that it mutates an argument, as it knows of templates."""


def slots_with(slots: Slots, operands: Mapping[str, Any]) -> Slots:
    """``slots`` with the operands that there are, which come by their names in kernels."""
    fields: dict[str, Any] = kernel_operands(Slots(*Slots._fields))  # type: ignore[arg-type]
    return slots._replace(**{fields[name]: operand for name, operand in operands.items()})
