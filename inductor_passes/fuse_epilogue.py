"""What follows attention elementwise goes into the Hopper kernel: a sigmoid gate, a residual.

Inductor fuses such an epilogue into its own templates, and cannot into Gluon, which its templates are not. So calls
that the Hopper kernel takes are looked at first, on the graph: what ``epilogue_region`` reads after one becomes the
epilogue of ``lowered_attn::attention_with_epilogue``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.node import Node, map_arg

from custom_ops.epilogue import RESULTS
from custom_ops.epilogue_op import OP
from custom_ops.form import Form, Slots
from custom_ops.kernels.gluon.dense_choice import HOPPER
from custom_ops.kernels.gluon.dense_cost import Sizes
from custom_ops.kernels.gluon.dense_shape import epilogue_reasons
from custom_ops.kernels.tile_config import DESCRIPTOR_ALIGNMENT, rows_can_be_copied
from inductor_passes import compat, decisions, hopper
from inductor_passes.epilogue_region import Extra, Reader, Region
from inductor_passes.graph_pass import GraphPass, describe
from inductor_passes.group import form_of, module_of, output_is_read, slots_of
from inductor_passes.lowering import operands_in_memory

RESHAPES = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
NONE = "no epilogue of the Hopper kernel"
TIMED = "max_autotune: expected False, got True, which times templates with it inside"


class FuseEpilogue(GraphPass):
    """Rewrite form ops and what follows them to ``attention_with_epilogue``, where the Hopper kernel takes the call.

    In inference: where a gradient needs attention's output, the graph keeps it, and it is read twice. ``PreferLibrary``
    comes first, which gives calls to cuDNN.
    """

    def rewrite(self, graph: torch.fx.Graph) -> int:
        count = 0
        for node in [n for n in graph.nodes if n.op == "call_function"]:
            form = form_of(node)
            if form is not None:
                count += _fuse(node, form)
        graph.eliminate_dead_code()
        return count


def _fuse(node: Node, form: Form) -> bool:
    """Whether the node became one with an epilogue."""
    output = next((user for user in node.users if user.args[1] == 0), None)
    if output is None:
        return False
    out = output.meta["val"]
    if not out.is_cuda or out.dtype not in RESULTS or 0 in out.shape:
        return False
    reader = Reader(output)
    region = reader.region()
    if region is None and not reader.refusal:
        return False  # nothing follows
    slots = slots_of(node, form)
    query, key, value = (argument.meta["val"] for argument in node.args[:3])  # type: ignore[union-attr]
    if not all(isinstance(size, int) for size in (*query.shape, *key.shape, *value.shape, *slots.ints)):
        _record("apart", form, node, f"{NONE}: expected constant sizes, got some that vary")
        return False
    aligned = all(_can_copy(t) for t in (query, key, value))
    verdict = hopper.judge(
        node, form.mask_of(slots), slots, Sizes.of(query.shape, key.shape, value.shape), device=query.device,
        dtype=query.dtype, softcap=float(node.kwargs.get("softcap", 0.0)), aligned=aligned,  # type: ignore[arg-type]
    )  # fmt: skip
    if verdict.against:
        return False
    reasons = epilogue_reasons(query.shape[3])
    if compat.config.max_autotune:
        reasons.append(TIMED)
    if output_is_read(node, 1):
        reasons.append("lse is read too")
    if region is None:
        reasons.append(reader.refusal)
    if reasons or region is None:
        _record("apart", form, node, f"{NONE}: {'; '.join(reasons)}")
        return False
    base = _Base(node)
    return base.replaced(form, slots, region, verdict)


def _can_copy(t: Tensor) -> bool:
    """As ``launch.can_copy``, by strides alone: an input's address is known to the call only, which looks again."""
    offset = t.storage_offset() * t.element_size()
    return offset % DESCRIPTOR_ALIGNMENT == 0 and rows_can_be_copied(t.shape, t.stride(), t.element_size())


class _Base:
    """Makes nodes beside an attention call, in its graph, where that inserts them."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.graph = node.graph
        query, _, value = (argument.meta["val"] for argument in node.args[:3])  # type: ignore[union-attr]
        self.mode = query.fake_mode
        self.sizes = (*query.shape[:3], value.shape[3])

    def replaced(self, form: Form, slots: Slots, region: Region, verdict: hopper.Verdict) -> bool:
        """Whether the region is now part of the call: not where the copy engine cannot read what it reads."""
        root, node = region.root, self.node
        scale, softcap = node.kwargs.get("scale"), node.kwargs.get("softcap", 0.0)
        if scale is None:
            scale = int(node.args[0].meta["val"].shape[3]) ** -0.5  # type: ignore[union-attr]
        with self.graph.inserting_before(root):
            extra = None if region.extra is None else self.seen(region.extra)
            if extra is not None and not _can_copy(extra.meta["val"]):
                what = describe(region.extra.source)  # type: ignore[union-attr]
                why = f"it reads {what}, whose rows are in pieces, repeated or unaligned"
                _record("apart", form, node, f"{NONE}: {why}")
                return False
            call = self.call(
                OP, *node.args[:3], *slots[:-1], form.name, list(slots.ints), scale, softcap, str(region.epilogue),
                extra,
            )  # fmt: skip
            result = call
            for view in region.views:
                result = self.again(view, result)
        # "eager_input_vals" are of the root's own arguments.
        result.meta = {name: value for name, value in root.meta.items() if name != "eager_input_vals"} | {
            "val": result.meta["val"]
        }
        root.replace_all_uses_with(result)
        facts = {"module": module_of(node), "kernel": HOPPER, "epilogue": str(region.epilogue)} | verdict.facts
        assert verdict.choice is not None  # it is there whenever nothing is against the kernel
        detail = f"the Hopper kernel, called as an op, with what follows in it; {verdict.choice.reason}"
        decisions.record(decisions.Decision("lowered", form.name, call.name, detail, facts))
        names = ", ".join(dict.fromkeys(describe(one) for one in region.computed))
        _record("fused", form, call, f"into the store of the output: {names}")
        return True

    def call(self, target: Any, *arguments: Any) -> Node:
        """A call with its example."""
        node = self.graph.call_function(target, arguments)
        with self.mode:
            node.meta["val"] = target(*map_arg(arguments, lambda n: n.meta["val"]))
        return node

    def again(self, view: Node, source: Node) -> Node:
        """The view of another source; a copy is none."""
        if view.target is torch.ops.aten.clone.default:
            return source
        target = torch.ops.aten.reshape.default if view.target in RESHAPES else view.target
        return self.call(target, source, *view.args[1:])

    def seen(self, extra: Extra) -> Node:
        """The further tensor as ``[B, H, L, D]``."""
        node = extra.source
        for view in extra.moves:
            node = self.again(view, node)
        order = [a for group in extra.axes for a in group]
        node = self.call(torch.ops.aten.reshape.default, node, [self.sizes[a] for a in order])
        return self.call(torch.ops.aten.permute.default, node, [order.index(a) for a in range(4)])


def _record(stage: decisions.Stage, form: Form, node: Node, detail: str) -> None:
    decisions.record(decisions.Decision(stage, form.name, node.name, detail))


@compat.register_lowering(OP, type_promotion_kind=None)
def lower_attention_with_epilogue(query: Any, key: Any, value: Any, *rest: Any) -> Any:
    """The op as it is, with rows of q, k and v in one piece and the mask's operands contiguous, as the kernel wants."""
    query, key, value = (compat.unit_last_stride(t) for t in (query, key, value))
    slots = Slots._make([*rest[:5], ()])
    slots = hopper.slots_with(slots, operands_in_memory(slots))
    return compat.fallback(OP)(query, key, value, *slots[:-1], *rest[5:])
