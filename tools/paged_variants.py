"""Who is measured on paged attention: lowered-attn's ops, and its peers over the same cache.

Each is one step as an engine would run it: all that depends on the lengths of the step is computed inside the clock,
lowered-attn's schedule and FlashAttention-3's own included. What depends on shapes alone is made before.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor

from tools.paged_cases import PagedProblem
from tools.variants import Prepared, Unavailable, Variant, peers, peers_with_fa3

# ------------------------------------------------------------------ ours


def _schedule_call(problem: PagedProblem, direct: bool, impl: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `paged_schedule`, by position and by name."""
    case, inputs = problem.case, problem.inputs
    keywords = {
        "num_tokens": case.tokens,
        "num_heads": case.query_heads,
        "num_kv_heads": case.kv_heads,
        "head_dim": case.head_dim,
        "page_size": case.page_size,
        "dtype": case.dtype,
        "cache_dtype": case.dtype,
        "direct": direct,
        "mode": case.mode,
        "block_size": case.block_size,
        "impl": impl,
        "value_dim": case.value_dim,
    }
    return (inputs.cu_seqlens_q, inputs.context_lens, None, []), keywords


def schedule_of(problem: PagedProblem, direct: bool = False, impl: str = "triton_grouped") -> Tensor:
    """The step's schedule: what attention reads, made once a step for all layers."""
    import lowered_attn  # noqa: F401  registers the ops

    arguments, keywords = _schedule_call(problem, direct, impl)
    return torch.ops.lowered_attn.paged_schedule(*arguments, **keywords)


def tilings(problem: PagedProblem) -> dict[str, str]:
    """Which kernel our variants take on this GPU, and how it is tiled."""
    from custom_ops.paged.schedule import ScheduleCall, config_of

    found = {}
    for name, direct, impl in (
        ("ours", False, "triton_grouped"),
        ("ours-direct", True, "triton_grouped"),
        ("ours-triton", False, "triton_portable"),
    ):
        arguments, keywords = _schedule_call(problem, direct, impl)
        try:
            found[name] = str(config_of(ScheduleCall(*arguments, **keywords)))
        except Exception as error:  # the variant's row fails with it; the peers' rows stay
            found[name] = f"{type(error).__name__}: {error}"
    return found


def _ours(
    problem: PagedProblem, direct: bool = False, impl: str = "triton_grouped", shared_schedule: bool = False
) -> Prepared:
    """Schedule and attention; with `shared_schedule`, attention alone, as every layer but a step's first runs it."""
    import lowered_attn  # noqa: F401  registers the ops

    case, inputs = problem.case, problem.inputs
    made = schedule_of(problem, direct, impl) if shared_schedule else None

    def run() -> tuple[Tensor, Tensor]:
        schedule = schedule_of(problem, direct, impl) if made is None else made
        lengths: tuple[Any, ...] = (inputs.cu_seqlens_q, inputs.context_lens, inputs.page_tables, None, [], schedule)
        names = {"mode": case.mode, "block_size": case.block_size, "scale": case.score_scale, "impl": impl}
        key, value = (inputs.key, inputs.value) if direct else (None, None)
        if case.value_dim is None:
            caches = (inputs.k_cache, inputs.v_cache)
            return torch.ops.lowered_attn.paged_attention(inputs.query, key, value, *caches, *lengths, **names)
        latent, cache = None if key is None else key[:, 0], inputs.k_cache[:, :, 0]
        return torch.ops.lowered_attn.paged_latent_attention(
            inputs.query, latent, cache, *lengths, value_dim=case.value_dim, **names
        )

    return Prepared(run, lambda result: (result[0],))


# ------------------------------------------------------------------ peers


def _fa3(problem: PagedProblem) -> Prepared:
    """FlashAttention-3 through its page table.

    It has a causal flag and no block mask: where a request's new tokens are one block, they see all of its keys; where
    they are several, each block becomes a sequence whose keys end with it, over the same pages.
    """
    module = peers_with_fa3()
    case, inputs = problem.case, problem.inputs
    starts, lengths, tables = [0], [], []
    for index, (cached, new) in enumerate(case.requests):
        step = case.block_size if case.mode == "block_causal" else new
        if case.mode == "block_causal" and (cached % step or new % step):
            raise Unavailable("blocks that are cut by a request's ends have no equal in FlashAttention-3")
        for last in range(step, new + 1, step):
            starts.append(starts[-1] + step)
            lengths.append(cached + last)
            tables.append(index)
    device = inputs.query.device
    arguments = (
        inputs.query,
        inputs.k_cache,
        inputs.v_cache,
        torch.tensor(starts, dtype=torch.int32, device=device),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        inputs.page_tables[torch.tensor(tables, device=device)].contiguous(),
        max(after - before for before, after in zip(starts, starts[1:], strict=False)),
        max(lengths),
    )
    causal = case.mode == "causal"
    if case.value_dim is None:
        return Prepared(lambda: module.fa3_paged(*arguments, causal=causal), lambda out: (out,))
    # Of a latent it takes the rotary part as key and the rest as value, and the query in two parts alike. It scales by
    # its key's width: the query makes up for the difference.
    query, k_cache, v_cache, *rest = arguments
    rotary = case.head_dim - case.value_dim
    query = query * (case.score_scale * rotary**0.5)
    q_value, q_rotary = (part.contiguous() for part in query.split((case.value_dim, rotary), -1))
    keys = k_cache[..., case.value_dim :]
    return Prepared(
        lambda: module.fa3_paged(q_rotary, keys, v_cache, *rest, causal=causal, q_v=q_value), lambda out: (out,)
    )


def _flashmla(problem: PagedProblem) -> Prepared:
    """FlashMLA's dense decode kernel: as many new tokens in every request; its schedule is made inside the clock."""
    case, inputs = problem.case, problem.inputs
    if case.value_dim is None or case.mode != "causal":
        raise Unavailable("FlashMLA computes causal attention over latents")
    if len({new for _, new in case.requests}) > 1 or case.page_size != 64:
        raise Unavailable("FlashMLA takes as many new tokens in every request, and pages of 64")
    module = peers()
    query = inputs.query.unflatten(0, (len(case.requests), -1))
    lengths = inputs.context_lens + inputs.cu_seqlens_q.diff()
    arguments = (query, inputs.k_cache, inputs.page_tables, lengths, case.value_dim, case.score_scale, True)
    return Prepared(lambda: module.flashmla(*arguments, plan={}), lambda out: (out.flatten(0, 1),))


VLLM_LEAST_PROGRAMS = 128
"""vLLM splits the keys of a decode step where requests times KV heads are at most this many."""


def _name_stubs(module: Any) -> None:
    """Give the adapter's stand-ins for vLLM a file each: Dynamo, which compiles later cases, looks at every module."""
    module._stub_vllm()
    for name, stub in list(sys.modules.items()):
        if name.split(".")[0] == "vllm" and not stub.__dict__.get("__file__"):
            stub.__dict__["__file__"] = module.__file__


def _vllm(problem: PagedProblem, always_split: bool = False) -> Prepared:
    """vLLM's unified Triton kernel. A decode step splits its keys by vLLM's own rule, or `always_split`."""
    case, inputs = problem.case, problem.inputs
    if case.mode != "causal":
        raise Unavailable("vLLM's kernel is causal")
    module = peers()
    _name_stubs(module)
    requests = len(case.requests)
    splits = case.is_decode and requests * case.kv_heads <= VLLM_LEAST_PROGRAMS
    if always_split and (splits or not case.is_decode):
        raise Unavailable("vLLM's own rule splits here already" if splits else "vLLM splits decode steps alone")
    segments = None
    if splits or always_split:
        scratch = module.vllm_segments(requests, case.query_heads, case.head_dim, inputs.query.device)
        segments = {**scratch, "seq_threshold_3D": requests}
    lengths = inputs.context_lens + inputs.cu_seqlens_q.diff()

    def run() -> Any:
        return module.vllm_unified(
            inputs.query,
            inputs.k_cache,
            inputs.v_cache,
            inputs.cu_seqlens_q,
            lengths,
            inputs.page_tables,
            case.max_new,
            case.max_keys,
            segments,
        )

    return Prepared(run, lambda out: (out,))


PAGED_VARIANTS: dict[str, Variant[PagedProblem]] = {
    variant.name: variant
    for variant in (
        Variant("ours", "lowered-attn, new keys in the cache", _ours, ours=True),
        Variant(
            "ours-layer",
            "lowered-attn, schedule of another layer",
            functools.partial(_ours, shared_schedule=True),
            ours=True,
        ),
        Variant(
            "ours-direct", "lowered-attn, new keys read directly", functools.partial(_ours, direct=True), ours=True
        ),
        Variant(
            "ours-triton", "lowered-attn, portable Triton", functools.partial(_ours, impl="triton_portable"), ours=True
        ),
        Variant("fa3", "FlashAttention-3", _fa3),
        Variant("flashmla", "FlashMLA", _flashmla),
        Variant("vllm", "vLLM, Triton", _vllm),
        Variant("vllm-split", "vLLM, Triton, keys split", functools.partial(_vllm, always_split=True)),
    )
}
"""Every way to compute a paged case by name."""
