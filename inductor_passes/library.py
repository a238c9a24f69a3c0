"""cuDNN's fused attention behind the same form op, where it is faster than ours.

On H200s (torch 2.11, cuDNN 9.19) plain causal attention in 16 bits ran 1.01 to 1.6 times faster through cuDNN than
through the grouped Triton template: most at length 512, 1.15 to 1.3 times at 4,096 to 16,384 with head dim 128, least
at head dim 64; 1.09 times at 8,192 with 192 for q and k and 128 for v, the prefill of DeepSeek's latent attention.
Of calls that the Hopper kernel can take, cuDNN takes those that ``dense_choice`` predicts it to be faster for. Nothing
fuses into a library kernel, and a new shape costs it a new plan, so only static shapes take it.
"""

from __future__ import annotations

import operator

import torch

from custom_ops.cpu import is_plain_causal, sees_everything
from custom_ops.form import Form
from custom_ops.kernels.gluon.dense_cost import Sizes
from inductor_passes import decisions, hopper
from inductor_passes.graph_pass import GraphPass
from inductor_passes.group import OURS, form_of, module_of, output_is_read, slots_of

CUDNN = torch.ops.aten._scaled_dot_product_cudnn_attention.default
SHORTEST = 128
"""Shorter inputs were not measured."""
WIDEST = 256
"""cuDNN's widest head dim."""
DTYPES = (torch.float16, torch.bfloat16)


class PreferLibrary(GraphPass):
    """Rewrite form ops to cuDNN's op where ``refusals`` finds nothing against it and no kernel of ours is faster."""

    def rewrite(self, graph: torch.fx.Graph) -> int:
        count = 0
        for node in [n for n in graph.nodes if n.op == "call_function"]:
            form = form_of(node)
            if form is None or refusals(node, form):
                continue
            verdict = _beside_hopper(node, form)
            if verdict.choice is not None and verdict.choice.kernel != "cudnn":
                hopper.remember(node, verdict.choice)
                continue
            _call_cudnn(node, form, verdict)
            count += 1
        graph.eliminate_dead_code()
        return count


def refusals(node: torch.fx.Node, form: Form) -> list[str]:
    """Every reason why cuDNN cannot take this call of ``form``, or was not measured there; empty where it may."""
    query, key, value = (argument.meta["val"] for argument in node.args[:3])  # type: ignore[union-attr]
    slots = slots_of(node, form)
    reasons = []
    if query.device.type != "cuda" or torch.cuda.get_device_capability(query.device)[0] != 9:
        reasons.append("measured on compute capability 9.x only")
    elif not torch.backends.cudnn.is_available():
        reasons.append("cuDNN is not available")
    if not (_is_causal(node, form) or sees_everything(form.mask_of(slots), slots)):
        reasons.append("only plain causal or unmasked attention")
    if node.kwargs.get("softcap"):
        reasons.append("cuDNN's op has no soft-cap")
    if query.dtype not in DTYPES:
        reasons.append(f"only 16-bit inputs, got {query.dtype}")
    sizes = (*query.shape, *key.shape, *value.shape)
    if not all(isinstance(size, int) for size in sizes):
        reasons.append("a new length costs cuDNN a new plan, and the shapes are dynamic")
    elif query.shape[2] != key.shape[2] or query.shape[2] < SHORTEST or query.shape[0] == 0:
        reasons.append(f"only as many queries as keys, at least {SHORTEST}")
    if any(dim % 8 or dim > WIDEST for dim in (query.shape[3], value.shape[3])):
        reasons.append(f"head dims must be multiples of 8 up to {WIDEST}")
    if value.shape[1] != key.shape[1]:
        reasons.append("cuDNN wants a value head for every KV head")
    if not all(_is_dense(t) for t in (query, key, value)):
        reasons.append("only dense inputs, head-major or token-major")
    return reasons


def _beside_hopper(node: torch.fx.Node, form: Form) -> hopper.Verdict:
    """Whether the Hopper kernel takes a call that cuDNN may take, and if it can, which of ours and cuDNN was chosen."""
    query, key, value = (argument.meta["val"] for argument in node.args[:3])  # type: ignore[union-attr]
    slots = slots_of(node, form)
    return hopper.judge(
        node, form.mask_of(slots), slots, Sizes.of(query.shape, key.shape, value.shape), device=query.device,
        dtype=query.dtype, softcap=float(node.kwargs.get("softcap", 0.0)), cudnn=True,  # type: ignore[arg-type]
    )  # fmt: skip


def _is_causal(node: torch.fx.Node, form: Form) -> bool:
    """Whether the mask is torch's ``is_causal``."""
    slots = slots_of(node, form)
    return is_plain_causal(form.mask_of(slots), slots)


def _is_dense(t: torch.Tensor) -> bool:
    return t.is_contiguous() or t.transpose(1, 2).is_contiguous()


def _call_cudnn(node: torch.fx.Node, form: Form, verdict: hopper.Verdict) -> None:
    """Replace the node by cuDNN's, whose lse is the same natural logarithm, as ``[B, H, S, 1]``."""
    graph = node.graph
    query, key, value = node.args[:3]
    needs_lse, is_causal = output_is_read(node, 1), _is_causal(node, form)
    with graph.inserting_before(node):
        call = graph.call_function(
            CUDNN, (query, key, value, None, needs_lse, 0.0, is_causal, False), {"scale": node.kwargs.get("scale")}
        )
        out = graph.call_function(operator.getitem, (call, 0))
        outputs = [out]
        if needs_lse:
            lse = graph.call_function(operator.getitem, (call, 1))
            outputs.append(graph.call_function(torch.ops.aten.squeeze.dim, (lse, -1)))
    call.meta[OURS] = form.name
    with query.meta["val"].fake_mode:  # type: ignore[union-attr]
        for new in (call, *([lse] if needs_lse else []), *outputs):
            arguments, keywords = torch.fx.node.map_arg((new.args, new.kwargs), lambda n: n.meta["val"])
            new.meta["val"] = new.target(*arguments, **keywords)  # type: ignore[operator]
    for user in list(node.users):
        if user.users:
            user.replace_all_uses_with(outputs[user.args[1]])  # type: ignore[index]
        graph.erase_node(user)
    decisions.record(
        decisions.Decision(
            "lowered", form.name, node.name,
            "cuDNN's fused attention, measured faster than the template here; nothing fuses into it; not the Hopper "
            f"kernel: {'; '.join(verdict.against)}",
            {"module": module_of(node), "kernel": "cudnn", **verdict.facts},
        )
    )  # fmt: skip
    graph.erase_node(node)
