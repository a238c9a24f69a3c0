"""The lowerings of ``lowered_attn::store_kv_cache`` and ``store_latent_cache``: scatters under a mask.

As an opaque op a store would be a kernel of its own behind the norms and RoPE; as ``index_put_`` it would write a
slot of -1 into the cache's last slot. Here it is a scatter node of Inductor's own kind whose store runs inside
``ops.masked``: the generated ``tl.store`` has the slot's validity in its mask, and the scheduler sees an ordinary
pointwise node. Norm, RoPE, an fp8 cast and the stores of k and v, or of a latent, become one kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch

from custom_ops.checks import fail
from custom_ops.kernels.specialise import FP8_ARCHITECTURE, architecture
from custom_ops.paged.layout import FP8
from inductor_passes import compat, decisions
from inductor_passes.group import module_of
from inductor_passes.store_pieces import PIECES

OP = torch.ops.lowered_attn.store_kv_cache.default
LATENT = torch.ops.lowered_attn.store_latent_cache.default
FP8_MAX = torch.finfo(FP8).max

Place = Callable[..., "list[Any]"]
"""(slot, head, column), of a latent (slot, column) -> the element's index in the cache."""


def check_caches(gm: torch.fx.GraphModule) -> None:
    """Raise ValueError for a store into an fp8 cache that torch cannot compile for its GPU.

    Below sm_89 Inductor leaves everything that touches float8 alone, and then fails on the functional form of the op.
    """
    packet = torch.ops.lowered_attn.store_kv_cache
    for node in compat.calls_of(gm, (packet, packet.default)):
        cache = node.kwargs.get("k_cache", node.args[2] if len(node.args) > 2 else None)
        example = cache.meta.get("example_value") if isinstance(cache, torch.fx.Node) else None
        if example is None or not example.is_cuda or example.dtype != FP8:
            continue
        if architecture(example.device) < FP8_ARCHITECTURE:
            fail(
                "store_kv_cache", "k_cache", f"a 16-bit cache below sm_{FP8_ARCHITECTURE}", "float8_e4m3fn",
                "torch.compile cannot write such a cache on this GPU: keep 16 bits, or store outside the compiled code",
            )  # fmt: skip


@compat.register_lowering(OP, type_promotion_kind=None)
def lower_store_kv_cache(
    k: Any, v: Any, k_cache: Any, v_cache: Any, slot_mapping: Any, k_scale: Any = None, v_scale: Any = None, *,
    layout: str = "unified",
) -> None:  # fmt: skip
    """Two masked scatters on CUDA; the op itself elsewhere, and for a cache that Inductor cannot write."""
    reasons = _against_scatter(k)
    if layout not in PLACES:
        reasons.append(f"layout {layout!r} is not one of {', '.join(PLACES)}")
    if reasons:
        _record("store_kv_cache", f"the op itself: {'; '.join(reasons)}", kernel="op")
        compat.fallback(OP)(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale, layout=layout)
        return
    place_key, place_value = PLACES[layout]
    for values, cache, scale, place_of in ((k, k_cache, k_scale, place_key), (v, v_cache, v_scale, place_value)):
        slots, place = place_of(cache.get_size())
        compat.masked_scatter(cache, values.get_size(), _store(values, cache, slot_mapping, scale, slots, place))
    _record("store_kv_cache", "two scatters under a mask, fused with what makes k and v", kernel="scatter")


@compat.register_lowering(LATENT, type_promotion_kind=None)
def lower_store_latent_cache(latent: Any, latent_cache: Any, slot_mapping: Any) -> None:
    """A masked scatter on CUDA; the op itself elsewhere."""
    reasons = _against_scatter(latent)
    if reasons:
        _record("store_latent_cache", f"the op itself: {'; '.join(reasons)}", kernel="op")
        compat.fallback(LATENT)(latent, latent_cache, slot_mapping)
        return
    slots, place = _latent(latent_cache.get_size())
    store = _store(latent, latent_cache, slot_mapping, None, slots, place)
    compat.masked_scatter(latent_cache, latent.get_size(), store)
    _record("store_latent_cache", "a scatter under a mask, fused with what makes the latent", kernel="scatter")


@compat.register_lowering(PIECES, type_promotion_kind=None)
def lower_store_latent_pieces(pieces: Sequence[Any], latent_cache: Any, slot_mapping: Any) -> Any:
    """One masked scatter as wide as the widest piece; the latent, written beside it where something reads it.

    RMSNorm reduces over the widest piece, so its kernel has these very indices, and takes in both scatters.
    """
    slots, place = _latent(latent_cache.get_size())
    widths = [compat.static_int(piece.get_size()[1]) for piece in pieces]
    size = [pieces[0].get_size()[0], max(widths)]
    latent = compat.empty_strided([size[0], sum(widths)], latent_cache.get_dtype(), latent_cache.get_device())
    cached, joined = [], []
    for i, (piece, width) in enumerate(zip(pieces, widths, strict=True)):
        first = sum(widths[:i])

        def place_piece(slot: Any, column: Any, first: int = first) -> list[Any]:
            return place(slot, column + first)

        def place_joined(index: Sequence[Any], first: int = first) -> list[Any]:
            return [index[0], index[1] + first]

        def inside(index: Sequence[Any], width: int = width) -> Any:
            return compat.ops.lt(compat.ops.index_expr(index[1], torch.int64), compat.ops.constant(width, torch.int64))

        store = _store(piece, latent_cache, slot_mapping, None, slots, place_piece)
        cached.append(store._replace(is_valid=_both(inside, store.is_valid)))
        joined.append(compat.MaskedStore(piece.make_loader(), place_joined, inside))
    compat.masked_scatter(latent_cache, size, *cached)
    is_read = bool(compat.current_node().users)
    if is_read:
        compat.masked_scatter(latent, size, *joined)
    also = ", which writes the latent too" if is_read else ""
    _record(
        "store_latent_cache", f"a scatter under a mask, fused with what makes the {len(pieces)} pieces{also}",
        kernel="scatter", pieces=len(pieces), joined=is_read,
    )  # fmt: skip
    return latent


def _both(one: Callable[[Any], Any], other: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda index: compat.ops.logical_and(one(index), other(index))


def _against_scatter(values: Any) -> list[str]:
    device = values.get_device().type
    return [] if device == "cuda" else [f"a scatter would not be faster on {device}"]


def _record(op: str, detail: str, **facts: object) -> None:
    node = compat.current_node()
    facts = {"module": module_of(node), **facts}
    decisions.record(decisions.Decision("lowered", op, node.name, detail, facts))


def _store(values: Any, cache: Any, slot_mapping: Any, scale: Any, slots: Any, place: Place) -> compat.MaskedStore:
    """``cache[place(slot)] = values`` for rows whose slot is one of ``slots`` (how many the cache has)."""
    ops, dtype = compat.ops, cache.get_dtype()
    load_slot, load_value = slot_mapping.make_loader(), values.make_loader()
    load_scale = None if scale is None else scale.make_loader()

    def is_valid(index: Sequence[Any]) -> Any:
        slot = load_slot(index[:1])
        not_negative = ops.ge(slot, ops.constant(0, torch.int64))
        return ops.logical_and(not_negative, ops.lt(slot, ops.index_expr(slots, torch.int64)))

    def target(index: Sequence[Any]) -> list[Any]:
        # Checks and wrapping are for slots that Python would take; here those are masked.
        slot = ops.indirect_indexing(load_slot(index[:1]), slots, check=False, wrap_neg=False)
        return place(slot, *index[1:])

    def value(index: Sequence[Any]) -> Any:
        if dtype != FP8:
            return ops.to_dtype(load_value(index), dtype)
        number = ops.to_dtype(load_value(index), torch.float32)
        if load_scale is not None:
            number = compat.divide(number, load_scale([sympy.Integer(0)]))
        number = ops.maximum(number, ops.constant(-FP8_MAX, torch.float32))
        return ops.to_dtype(ops.minimum(number, ops.constant(FP8_MAX, torch.float32)), dtype)

    return compat.MaskedStore(value, target, is_valid)


# ---------------------------------------------------------------------- where an element lies
# custom_ops/paged/layout.py says it in views; here it is in index arithmetic. Each gives the cache's number of slots.


def _split(value: Any, by: Any) -> tuple[Any, Any]:
    """Quotient and remainder. Where the store happens nothing is negative, so rounding down is rounding to zero."""
    return compat.FloorDiv(value, by), compat.ModularIndexing(value, 1, by)


def _unified(sizes: Sequence[Any]) -> tuple[Any, Place]:
    pages, page_size = sizes[:2]

    def place(slot: Any, head: Any, column: Any) -> list[Any]:
        page, offset = _split(slot, page_size)
        return [page, offset, head, column]

    return pages * page_size, place


def _latent(sizes: Sequence[Any]) -> tuple[Any, Place]:
    pages, page_size = sizes[:2]

    def place(slot: Any, column: Any) -> list[Any]:
        return [*_split(slot, page_size), column]

    return pages * page_size, place


def _distinct_key(sizes: Sequence[Any]) -> tuple[Any, Place]:
    pages, _, _, page_size, width = sizes

    def place(slot: Any, head: Any, column: Any) -> list[Any]:
        (page, offset), (piece, inside) = _split(slot, page_size), _split(column, width)
        return [page, head, piece, offset, inside]

    return pages * page_size, place


def _distinct_value(sizes: Sequence[Any]) -> tuple[Any, Place]:
    pages, _, _, page_size = sizes

    def place(slot: Any, head: Any, column: Any) -> list[Any]:
        page, offset = _split(slot, page_size)
        return [page, head, column, offset]

    return pages * page_size, place


PLACES = {"unified": (_unified, _unified), "distinct": (_distinct_key, _distinct_value)}
"""By layout: where keys go and where values go, each from the sizes of the cache."""
