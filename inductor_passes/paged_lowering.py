"""The lowering of ``lowered_attn::paged_attention``: a template that Inductor fuses into, or the op itself.

Where the Hopper kernel takes a call, the op is called as it is: nothing fuses into it, and it is faster.
"""

from __future__ import annotations

from typing import Any

import torch

from custom_ops.kernels.paged_config import PagedConfig
from custom_ops.kernels.paged_specialise import attention_constants
from custom_ops.kernels.specialise import FP8_ARCHITECTURE, architecture
from custom_ops.paged.call import PagedCall
from custom_ops.paged.layout import FP8
from custom_ops.paged.schedule import ScheduleCall, config_of
from inductor_passes import compat, decisions
from inductor_passes.graph_pass import GraphPass
from inductor_passes.group import module_of, output_is_read
from inductor_passes.share_schedule import ATTENTION, SCHEDULE, bound_arguments
from inductor_passes.templates import paged_template


class PreferPortable(GraphPass):
    """Ask for the portable kernel in every paged call, so that none takes one that Inductor cannot fuse into."""

    def rewrite(self, graph: torch.fx.Graph) -> int:
        count = 0
        for target in (SCHEDULE, ATTENTION):
            for node in graph.find_nodes(op="call_function", target=target):
                if bound_arguments(node)["impl"] == "triton_grouped":
                    node.update_kwarg("impl", "triton_portable")
                    count += 1
        return count


@compat.register_lowering(ATTENTION, type_promotion_kind=None)
def lower_paged_attention(*arguments: Any, **keywords: Any) -> tuple[Any, Any]:
    """``(out, lse)`` of one paged op as Inductor IR."""
    boxes = PagedCall(*arguments, **keywords)
    example_arguments, example_keywords = compat.example_arguments(compat.current_node())
    example = PagedCall(*example_arguments, **example_keywords)
    reasons = _against_template(example)
    if reasons:
        _record(example, f"the op itself: {'; '.join(reasons)}", kernel="op")
        out, lse = compat.fallback(ATTENTION)(*arguments, **keywords)
        return out, lse
    return _lower_to_template(boxes, example, config_of(ScheduleCall.of(example)))


def _against_template(call: PagedCall) -> list[str]:
    """Every reason to call the op instead, which takes whatever the template does not."""
    if call.q.device.type != "cuda":
        return [f"the one path on {call.q.device.type}"]
    config = config_of(ScheduleCall.of(call))
    if config.kernel != "triton":
        return [f"its {config.kernel} kernel takes the call, faster than one that Inductor fuses into"]
    reasons = []
    if call.schedule is None:
        reasons.append("it has no schedule, and makes its own")
    if call.layout not in paged_template.STRIDES:
        reasons.append(f"layout {call.layout!r} is not one of {', '.join(paged_template.STRIDES)}")
    if call.k_cache.dtype == FP8 and architecture(call.q.device) < FP8_ARCHITECTURE:
        reasons.append(f"Triton reads float8_e4m3fn from sm_{FP8_ARCHITECTURE} on")
    if call.k_cache.stride(-1) != 1 or (call.layout == "unified" and call.v_cache.stride(-1) != 1):
        reasons.append("elements of the caches do not lie side by side, and a cache is never copied")
    if call.q.shape[0] == 0:
        reasons.append("there are no rows")
    return reasons


def _record(call: PagedCall, detail: str, **facts: object) -> None:
    node = compat.current_node()
    facts = {"module": module_of(node), "mode": call.mode, "impl": call.impl, **facts}
    decisions.record(decisions.Decision("lowered", "paged_attention", node.name, detail, facts))


def _lower_to_template(boxes: Any, example: PagedCall, config: PagedConfig) -> tuple[Any, Any]:
    """``boxes`` are the call's arguments in the compiler's graph, ``example`` the same as fake tensors."""
    device, dtype, size = boxes.q.get_device(), boxes.q.get_dtype(), boxes.q.get_size()
    constants = attention_constants(example, config)
    writes_lse = output_is_read(compat.current_node(), 1)
    rows = 2 * config.programs * config.block_m
    lse = compat.empty_strided(size[:2], torch.float32, device)
    written = {
        "PARTS": compat.empty_strided([rows * constants["D_PAD"]], torch.float32, device),
        "PART_STATS": compat.empty_strided([2 * rows], torch.float32, device),
        **({"LSE": lse} if writes_lse else {}),
    }
    given = {
        "Q": compat.realize_inputs(boxes.q),
        "K_CACHE": compat.realized(boxes.k_cache),
        "V_CACHE": compat.realized(boxes.v_cache),
        "PAGE_TABLES": compat.realize_inputs(boxes.page_tables),
        **written,
    }
    given |= {n: compat.realize_inputs(t) for n, t in (("K", boxes.k), ("V", boxes.v)) if t is not None}
    whole = {"SCHEDULE": boxes.schedule, "SINKS": boxes.sinks, "K_SCALE": boxes.k_scale, "V_SCALE": boxes.v_scale}
    given |= {n: compat.contiguous(compat.realize_inputs(t)) for n, t in whole.items() if t is not None}
    if example.direct and constants["SAME_STRIDES"]:
        # The compiler may lay k and v out in another way than eager code would.
        rows_apart = (given[name].get_stride()[0] for name in ("K", "V"))
        constants["SAME_STRIDES"] = compat.known_true(compat.equal(*rows_apart))
    names = tuple(name for name in paged_template.ARGUMENTS if name in given)
    inputs = [given[name] for name in names]
    template = paged_template.template_of(example.mask, example.layout, names)
    layout = compat.ir.FixedLayout(device, dtype, size)
    choices: list[Any] = []
    error = template.maybe_append_choice(
        choices, input_nodes=inputs, layout=layout, call_sizes=size, mutated_inputs=list(written.values()),
        num_stages=config.num_stages, num_warps=config.num_warps,
        **{**constants, "PRECISION": repr(constants["PRECISION"])},  # templates print values as source text
        TILE_TOKENS=config.tile_tokens, PROGRAMS=config.programs, SCALE=example.score_scale, SOFTCAP=example.softcap,
        WRITES_LSE=writes_lse,
    )  # fmt: skip
    if error is not None:
        raise error
    out = compat.select(template.name, choices, inputs, layout)
    _record(
        example, f"paged Triton template, {config}", kernel="triton_paged", template=template.name,
        config=str(config), writes_lse=writes_lse,
    )  # fmt: skip
    return out, lse
