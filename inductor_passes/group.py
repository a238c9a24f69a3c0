"""Form ops to grouped ops: one op for every form, all query heads of a KV head in one tile, one lowering."""

from __future__ import annotations

import torch

from custom_ops.form import Form, Slots
from custom_ops.forms import FORMS
from inductor_passes import decisions
from inductor_passes.graph_pass import GraphPass

TORCH_ATTENTION = ("scaled_dot_product", "flex_attention")
"""Attention ops of torch's own, which ``explain`` reports as left alone."""


GROUPED = torch.ops.lowered_attn.grouped_attention.default
"""What every form op becomes."""
OURS = "lowered_attn"
"""Key in a node's meta: torch's attention op that a pass of ours chose for the form named there."""


class GroupForms(GraphPass):
    """Rewrite every ``lowered_attn::<form>`` to ``lowered_attn::grouped_attention``, its operands sorted into slots.

    ``reports``: whether torch's own attention ops are recorded as left alone; ``Recognise`` says why it leaves one.
    """

    def __init__(self, reports: bool = True) -> None:
        super().__init__()
        self.reports = reports

    def rewrite(self, graph: torch.fx.Graph) -> int:
        count = 0
        for node in [n for n in graph.nodes if n.op == "call_function"]:
            form = form_of(node)
            if form is not None:
                _group(node, form)
                count += 1
            elif self.reports and any(part in str(node.target) for part in TORCH_ATTENTION) and OURS not in node.meta:
                _refuse(node)
        return count


def form_of(node: torch.fx.Node) -> Form | None:
    """The form whose op the node calls, or None."""
    return next((form for form in FORMS.values() if node.target == form.op.default), None)


def output_is_read(node: torch.fx.Node, output: int) -> bool:
    """Whether anything reads this output of a node that has several."""
    return any(user.args[1] == output and user.users for user in node.users)


def module_of(node: torch.fx.Node) -> str:
    """The module whose code the node comes from, as in ``model.layers[0]``; empty where FX does not say."""
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def _refuse(node: torch.fx.Node) -> None:
    decisions.record(
        decisions.Decision(
            "refused", str(node.target), node.name,
            "torch's own attention op, left as it is: only the ops in torch.ops.lowered_attn are grouped, "
            "which blocks made with backend='lowered' call",
            {"module": module_of(node)},
        )
    )  # fmt: skip


def slots_of(node: torch.fx.Node, form: Form) -> Slots:
    """The operands of a form op's node by slot: nodes and numbers where tensors and numbers will be."""
    operands = dict(zip(form.operand_names, node.args[3:], strict=False))
    operands.update({name: argument for name, argument in node.kwargs.items() if name not in ("scale", "softcap")})
    return form.slots({name: operands.get(name) for name in form.operand_names})  # type: ignore[misc]


def _group(node: torch.fx.Node, form: Form) -> None:
    query, key, value = node.args[:3]
    slots = slots_of(node, form)
    q_example = query.meta["val"]  # type: ignore[union-attr]
    q_shape, k_shape, v_shape = (t.meta["val"].shape for t in (query, key, value))  # type: ignore[union-attr]
    scale = node.kwargs.get("scale")
    if scale is None:
        scale = int(q_shape[3]) ** -0.5
    node.target = GROUPED
    softcap = node.kwargs.get("softcap", 0.0)
    node.args = (query, key, value, *slots[:-1], form.name, list(slots.ints), scale, softcap)
    node.kwargs = {}
    group = q_shape[1] // k_shape[1]
    heads = f"{group} query head{'' if group == 1 else 's'} each"
    if v_shape[1] != k_shape[1]:
        heads += f", which share {v_shape[1]} value head{'' if v_shape[1] == 1 else 's'}"
    if softcap:
        heads += f", scores capped at {softcap:g}"
    decisions.record(
        decisions.Decision(
            "grouped", form.name, node.name, f"grouped_attention over {k_shape[1]} KV heads, {heads}",
            {"module": module_of(node), "query": tuple(q_shape), "key": tuple(k_shape), "value": tuple(v_shape),
             "dtype": q_example.dtype},
        )
    )  # fmt: skip
