"""The lowering of ``lowered_attn::store_kv_cache``: a scatter under a mask that Inductor fuses with what makes k and v.

As an opaque op the store would be a kernel of its own behind the norms and RoPE; as ``index_put_`` it would write a
slot of -1 into the cache's last slot. Here it is a scatter node of Inductor's own kind whose store runs inside
``ops.masked``: the generated ``tl.store`` has the slot's validity in its mask, and the scheduler sees an ordinary
pointwise node. Norm, RoPE, an fp8 cast and both stores become one kernel.
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

OP = torch.ops.lowered_attn.store_kv_cache.default
FP8_MAX = torch.finfo(FP8).max

Place = Callable[[Any, Any, Any], "list[Any]"]
"""(slot, head, column) -> the element's index in the cache."""


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
    reasons = _against_scatter(k, layout)
    if reasons:
        _record(f"the op itself: {'; '.join(reasons)}", kernel="op")
        compat.fallback(OP)(k, v, k_cache, v_cache, slot_mapping, k_scale, v_scale, layout=layout)
        return
    place_key, place_value = PLACES[layout]
    for values, cache, scale, place_of in ((k, k_cache, k_scale, place_key), (v, v_cache, v_scale, place_value)):
        slots, place = place_of(cache.get_size())
        _scatter(values, cache, slot_mapping, scale, slots, place)
    _record("two scatters under a mask, fused with what makes k and v", kernel="scatter")


def _against_scatter(k: Any, layout: str) -> list[str]:
    device = k.get_device().type
    if device != "cuda":
        return [f"a scatter would not be faster on {device}"]
    return [] if layout in PLACES else [f"layout {layout!r} is not one of {', '.join(PLACES)}"]


def _record(detail: str, **facts: object) -> None:
    node = compat.current_node()
    facts = {"module": module_of(node), **facts}
    decisions.record(decisions.Decision("lowered", "store_kv_cache", node.name, detail, facts))


def _scatter(values: Any, cache: Any, slot_mapping: Any, scale: Any, slots: Any, place: Place) -> None:
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

    compat.masked_scatter(cache, values.get_size(), value, target, is_valid)


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
