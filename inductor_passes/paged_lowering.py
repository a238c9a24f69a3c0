"""The lowering of ``lowered_attn::paged_attention`` and ``paged_latent_attention``: a template that Inductor fuses
into, or the op itself.

Where the Hopper kernel takes a call, the op is called as it is: nothing fuses into it, and it is faster.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from custom_ops.kernels.paged_config import PagedConfig
from custom_ops.kernels.paged_specialise import attention_constants
from custom_ops.kernels.specialise import FP8_ARCHITECTURE, architecture
from custom_ops.paged.call import PagedCall
from custom_ops.paged.layout import FP8
from custom_ops.paged.schedule import ScheduleCall, config_of
from inductor_passes import compat, decisions, fusions
from inductor_passes.graph_pass import GraphPass
from inductor_passes.group import module_of, output_is_read
from inductor_passes.share_schedule import CALLS, SCHEDULE, bound_arguments, call_of
from inductor_passes.templates import paged_template

PARTS = "several programs load it, each for a part of the keys, so it is computed once, where new keys are stored"
"""Why nothing that a paged call loads is a prologue."""


class PreferPortable(GraphPass):
    """Ask for the portable kernel in every paged call, so that none takes one that Inductor cannot fuse into."""

    def rewrite(self, graph: torch.fx.Graph) -> int:
        count = 0
        for target in (SCHEDULE, *CALLS):
            for node in graph.find_nodes(op="call_function", target=target):
                if bound_arguments(node)["impl"] == "triton_grouped":
                    node.update_kwarg("impl", "triton_portable")
                    count += 1
        return count


class _Boxes(NamedTuple):
    """What a kernel reads of a call, in the compiler's graph: of either op, by the names of ``PagedCall``."""

    q: Any
    k: Any
    k_cache: Any
    page_tables: Any
    schedule: Any
    v: Any = None
    v_cache: Any = None
    sinks: Any = None
    k_scale: Any = None
    v_scale: Any = None


KEYS_OF = {"latent": "k", "latent_cache": "k_cache"}
"""A latent is the key of its token, and its value is in it."""


def _lower_attention(target: Any, *arguments: Any, **keywords: Any) -> tuple[Any, Any]:
    """``(out, lse)`` of one call of a paged op as Inductor IR."""
    example = call_of(compat.current_node())
    reasons = _against_template(example)
    if reasons:
        _record(example, f"the op itself: {'; '.join(reasons)}", kernel="op")
        out, lse = compat.fallback(target)(*arguments, **keywords)
        return out, lse
    named = dict(zip((a.name for a in target._schema.arguments), arguments, strict=False)) | keywords
    named = {KEYS_OF.get(name, name): box for name, box in named.items()}
    boxes = _Boxes(**{name: box for name, box in named.items() if name in _Boxes._fields})
    return _lower_to_template(boxes, example, config_of(ScheduleCall.of(example)))


for _target in CALLS:
    compat.register_lowering(_target, type_promotion_kind=None)(functools.partial(_lower_attention, _target))


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
    if _cache_kind(call) not in paged_template.STRIDES:
        reasons.append(f"there is no template for layout {call.layout!r}")
    if call.k_cache.dtype == FP8 and architecture(call.q.device) < FP8_ARCHITECTURE:
        reasons.append(f"Triton reads float8_e4m3fn from sm_{FP8_ARCHITECTURE} on")
    if call.k_cache.stride(-1) != 1 or (call.layout == "unified" and call.v_cache.stride(-1) != 1):
        reasons.append("elements of the caches do not lie side by side, and a cache is never copied")
    if call.q.shape[0] == 0:
        reasons.append("there are no rows")
    return reasons


def _cache_kind(call: PagedCall) -> str:
    """What the template calls the caches: by their layout, which latents have none of."""
    return "latent" if call.latent else call.layout


def _record(call: PagedCall, detail: str, **facts: object) -> None:
    node = compat.current_node()
    facts = {"module": module_of(node), "mode": call.mode, "impl": call.impl, **facts}
    decisions.record(decisions.Decision("lowered", call.op, node.name, detail, facts))


def _lower_to_template(boxes: _Boxes, example: PagedCall, config: PagedConfig) -> tuple[Any, Any]:
    """``example`` is the call with fake tensors."""
    device, dtype = boxes.q.get_device(), boxes.q.get_dtype()
    size = [*boxes.q.get_size()[:2], example.out_dim]
    constants = attention_constants(example, config)
    writes_lse = output_is_read(compat.current_node(), 1)
    rows = config.scratch_rows
    lse = compat.empty_strided(size[:2], torch.float32, device)
    written = {
        "PARTS": compat.empty_strided([rows * constants["DV_PAD"]], torch.float32, device),
        "PART_STATS": compat.empty_strided([2 * rows], torch.float32, device),
        **({"LSE": lse} if writes_lse else {}),
    }
    given = {
        "Q": compat.unit_last_stride(boxes.q),
        "PAGE_TABLES": compat.unit_last_stride(boxes.page_tables),
        **written,
    }
    # Caches stay as they are, whatever their strides.
    caches = {"K_CACHE": boxes.k_cache, "V_CACHE": boxes.v_cache}
    given |= {n: compat.realized(t) for n, t in caches.items() if t is not None}
    given |= {n: compat.unit_last_stride(t) for n, t in (("K", boxes.k), ("V", boxes.v)) if t is not None}
    whole = {"SCHEDULE": boxes.schedule, "SINKS": boxes.sinks, "K_SCALE": boxes.k_scale, "V_SCALE": boxes.v_scale}
    given |= {n: compat.contiguous(compat.realized(t)) for n, t in whole.items() if t is not None}
    if boxes.v is not None and constants["SAME_STRIDES"]:
        # The compiler may lay k and v out in another way than eager code would.
        rows_apart = (given[name].get_stride()[0] for name in ("K", "V"))
        constants["SAME_STRIDES"] = compat.known_true(compat.equal(*rows_apart))
    names = tuple(name for name in paged_template.ARGUMENTS if name in given)
    inputs = [given[name] for name in names]
    template = paged_template.template_of(example.mask, _cache_kind(example), names)
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
    new = {name: given[name.upper()] for name in ("q", "k", "v") if name.upper() in given}
    fusions.watch(out, example.op, new, dict.fromkeys(new, PARTS))
    over = f" over latents of {size[2]} + {constants['D'] - size[2]} elements" if example.latent else ""
    _record(
        example, f"paged Triton template{over}, {config}", kernel="triton_paged", template=template.name,
        config=str(config), writes_lse=writes_lse,
    )  # fmt: skip
    return out, lse
