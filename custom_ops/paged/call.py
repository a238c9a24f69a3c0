"""One call of paged attention: its arguments by name, and what follows from them.

The vocabulary of everything paged: ``R`` requests; ``T`` rows of q, the new tokens of all requests one after the other
and a bucket's padding after them; ``Hq`` and ``Hkv`` heads; ``D`` head dim. Of request ``r``, ``c = context_lens[r]``
tokens were cached before this step, ``n = cu_seqlens_q[r + 1] - cu_seqlens_q[r]`` are new, and the first ``n_valid``
of those are real. Its new token ``i`` is at position ``c + i``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from custom_ops.form import default_scale
from custom_ops.masks import Mask
from custom_ops.paged.layout import LAYOUTS, CacheLayout, CacheSizes
from custom_ops.paged.masks import paged_mask

IMPLS = ("triton", "triton_grouped", "triton_portable")
"""CUDA kernels: a program a query head; one for all query heads of a KV head; the same, but never the kernel that is
written for one architecture, where there is one. CPUs have one path for all."""
SHAPE_CLASSES = ("auto", "decode", "chunk")
"""What kernels are tuned for: few new tokens a request, many, or whichever the shapes say."""


@dataclasses.dataclass(frozen=True, eq=False)
class PagedCall:
    """The arguments of ``torch.ops.lowered_attn.paged_attention``, in its order and with its defaults."""

    q: Tensor
    """``[T, Hq, D]``, fp32, fp16 or bf16."""
    k: Tensor | None
    """``[T, Hkv, D]``, the new keys; None where they are in the cache already. v is None with it."""
    v: Tensor | None
    """``[T, Hkv, D]``, the new values."""
    k_cache: Tensor
    """Pages of keys, see ``custom_ops.paged.layout``; q's dtype or float8_e4m3fn."""
    v_cache: Tensor
    """Pages of values, k_cache's dtype."""
    cu_seqlens_q: Tensor
    """int32 ``[R + 1]``: request r's rows of q are ``cu_seqlens_q[r]:cu_seqlens_q[r + 1]``."""
    context_lens: Tensor
    """int32 ``[R]``, tokens cached before this step."""
    page_tables: Tensor
    """int32 ``[R, max_pages]``: entry p is the page of positions ``p * page_size`` on. What lies past a request's
    length is never read."""
    valid_lens: Tensor | None
    """int32 ``[R]``, how many new tokens are real; all of them where None."""
    request_values: Sequence[Tensor]
    """int32 ``[R]`` each: what the mode reads besides, see ``custom_ops.paged.masks.request_operand_names``. None, as
    which AOTInductor's C++ passes an empty list, is taken for one."""
    schedule: Tensor | None = None
    """What ``paged_schedule`` made of the same lengths; made by the op itself where None. CPUs need none."""
    sinks: Tensor | None = None
    """fp32 ``[Hq]``: one more logit a head, whose value is 0. Rows that see nothing leave it out."""
    k_scale: Tensor | None = None
    """fp32 ``[1]``: keys of an fp8 cache are the cache's values times this; 1 where None."""
    v_scale: Tensor | None = None
    """fp32 ``[1]``, the same for values."""
    mode: str = "causal"
    """What a query sees, a name in ``custom_ops.paged.masks.MODES``."""
    block_size: int = 1
    """Tokens of a diffusion block."""
    window: int = 0
    """The latest keys that a query may see, its own included; 0: all."""
    prefix_hole: bool = False
    """Whether cached keys between the prefix and the padded prefix are hidden."""
    layout: str = "unified"
    """A name in ``custom_ops.paged.layout.LAYOUTS``."""
    softcap: float = 0.0
    """Scores s, after the scale, become ``softcap * tanh(s / softcap)``; 0: as they are."""
    scale: float | None = None
    """What scores are multiplied by; ``1 / sqrt(D)`` where None."""
    impl: str = "triton_grouped"
    """One of ``IMPLS``."""
    shape_class: str = "auto"
    """One of ``SHAPE_CLASSES``."""

    def __post_init__(self) -> None:
        no_none_for_a_list(self)

    @property
    def op(self) -> str:
        """The op that this is a call of, for messages."""
        return "paged_attention"

    @property
    def cache_names(self) -> tuple[str, ...]:
        """What the op calls its caches, for messages: k_cache, and v_cache where it is not a view of it."""
        return "k_cache", "v_cache"

    @property
    def value_dim(self) -> int | None:
        """Elements of a value where values are the first elements of keys (``LatentCall``), else None."""
        return None

    @property
    def latent(self) -> bool:
        """Whether values are the first elements of keys."""
        return self.value_dim is not None

    @property
    def out_dim(self) -> int:
        """Elements of a row of the output: of a value."""
        return self.q.shape[2] if self.value_dim is None else self.value_dim

    @property
    def direct(self) -> bool:
        """Whether new keys are read from k and v, and the page table covers the cached ones alone."""
        return self.k is not None

    @property
    def requests(self) -> int:
        """R, whatever the lengths."""
        return self.context_lens.shape[0]

    @property
    def cache_layout(self) -> CacheLayout:
        return LAYOUTS[self.layout]

    @property
    def cache_sizes(self) -> CacheSizes:
        return self.cache_layout.sizes(self.k_cache)

    @property
    def mask(self) -> Mask:
        """Which keys a valid query sees; its operands are ``mask_operands``."""
        return mask_of(self)

    @property
    def score_scale(self) -> float:
        return default_scale(self.q, self.scale)


@dataclasses.dataclass(frozen=True, eq=False)
class LatentCall(PagedCall):
    """A call over a cache of latents: one KV head, whose value is the first elements of its key.

    v and v_cache are views of k and k_cache; kernels do not look at them, and read a key once for both products.
    """

    first_elements: int = 0
    """How many elements of a key are its value."""

    @property
    def op(self) -> str:
        return "paged_latent_attention"

    @property
    def cache_names(self) -> tuple[str, ...]:
        return ("latent_cache",)

    @property
    def value_dim(self) -> int:
        return self.first_elements


def no_none_for_a_list(call: Any) -> None:
    """Make None an empty list in ``request_values``, where ``paged_attention`` and ``paged_schedule`` have one."""
    if call.request_values is None:
        object.__setattr__(call, "request_values", ())


def mask_of(call: Any) -> Mask:
    """The mask that the arguments of a paged op name; ``paged_attention`` and ``paged_schedule`` name it alike."""
    return paged_mask(call.mode, block_size=call.block_size, window=call.window, prefix_hole=call.prefix_hole)


def empty_outputs(call: PagedCall) -> tuple[Tensor, Tensor]:
    """Uninitialised ``out [T, Hq, out_dim]`` in q's dtype and ``lse [T, Hq]`` in fp32, contiguous."""
    q = call.q
    return q.new_empty((*q.shape[:2], call.out_dim)), q.new_empty(q.shape[:2], dtype=torch.float32)
