"""``torch.ops.lowered_attn.paged_latent_attention`` and ``store_latent_cache``: attention over a cache of latents.

A latent ``c [D]`` is all that is cached of a token, one vector for all heads: it is the token's key, and its first
``value_dim`` elements are the token's value. The remaining ``D - value_dim`` elements are rotary ones. With queries
that are projected into the latent space, and outputs projected out of it afterwards (absorbed projections), that is
multi-head latent attention of DeepSeek-AI, "DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts
Language Model", https://arxiv.org/abs/2405.04434, section 2.1 (D 576, value_dim 512).

Everything else is as ``custom_ops.paged.attention`` says: the same requests, modes, schedule, CPU path and kernels,
which see one KV head. ``scale`` is required: ``1 / sqrt(D)`` would be wrong, since the scale belongs to the head dim of
the keys before their projection was absorbed (192 for DeepSeek's).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from custom_ops.paged.call import LatentCall
from custom_ops.paged.checks import check_attention, check_latent_store, check_latents
from custom_ops.paged.op import register_attention
from custom_ops.paged.store import register_store

_ARGUMENTS = (
    "(Tensor q, Tensor? latent, Tensor latent_cache, Tensor cu_seqlens_q, Tensor context_lens, Tensor page_tables, "
    "Tensor? valid_lens, Tensor[]? request_values, Tensor? schedule=None, *, int value_dim, float scale, "
    "str mode='causal', int block_size=1, int window=0, bool prefix_hole=False, float softcap=0.0, "
    "str impl='triton_grouped', str shape_class='auto')"
)
_STORE_ARGUMENTS = "(Tensor latent, Tensor(a!) latent_cache, Tensor slot_mapping)"


def latent_call(
    q: Tensor,
    latent: Tensor | None,
    latent_cache: Tensor,
    cu_seqlens_q: Tensor,
    context_lens: Tensor,
    page_tables: Tensor,
    valid_lens: Tensor | None,
    request_values: Sequence[Tensor],
    schedule: Tensor | None = None,
    *,
    value_dim: int,
    scale: float,
    mode: str = "causal",
    block_size: int = 1,
    window: int = 0,
    prefix_hole: bool = False,
    softcap: float = 0.0,
    impl: str = "triton_grouped",
    shape_class: str = "auto",
    op: str = "paged_latent_attention",
) -> LatentCall:
    """The checked call that the arguments of ``paged_latent_attention`` describe; nothing is copied.

    ``q [T, Hq, D]``; ``latent [T, D]``, the new tokens' latents, None where they are in the cache already;
    ``latent_cache [pages, page_size, D]``, q's dtype; ``value_dim`` elements of a latent are its value. The others are
    ``PagedCall``'s. ``op`` is the op that ValueErrors name.
    """
    check_latents(op, q, latent, latent_cache, value_dim)
    keys = None if latent is None else latent.unsqueeze(1)
    k_cache = latent_cache.unsqueeze(2)
    call = LatentCall(
        q,
        keys,
        None if keys is None else keys[..., :value_dim],
        k_cache,
        k_cache[..., :value_dim],
        cu_seqlens_q,
        context_lens,
        page_tables,
        valid_lens,
        request_values,
        schedule,
        mode=mode,
        block_size=block_size,
        window=window,
        prefix_hole=prefix_hole,
        softcap=softcap,
        scale=scale,
        impl=impl,
        shape_class=shape_class,
        first_elements=value_dim,
    )
    check_attention(call, op)
    return call


def _checked_call(op: str, *arguments: object, **keywords: object) -> LatentCall:
    return latent_call(*arguments, **keywords, op=op)  # type: ignore[arg-type]


def _store_on_cpu(latent: Tensor, latent_cache: Tensor, slot_mapping: Tensor) -> None:
    from custom_ops.paged import cpu

    check_latent_store(latent, latent_cache, slot_mapping)
    cpu.store_latent(latent, latent_cache, slot_mapping)


def _store_on_cuda(latent: Tensor, latent_cache: Tensor, slot_mapping: Tensor) -> None:
    from custom_ops.kernels import paged_launch

    check_latent_store(latent, latent_cache, slot_mapping)
    paged_launch.store_latent(latent=latent, latent_cache=latent_cache, slot_mapping=slot_mapping)


register_attention("paged_latent_attention", _ARGUMENTS, _checked_call)
# Row t of latent goes to slot_mapping[t], by the rules of store_kv_cache.
register_store("store_latent_cache", _STORE_ARGUMENTS, _store_on_cpu, _store_on_cuda, check_latent_store)
