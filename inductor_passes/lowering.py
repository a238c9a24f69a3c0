"""The lowering of ``lowered_attn::grouped_attention``.

On a GPU the op itself where the Hopper kernel takes it, else a grouped Triton template; torch's flash kernel on a CPU.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import sympy
import torch

from custom_ops.cpu import is_plain_causal, sees_everything
from custom_ops.form import Slots
from custom_ops.forms import FORMS
from custom_ops.kernels.gluon.dense_choice import HOPPER
from custom_ops.kernels.gluon.dense_cost import Sizes
from custom_ops.kernels.specialise import architecture, constants, kernel_operands, may_be_full
from custom_ops.kernels.tile_config import (
    DESCRIPTOR_ALIGNMENT,
    TileConfig,
    can_use_descriptors,
    forward_config,
    heads_together,
)
from custom_ops.masks import Mask
from inductor_passes import compat, decisions, fusions, hopper, prologues
from inductor_passes.group import GROUPED, output_is_read
from inductor_passes.templates import attention_template

CANDIDATES = tuple(
    TileConfig(block_m, block_n, warps, stages, descriptors)
    for block_m, block_n, warps in ((128, 128, 8), (128, 64, 8), (64, 64, 4), (128, 32, 8), (64, 32, 4))
    for stages in (2, 3)
    for descriptors in (False, True)
)
"""Tilings that ``max_autotune`` times beside the shipped one; those that do not fit a GPU drop out by themselves."""


@compat.register_lowering(GROUPED, type_promotion_kind=None)
def lower_grouped_attention(
    query: Any, key: Any, value: Any,
    key_padding: Any, q_start: Any, query_value: Any, key_value: Any, request_value: Any,
    form_name: str, ints: list[Any], scale: float, softcap: float = 0.0,
) -> tuple[Any, Any]:  # fmt: skip
    """``(out, lse)`` of one grouped op as Inductor IR."""
    form = FORMS[form_name]
    slots = Slots(
        key_padding, q_start, query_value, key_value, request_value, tuple(compat.static_int(i) for i in ints)
    )
    mask = form.mask_of(slots)
    device = query.get_device()
    if device.type != "cuda":
        return _lower_on_cpu(mask, query, key, value, slots, form_name, scale, softcap)
    return _lower_on_cuda(mask, query, key, value, slots, form_name, scale, softcap)


def _record(form_name: str, detail: str, **facts: object) -> None:
    decisions.record(decisions.Decision("lowered", form_name, compat.current_node().name, detail, facts))


def _lower_on_cpu(
    mask: Mask, query: Any, key: Any, value: Any, slots: Slots, form_name: str, scale: float, softcap: float
) -> tuple[Any, Any]:
    """Plain causal attention, and attention without a mask, are torch's own op; all else is the CPU path in chunks."""
    query_len, key_len = query.get_size()[2], key.get_size()[2]
    same_dim = compat.static_int(query.get_size()[3]) == compat.static_int(value.get_size()[3])
    same_heads = compat.static_int(key.get_size()[1]) == compat.static_int(value.get_size()[1])
    not_empty = compat.known_true(sympy.Gt(query_len, 0)) and compat.known_true(sympy.Gt(query.get_size()[0], 0))
    causal = is_plain_causal(mask, slots) and compat.known_true(sympy.Eq(query_len, key_len))
    everything = sees_everything(mask, slots) and compat.known_true(sympy.Gt(key_len, 0))
    if same_dim and same_heads and not softcap and not_empty and (causal or everything):
        _record(form_name, f"torch's CPU flash attention, {'causal' if causal else 'no mask'}", kernel="cpu_flash")
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        out, lse = compat.lower(op, query, key, value, 0.0, causal, scale=scale)
        return out, lse
    how = "torch's CPU flash attention" if same_heads else "explicit scores over values that KV heads share"
    if softcap:
        how = "explicit scores, capped"
    _record(form_name, f"{how}, in chunks of queries cut to the keys they see", kernel="cpu_chunks")
    return _call_op(query, key, value, slots, form_name, scale, softcap)


def _lower_on_cuda(
    mask: Mask, query: Any, key: Any, value: Any, slots: Slots, form_name: str, scale: float, softcap: float
) -> tuple[Any, Any]:
    """The op itself where the Hopper kernel takes the call, else a template; nothing where there are no queries."""
    batch, heads, query_len, _ = query.get_size()
    if any(compat.known_true(sympy.Eq(size, 0)) for size in (batch, query_len)):
        _record(form_name, "nothing to compute: no queries", kernel="none")
        device, value_dim = query.get_device(), value.get_size()[3]
        out = compat.empty_strided([batch, query_len, heads, value_dim], query.get_dtype(), device)
        lse = compat.empty_strided([batch, heads, query_len], torch.float32, device)
        return compat.permute(out, (0, 2, 1, 3)), lse
    sizes = Sizes.of(*(_sizes(t) for t in (query, key, value)))
    judge = functools.partial(
        hopper.judge, compat.current_node(), mask, slots, sizes, device=query.get_device(),
        dtype=query.get_dtype(), softcap=softcap,
    )  # fmt: skip
    verdict = judge()
    if not verdict.against:
        query, key, value = (compat.unit_last_stride(t) for t in (query, key, value))
        verdict = judge(aligned=all(hopper.can_copy(t) for t in (query, key, value)))
    timed = compat.config.max_autotune and not output_is_read(compat.current_node(), 1)
    if not verdict.against and not timed:
        return _lower_to_hopper(query, key, value, slots, form_name, scale, softcap, verdict)
    return _lower_to_template(mask, query, key, value, slots, form_name, scale, softcap, verdict)


def _sizes(box: Any) -> list[int]:
    """Of ``[B, H, L, D]``: heads and head dim, which every kernel is compiled for, and hints of the others."""
    batch, heads, length, dim = box.get_size()
    return [compat.size_hint(batch), compat.static_int(heads), compat.size_hint(length), compat.static_int(dim)]


def _lower_to_hopper(
    query: Any, key: Any, value: Any, slots: Slots, form_name: str, scale: float, softcap: float,
    verdict: hopper.Verdict,
) -> tuple[Any, Any]:  # fmt: skip
    """The op itself, which takes the Hopper kernel."""
    slots = hopper.slots_with(slots, operands_in_memory(slots))
    out, lse = _call_op(query, key, value, slots, form_name, scale, softcap)
    again = dict.fromkeys(("k", "v"), fusions.AGAIN)
    fusions.watch(out, form_name, {"q": query, "k": key, "v": value}, again, hopper.OPAQUE)
    assert verdict.choice is not None  # it is there whenever nothing is against the kernel
    _record(
        form_name, f"the Hopper kernel, called as an op, into which Inductor fuses nothing; {verdict.choice.reason}",
        kernel=HOPPER, architecture=hopper.ARCHITECTURE,
        writes_lse=output_is_read(compat.current_node(), 1), **verdict.facts,
    )  # fmt: skip
    return out, lse


def _call_op(
    query: Any, key: Any, value: Any, slots: Slots, form_name: str, scale: float, softcap: float
) -> tuple[Any, Any]:
    out, lse = compat.fallback(GROUPED)(query, key, value, *slots[:-1], form_name, list(slots.ints), scale, softcap)
    return out, lse


def _lower_to_template(
    mask: Mask, query: Any, key: Any, value: Any, slots: Slots, form_name: str, scale: float, softcap: float,
    verdict: hopper.Verdict,
) -> tuple[Any, Any]:  # fmt: skip
    """One grouped Triton kernel, with the shipped tiling; with ``max_autotune``, the best of the candidates.

    Those are tilings, and the Hopper kernel where nothing is against it.
    """
    against_hopper = verdict.against
    device, dtype = query.get_device(), query.get_dtype()
    call_sizes = query.get_size()
    batch, heads, query_len, _ = call_sizes
    kv_heads, value_heads, head_dim, value_dim = (
        compat.static_int(t.get_size()[i]) for t, i in ((key, 1), (value, 1), (key, 3), (value, 3))
    )
    heads = compat.static_int(heads)
    out_size = [batch, query_len, heads, value_dim]
    lse_size = [batch, heads, query_len]
    if against_hopper:
        given = prologues.offer(query, head_dim, list(attention_template.QUERY_ORDERS))
    else:
        given = prologues.Query(query, None, hopper.TIMED)
    query = compat.unit_last_stride(given.box) if given.order is None else compat.realized(given.box)
    key, value = compat.unit_last_stride(key), compat.unit_last_stride(value)
    operands = operands_in_memory(slots)
    lse = compat.empty_strided(lse_size, torch.float32, device)
    writes_lse = output_is_read(compat.current_node(), 1)
    layout = compat.ir.FixedLayout(device, dtype, out_size)
    fixed = constants(
        mask, slots, group=heads // kv_heads, sharing=kv_heads // value_heads, head_dim=head_dim, value_dim=value_dim,
        dtype=dtype, softcap=softcap,
    )  # fmt: skip
    shared = {
        **fixed,
        "PRECISION": repr(fixed["PRECISION"]),  # templates print values as source text
        "KV_HEADS": kv_heads,
        "SCALE": scale,
        "SOFTCAP": softcap,
        "INTS": slots.ints or (0,),
        "WRITES_LSE": writes_lse,
        "HEADS_TOGETHER": _heads_together(
            device, batch, kv_heads, key, head_dim + value_dim * value_heads // kv_heads, dtype
        ),
    }
    inputs = [query, key, value, *([lse] if writes_lse else []), *operands.values()]
    template = attention_template.template_of(mask, tuple(operands), writes_lse, given.order)
    arch = architecture(device)
    width = mask.width_for(slots.ints)
    may_use_descriptors = can_use_descriptors(arch, slots.key_padding is not None) and compat.scratch_is_safe()
    fits = may_use_descriptors and all(
        compat.multiple_of(offset * dtype.itemsize, DESCRIPTOR_ALIGNMENT)
        for t in (key, value)
        for offset in (t.get_layout().offset, *t.get_stride()[:3])
    )
    config = forward_config(arch, dtype, head_dim, value_dim, width, fits)
    configs = [config]
    if compat.config.max_autotune:
        configs += [c for c in CANDIDATES if c != config and (fits or not c.descriptors)]
    choices: list[Any] = []
    for c in configs:
        error = template.maybe_append_choice(
            choices, input_nodes=inputs, layout=layout, call_sizes=call_sizes,
            mutated_inputs=[lse] if writes_lse else None, DESCRIPTORS=c.descriptors,
            num_stages=c.num_stages, num_warps=c.num_warps, BLOCK_M=c.block_m, BLOCK_N=c.block_n,
            MAY_BE_FULL=may_be_full(mask, slots.ints, c.block_n), **shared,
        )  # fmt: skip
        if error is not None and len(configs) == 1:
            raise error
    if not against_hopper:
        hopper.CHOICE.maybe_append_choice(
            choices, input_nodes=inputs, layout=layout, form=form_name, names=tuple(operands), ints=slots.ints,
            scale=scale, softcap=softcap,
        )  # fmt: skip
    out = compat.select(template.name, choices, inputs, layout)
    node = compat.current_node().name
    facts = {
        "template": template.name, "configs": [str(c) for c in configs], "architecture": arch,
        "writes_lse": writes_lse, **verdict.facts,
    }  # fmt: skip

    def settle(is_hopper: bool) -> str:
        detail = _sentence(configs, arch, against_hopper, is_hopper)
        kernel = HOPPER if is_hopper else "triton_grouped"
        decisions.record(decisions.Decision("lowered", form_name, node, detail, {"kernel": kernel, **facts}))
        return hopper.OPAQUE if is_hopper else ""

    if against_hopper:
        settle(False)
    refusal = {"q": given.refusal} if given.refusal else {}
    again = dict.fromkeys(("k", "v"), fusions.AGAIN)
    inputs_by_name = {"q": query, "k": key, "v": value}
    fusions.watch(out, form_name, inputs_by_name, refusal | again, settle=None if against_hopper else settle)
    return compat.permute(out, (0, 2, 1, 3)), lse


_operands: weakref.WeakKeyDictionary[Any, dict[torch.fx.Node, Any]] = weakref.WeakKeyDictionary()
"""By graph, its contiguous operands by the nodes that made them: layers that share an operand share its memory."""


def operands_in_memory(slots: Slots) -> dict[str, Any]:
    """The tensor operands by their names in kernels, contiguous; computed once, however many layers read them."""
    made = _operands.setdefault(compat.current_graph(), {})
    arguments: Any = compat.current_node().args
    nodes = kernel_operands(Slots._make([*arguments[3:8], ()]))
    for name, box in kernel_operands(slots).items():
        if box is not None and nodes[name] not in made:
            made[nodes[name]] = compat.contiguous(box)
    return {name: made[node] for name, node in nodes.items() if node is not None}


def _sentence(configs: list[TileConfig], arch: int, against_hopper: list[str], is_hopper: bool) -> str:
    if not against_hopper:
        kernel = "the Hopper kernel" if is_hopper else "grouped Triton template"
        return f"{kernel}, by autotuning the fastest of the Hopper kernel and {len(configs)} tilings of the template"
    tiling = str(configs[0]) if len(configs) == 1 else f"best of {len(configs)} tilings by autotuning"
    why = f"; not the Hopper kernel: {'; '.join(against_hopper)}" if arch == hopper.ARCHITECTURE else ""
    return f"grouped Triton template, {tiling}{why}"


def _heads_together(device: torch.device, batch: Any, kv_heads: int, key: Any, dims: int, dtype: torch.dtype) -> int:
    bytes_a_head = compat.size_hint(key.get_size()[2]) * dims * dtype.itemsize
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    return heads_together(l2_bytes, compat.size_hint(batch) * kv_heads, bytes_a_head)
