"""Compile an FX graph with Inductor, our passes and our lowerings in place, leaving Inductor's global config alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from custom_ops.forms import FORMS
from inductor_passes import (
    BLOCK_MASKS_OPTION,
    EPILOGUES_OPTION,
    LIBRARY_OPTION,
    QUERIES_OPTION,
    RECOGNISE_OPTION,
    compat,
    decisions,
    store,
)
from inductor_passes import lowering as _lowering  # noqa: F401  (registers the lowering of the grouped op)
from inductor_passes.fuse_epilogue import FuseEpilogue
from inductor_passes.fusions import ReportFusions
from inductor_passes.graph_pass import Chain, GraphPass
from inductor_passes.group import GroupForms
from inductor_passes.hopper import KeepTemplate
from inductor_passes.library import PreferLibrary
from inductor_passes.merge_heads import MergeHeads
from inductor_passes.paged_lowering import PreferPortable
from inductor_passes.prologues import ComputeQueries
from inductor_passes.recognise import Recognise
from inductor_passes.separate_caches import SeparateCaches
from inductor_passes.share_angles import ShareAngles
from inductor_passes.share_schedule import ShareSchedule
from inductor_passes.store_pieces import StorePieces

HOOK = "post_grad_custom_pre_pass"
"""Where form ops are grouped: after autograd and decompositions, before Inductor's own post-grad passes."""

SCHEDULED = "_post_fusion_custom_pass"
"""Where Inductor's schedule is final."""


def compile_with_passes(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    **keywords: Any,
) -> Any:
    """Compile ``gm``; ``mode`` and ``options`` mean what they mean for Inductor. Returns the compiled callable.

    Two options are our own, both True by default. ``library_kernels=False`` keeps every form and every paged call on
    our templates, which Inductor can fuse into, also where another kernel was measured faster. ``recognise=False``
    leaves attention that is written without our ops as it is; else what means a form becomes its op first. A third,
    ``trust_block_masks`` (False by default), takes the user's word that FlexAttention's BlockMasks from outside of the
    graph were made by ``create_block_mask`` of their own ``mask_mod``; a fourth, ``compute_queries`` (False by
    default), computes in the attention kernel what makes its queries. A pass that the user has in the same hook,
    through ``options`` or Inductor's config, runs after ours. A graph with attention of ours starts from
    ``compat.template_options``, one that reads or writes a KV cache from ``compat.serving_options``, which ``mode`` and
    ``options`` override, and both compute RoPE's angles once, the first in inference alone.
    """
    if keywords:
        raise TypeError(f"backend 'lowered_attn': expected mode and options, got also {sorted(keywords)}; remove them")
    patches: dict[str, Any] = {}
    if mode is not None and mode != "default":
        patches.update(compat.mode_options(mode))
    patches.update(options or {})
    with compat.prologues_first():
        return compat.compile_fx(gm, example_inputs, config_patches=with_passes(gm, patches))


def with_passes(gm: torch.fx.GraphModule, options: Mapping[str, Any], last: Sequence[GraphPass] = ()) -> dict[str, Any]:
    """Inductor's config for ``gm``: ``options``, read as ``compile_with_passes`` says, and our passes, ``last`` behind.

    Attention that ``gm`` writes without our ops is recognised at once, in ``gm`` itself.
    """
    patches = {name.replace("-", "_"): value for name, value in options.items()}
    trust_block_masks = patches.pop(BLOCK_MASKS_OPTION, False)
    recognise = [Recognise(trust_block_masks)] if patches.pop(RECOGNISE_OPTION, True) else []
    for one in recognise:
        recognise_in(gm, one)
    serving, attending = serves(gm), attends(gm)
    if attending:
        patches = {**compat.template_options(), **patches}
    if serving:
        store.check_caches(gm)
        patches = {**compat.serving_options(), **patches}
    fuse = [FuseEpilogue()] if patches.pop(EPILOGUES_OPTION, True) else []
    prefer: list[GraphPass] = [PreferLibrary(), *fuse]
    if not patches.pop(LIBRARY_OPTION, True):
        prefer = [KeepTemplate(), PreferPortable()]
    group = GroupForms(reports=not recognise)
    ours: list[GraphPass] = [*prefer, SeparateCaches(), StorePieces(), ShareSchedule(), group, MergeHeads()]
    if patches.pop(QUERIES_OPTION, False):
        ours.append(ComputeQueries())
    if serving or (attending and not torch.is_grad_enabled()):
        ours.append(ShareAngles())
    users = patches.get(HOOK, getattr(compat.config, HOOK))
    users_passes = list(users) if isinstance(users, (list, tuple)) else [users] if users is not None else []
    patches[HOOK] = Chain(*ours, *last, *users_passes, after=recognise)
    if decisions.is_recording():
        patches[SCHEDULED] = ReportFusions(patches.get(SCHEDULED, getattr(compat.config, SCHEDULED)))
    return patches


def recognise_in(gm: torch.fx.GraphModule, recognise: Recognise) -> None:
    """Run the pass on a graph as Dynamo made it and on the graphs inside it, such as checkpointed layers."""
    for module in list(gm.modules()):
        if isinstance(module, torch.fx.GraphModule):
            before = recognise.rewritten
            recognise(module.graph)
            if recognise.rewritten != before:
                module.recompile()


def attends(gm: torch.fx.GraphModule) -> bool:
    """Whether a graph as Dynamo made it, and ``Recognise`` rewrote it, calls a form op."""
    return bool(compat.calls_of(gm, {target for form in FORMS.values() for target in (form.op, form.op.default)}))


def serves(gm: torch.fx.GraphModule) -> bool:
    """Whether a graph as Dynamo made it reads or writes a KV cache."""
    ops = torch.ops.lowered_attn
    packets = (ops.store_kv_cache, ops.store_latent_cache, ops.paged_attention, ops.paged_latent_attention)
    return bool(compat.calls_of(gm, {*packets, *(packet.default for packet in packets)}))
