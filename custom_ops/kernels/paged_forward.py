"""The eager paged attention kernel: the frame around ``custom_ops/kernels/paged_tile.py``, where the legend is."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from custom_ops.kernels.paged_parts import finish_part
from custom_ops.kernels.paged_tile import attend_part, item_of_unit, item_rows, item_values, load_queries, program_range


# Counts change from step to step: a kernel each for 1 and for multiples of 16 would be compiled for nothing.
@triton.jit(do_not_specialize=["capacity", "programs", "page_count", "max_pages"])
def paged_forward_kernel(
    Q, K, V, K_CACHE, V_CACHE, PAGE_TABLES, SCHEDULE, SINKS, K_SCALE, V_SCALE, PARTS, PART_STATS, OUT, LSE,
    stride_q, stride_k, stride_v, stride_kc, stride_vc, stride_table, stride_out,
    capacity, programs, page_count, max_pages, scale, softcap,
    RANGE: tl.constexpr, VISIBLE: tl.constexpr, EXACT: tl.constexpr, DIRECT: tl.constexpr, MERGED: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_K_SCALE: tl.constexpr, HAS_V_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, SAME_STRIDES: tl.constexpr, PAGE_SIZE: tl.constexpr, X: tl.constexpr,
    HEADS: tl.constexpr, HEAD_BLOCKS: tl.constexpr, G_ALL: tl.constexpr, G: tl.constexpr, PG: tl.constexpr,
    TOGETHER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LATENT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, R_PAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program a range of units for one block of query heads: its items, one after the other.

    The grid is ``programs * HEAD_BLOCKS``: the blocks of a range are neighbours, and run at the same time.
    ``stride_*`` are in elements: of Q and OUT, K and V (token, head); of the caches as ``attend_part`` takes them.
    HEADS: items an entry has, its KV heads. ``capacity``: E. OVERLAP: launched before the kernel before it ended,
    which may have written what is read here.
    """
    if OVERLAP:
        gdc_wait()
    TILE_TOKENS: tl.constexpr = BLOCK_M // PG
    program = tl.program_id(0) // HEAD_BLOCKS
    block = tl.program_id(0) % HEAD_BLOCKS
    unit, end_unit, entry = program_range(SCHEDULE, capacity, program)
    column = tl.arange(0, DV_PAD)
    while unit < end_unit:
        q_start, new, values = item_values(SCHEDULE, entry)
        request, row_tile, kv_head, first, end, tiles, entry = item_of_unit(SCHEDULE, entry, unit, end_unit, HEADS)
        token, at, head, is_row, sees = item_rows(
            row_tile, kv_head, block, q_start, new, values, row_tile, G_ALL, G, PG, BLOCK_M
        )
        q, q_high = load_queries(Q, at, head, stride_q, sees, D, DV, DV_PAD, R_PAD)
        acc, row_sum, row_max = attend_part(
            q, q_high, token, first, end, row_tile * TILE_TOKENS, new, q_start, values, kv_head,
            PAGE_TABLES + request.to(tl.int64) * stride_table, K_CACHE, V_CACHE, K, V, K_SCALE, V_SCALE,
            stride_kc, stride_vc, stride_k, stride_v, page_count, max_pages, scale, softcap,
            RANGE, VISIBLE, EXACT, DIRECT, MERGED, HAS_K_SCALE, HAS_V_SCALE, HAS_SOFTCAP, PRECISION,
            SAME_STRIDES, PAGE_SIZE, X, TILE_TOKENS, BLOCK_M, BLOCK_N, LATENT, D, DV, DV_PAD, R_PAD,
        )  # fmt: skip
        _, at, head, is_row, sees = item_rows(
            row_tile, kv_head, block, q_start, new, values, tiles, G_ALL, G, PG, BLOCK_M
        )
        sink = 0.0
        if HAS_SINKS:
            sink = tl.load(SINKS + head, mask=is_row, other=0.0)
        out, lse, is_last = finish_part(
            acc, row_sum, row_max, sees, sink, program, block, first, end, tiles,
            SCHEDULE, capacity, programs, PARTS, PART_STATS, HAS_SINKS, PG, BLOCK_M, DV_PAD, TOGETHER,
        )  # fmt: skip
        stored = is_row & is_last
        tl.store(
            OUT + (at * stride_out[0] + head * stride_out[1])[:, None] + column[None, :],
            out.to(OUT.dtype.element_ty),
            mask=stored[:, None] & (column < DV)[None, :],
        )
        tl.store(LSE + at * (HEADS * G_ALL) + head, lse, mask=stored)
        unit += end - first
