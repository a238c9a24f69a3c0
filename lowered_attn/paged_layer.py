"""What `Attention` and `LatentAttention` share: caches that an engine assigns, checks, and one step through the ops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from custom_ops.kernels.paged_config import resolve_shape_class
from custom_ops.paged.layout import CacheSizes
from lowered_attn.caches import own_storage
from lowered_attn.checks import check_int, fail
from lowered_attn.metadata import AttnMetaDataBase, fetch_attn_metadata, is_debug

ATTN_IMPLS = ("reference", "triton", "triton_grouped")


class PagedLayer(nn.Module):
    """A layer whose caches are the engine's: `CACHES` names them, the first one's first dimension counts pages."""

    CACHES: ClassVar[tuple[str, ...]]
    ALLOCATE: ClassVar[str]
    """How to make them, for the message where one is missing."""

    def __init__(self, attn_impl: str, scale: float | None, sliding_window: int | None, softcap: float | None) -> None:
        super().__init__()
        where = type(self).__name__
        if attn_impl not in ATTN_IMPLS:
            expected = f"one of {', '.join(map(repr, ATTN_IMPLS))}"
            fail(where, "attn_impl", expected, repr(attn_impl), "pass an available attn_impl")
        check_numbers(where, scale, sliding_window, softcap)
        self.attn_impl = attn_impl
        self.scale = scale
        self.sliding_window = sliding_window
        self.softcap = softcap
        self._register_engine_buffers(*self.CACHES)

    def _register_engine_buffers(self, *names: str) -> None:
        # Buffers have static addresses in a compiled graph: a cache that is written to is then no reason to skip CUDA
        # graphs. They belong to the engine and to no checkpoint.
        for name in names:
            self.register_buffer(name, None, persistent=False)

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign; a cache that is part of a larger allocation is held as an alias over the same memory."""
        if name in self.CACHES and isinstance(value, Tensor):
            value = own_storage(value)
        super().__setattr__(name, value)

    def _caches(self) -> tuple[Tensor, ...]:
        """All caches; RuntimeError where one is missing."""
        caches = tuple(getattr(self, name) for name in self.CACHES)
        for name, cache in zip(self.CACHES, caches, strict=True):
            if cache is None:
                assign = " and ".join(f"attention.{name}" for name in self.CACHES)
                raise RuntimeError(
                    f"{type(self).__name__}: {name}: expected a cache, got none; assign {assign} "
                    f"before the first call, {self.ALLOCATE}"
                )
        return caches

    def _step(self) -> AttnMetaDataBase:
        """The step's metadata, its values checked in debug mode."""
        metadata = fetch_attn_metadata()
        # Traced, is_compiling() is a constant, so that debug mode is not read there: it cannot sync in a graph.
        if not torch.compiler.is_compiling() and is_debug():
            metadata.validate(self._caches()[0].shape[0], self.sliding_window)
        return metadata

    def _heads(self, name: str, x: Tensor, heads: int, width: int, metadata: AttnMetaDataBase) -> Tensor:
        """x [T, heads * width] or [T, heads, width] as the latter; ValueError for another shape."""
        tokens = metadata.num_tokens
        if tuple(x.shape) == (tokens, heads, width):
            return x
        if tuple(x.shape) != (tokens, heads * width):
            where = type(self).__name__
            wide = f"[{tokens}, {heads * width}] or [{tokens}, {heads}, {width}]"
            remedy = f"slot_mapping has one slot a row: pad both to one bucket, or build {where} with other sizes"
            fail(where, name, f"shape {wide}", f"shape {list(x.shape)}", remedy)
        return x.unflatten(1, (heads, width))


class Step(NamedTuple):
    """Whose rows are whose and what they see: what the ops read of a step's metadata, by their names for it."""

    cu_seqlens_q: Tensor
    context_lens: Tensor
    page_tables: Tensor
    valid_lens: Tensor | None = None
    request_values: Sequence[Tensor] = ()
    mode: str = "causal"
    block_size: int = 1
    prefix_hole: bool = False

    @classmethod
    def of(cls, metadata: AttnMetaDataBase) -> Step:
        """The part of metadata that attention reads."""
        return cls(
            metadata.cu_seqlens_q,
            metadata.context_lens,
            metadata.page_tables,
            metadata.valid_lens,
            metadata.request_values(),
            metadata.mode,
            metadata.block_size,
            metadata.prefix_hole,
        )


def attend(
    op: str,
    impl: str,
    q: Tensor,
    new: tuple[Tensor | None, ...],
    caches: tuple[Tensor, ...],
    step: Step,
    sizes: CacheSizes,
    extras: tuple[Tensor | None, ...] = (),
    *,
    sliding_window: int | None,
    softcap: float | None,
    scale: float | None,
    **kind: Any,
) -> tuple[Tensor, Tensor]:
    """Out and lse of `torch.ops.lowered_attn.<op>` for one of ATTN_IMPLS, with a schedule made for this call.

    `new` are the new tokens in the op's order, all None where the caches hold them; `extras` what it takes behind the
    schedule. `kind` says what the caches hold, layout or value_dim: keywords of the op and of its schedule.
    """
    ops, requests = torch.ops.lowered_attn, list(step.request_values)
    operands = (
        q, *new, *caches, step.cu_seqlens_q, step.context_lens, step.page_tables, step.valid_lens, requests
    )  # fmt: skip
    mask = {
        "mode": step.mode,
        "block_size": step.block_size,
        "window": sliding_window or 0,
        "prefix_hole": step.prefix_hole,
        **kind,
    }
    numbers = {"softcap": softcap or 0.0, "scale": scale}
    if impl == "reference":
        return getattr(ops, f"{op}_reference")(*operands, None, *extras, **mask, **numbers)
    tuning = {"impl": impl, "shape_class": resolve_shape_class("auto", q.shape[0], step.context_lens.shape[0])}
    schedule = ops.paged_schedule(
        step.cu_seqlens_q,
        step.context_lens,
        step.valid_lens,
        requests,
        num_tokens=q.shape[0],
        num_heads=q.shape[1],
        num_kv_heads=sizes.kv_heads,
        head_dim=q.shape[2],
        page_size=sizes.page_size,
        dtype=q.dtype,
        cache_dtype=caches[0].dtype,
        direct=new[0] is not None,
        **mask,
        **tuning,
    )
    return getattr(ops, op)(*operands, schedule, *extras, **mask, **numbers, **tuning)


def check_numbers(where: str, scale: float | None, sliding_window: int | None, softcap: float | None) -> None:
    """Raise ValueError unless the numbers are None or in range."""
    if scale is not None and not (isinstance(scale, (int, float)) and 0 <= scale < math.inf):
        fail(where, "scale", "None or a finite number of at least 0", repr(scale), "None means 1 / sqrt(head_dim)")
    if sliding_window is not None:
        check_int(where, "sliding_window", sliding_window, 1)
    if softcap is not None and not (isinstance(softcap, (int, float)) and 0 < softcap < math.inf):
        fail(where, "softcap", "None or a finite number above 0", repr(softcap), "None means no soft-cap")


def check_page_size(where: str, name: str, metadata: AttnMetaDataBase, page_size: int) -> None:
    """Raise ValueError unless the cache `name` has the metadata's page size."""
    if page_size != metadata.page_size:
        expected = f"pages of {metadata.page_size} tokens, the page_size of {type(metadata).__name__}"
        fail(where, name, expected, f"pages of {page_size}", "allocate the cache with that page size")


def new_tokens(metadata: AttnMetaDataBase, cache: Tensor, *new: Tensor | None) -> tuple[Tensor | None, ...]:
    """What attention reads besides the cache: `new`, or None each where the metadata promises that the cache has them.

    ValueError where a cache of another dtype cannot hold them unchanged.
    """
    if not metadata.new_keys_in_cache:
        return new
    if new[0] is not None and new[0].dtype != cache.dtype:
        where, got = type(metadata).__name__, f"True with a cache of {cache.dtype} and new keys of {new[0].dtype}"
        remedy = "leave it False, or keep caches in the new keys' dtype"
        fail(where, "new_keys_in_cache", "False where storing rounds", got, remedy)
    return (None,) * len(new)
