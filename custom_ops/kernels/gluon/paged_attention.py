"""Paged attention on Hopper in Gluon: one producer warp that gathers pages by TMA, and consumer warpgroups of 64 rows.

Over keys and values (consumer.py), or over latents, whose first elements are the value (latents.py).

Legend
    S           the KernelShape: every compile-time number
    row         a query of one head: row r of a tile is head r % padded_group of token r // padded_group
    block       the heads that a program computes where a KV head's query heads are more than 64: other programs walk
                the same items for the other blocks
    tile        block_n keys. A row tile reads its cached keys' tiles, then those of the new keys (where S.direct): a
                tile never holds keys of both
    box         what one TMA copy moves: 64 columns (128 bytes, one swizzle atom wide) of a page's keys, or of queries
    stage       a slot of shared memory for a tile of K, or of V; ``full`` and ``empty`` are its barriers

Boxes of a tile lie so that together they are the ``[block_n, head_dim]`` tile that wgmma reads: columns outermost.
The grid is persistent: a program walks the items that the schedule gives it (walk.py). Of a tile of latents a stage is
in pieces of 128 columns, each with its barriers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.extra.cuda import gdc_wait

from custom_ops.kernels.gluon import shape
from custom_ops.kernels.gluon.compat import async_load, reinterpret
from custom_ops.kernels.gluon.consumer import consumer
from custom_ops.kernels.gluon.latents import STATISTICS, accumulator, scorer
from custom_ops.kernels.gluon.producer import producer

CLEARED_ROWS = gl.constexpr(shape.CLEARED_ROWS)


@gluon.jit
def barriers_of(stages: gl.constexpr, arrivals: gl.constexpr):
    """A barrier a stage, each complete when ``arrivals`` have come."""
    barriers = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(stages):
        mbarrier.init(barriers.index(i), count=arrivals)
    return barriers


@gluon.jit
def fetch_descriptors(q_desc, k_desc, v_desc, new_k_desc, new_v_desc, q_boxes, k_boxes, v_boxes, S: gl.constexpr):
    """Has the copy engine fetch the descriptors now; returns the barrier that is complete when it has.

    By copies of boxes that lie outside of everything: they read no memory, which may not be written yet, and leave
    zeros where tiles come later.
    """
    BOX_BYTES: gl.constexpr = S.box_keys * 64 * 2
    QUERY_BYTES: gl.constexpr = S.consumer_tokens * S.padded_group * 64 * 2
    SOURCES: gl.constexpr = 4 if S.direct else 2
    fetched = barriers_of(1, 1)
    fence_async_shared()
    mbarrier.expect(fetched.index(0), QUERY_BYTES + SOURCES * BOX_BYTES)
    async_load(q_desc, [-S.consumer_tokens, 0, 0], fetched.index(0), q_boxes.index(0))
    async_load(k_desc, [-1, 0, 0], fetched.index(0), k_boxes.index(0))
    async_load(v_desc, [-1, 0, 0], fetched.index(0), v_boxes.index(0))
    if S.direct:
        async_load(new_k_desc, [-1, 0, 0], fetched.index(0), k_boxes.index(1))
        async_load(new_v_desc, [-1, 0, 0], fetched.index(0), v_boxes.index(1))
    return fetched


@gluon.jit
def prefetch_page_tables(page_tables, table_size):
    """Has L2 fetch the page tables, 128 lines of 128 bytes a program: by the time the schedule is there, so are they.

    That is 0.3 of 85.8 us for one request of 65,536 keys. Only L2, which later writes go through: no stale value can
    stay anywhere.
    """
    LINES: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    at = (gl.program_id(0) * 128 + gl.arange(0, 128, layout=LINES)) * 32
    gl.inline_asm_elementwise(
        """
        {
        .reg .pred inside;
        setp.lt.s32 inside, $2, $3;
        @inside prefetch.global.L2 [$1];
        mov.u32 $0, 0;
        }
        """,
        "=r,l,r,r",
        [(page_tables + at).to(gl.int64), at, table_size],
        gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def over_keys_and_values(
    q_desc, k_desc, v_desc, new_k_desc, new_v_desc, page_tables, table_stride, max_pages,
    schedule, entries_at, programs_at,
    out, lse, sinks, scratch, scale, tanh_scale,
    S: gl.constexpr, RANGE: gl.constexpr, VISIBLE: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One or two consumers of 64 rows each."""
    BOX: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=3)
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    dtype: gl.constexpr = q_desc.dtype
    k_boxes = gl.allocate_shared_memory(dtype, [S.stages * S.columns * S.boxes, 1, S.box_keys, 64], BOX)
    v_boxes = gl.allocate_shared_memory(dtype, [S.stages * S.columns * S.boxes, 1, S.box_keys, 64], BOX)
    q_boxes = gl.allocate_shared_memory(
        dtype, [S.query_stages * S.consumers * S.columns, S.consumer_tokens, S.padded_group, 64], BOX
    )
    k_tiles = reinterpret(k_boxes, dtype, [S.stages, S.block_n, S.head_dim], TILE)
    v_tiles = reinterpret(v_boxes, dtype, [S.stages, S.block_n, S.head_dim], TILE)
    q_tiles = reinterpret(q_boxes, dtype, [S.query_stages * S.consumers, 64, S.head_dim], TILE)
    v_chunks = reinterpret(v_boxes, dtype, [S.stages * S.columns * S.block_n // CLEARED_ROWS, CLEARED_ROWS, 64], TILE)
    q_full = barriers_of(S.query_stages, 1)
    q_empty = barriers_of(S.query_stages, S.consumers)
    k_full = barriers_of(S.stages, 1)
    k_empty = barriers_of(S.stages, S.consumers)
    v_full = barriers_of(S.stages, 1)
    v_empty = barriers_of(S.stages, S.consumers)
    fetched = fetch_descriptors(q_desc, k_desc, v_desc, new_k_desc, new_v_desc, q_boxes, k_boxes, v_boxes, S)
    # Launched while the kernel before it still runs (launch.py): all that is read, that kernel may have written.
    gdc_wait()
    mbarrier.wait(fetched.index(0), 0)

    # Roles get pointers and offsets as they came, and add them up: sums made here would be spilled. Tuples are written
    # out where they are passed: a constexpr kept in a tuple variable becomes a tensor.
    if S.consumers == 1:
        gl.warp_specialize([
            (consumer, ((schedule, entries_at, programs_at), (out, lse, sinks, scratch), (scale, tanh_scale),
                        (q_tiles, k_tiles, v_tiles, v_chunks),
                        (q_full, q_empty, k_full, k_empty, v_full, v_empty), S, RANGE, VISIBLE, 0)),
            (producer, ((q_desc, k_desc, v_desc, new_k_desc, new_v_desc), (schedule, entries_at, programs_at),
                        page_tables, table_stride, max_pages,
                        (q_boxes, k_boxes, v_boxes), (q_full, q_empty, k_full, k_empty, v_full, v_empty), S, RANGE)),
        ], [1], [PRODUCER_REGISTERS])  # fmt: skip
    else:
        gl.warp_specialize([
            (consumer, ((schedule, entries_at, programs_at), (out, lse, sinks, scratch), (scale, tanh_scale),
                        (q_tiles, k_tiles, v_tiles, v_chunks),
                        (q_full, q_empty, k_full, k_empty, v_full, v_empty), S, RANGE, VISIBLE, 0)),
            (consumer, ((schedule, entries_at, programs_at), (out, lse, sinks, scratch), (scale, tanh_scale),
                        (q_tiles, k_tiles, v_tiles, v_chunks),
                        (q_full, q_empty, k_full, k_empty, v_full, v_empty), S, RANGE, VISIBLE, 1)),
            (producer, ((q_desc, k_desc, v_desc, new_k_desc, new_v_desc), (schedule, entries_at, programs_at),
                        page_tables, table_stride, max_pages,
                        (q_boxes, k_boxes, v_boxes), (q_full, q_empty, k_full, k_empty, v_full, v_empty), S, RANGE)),
        ], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip


@gluon.jit
def over_latents(
    q_desc, k_desc, new_k_desc, page_tables, table_stride, max_pages,
    schedule, entries_at, programs_at,
    out, lse, sinks, scratch, scale, tanh_scale,
    S: gl.constexpr, RANGE: gl.constexpr, VISIBLE: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """A scorer and two accumulators of the same 64 rows (latents.py)."""
    BOX: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=3)
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    PIECES: gl.constexpr = S.stages * S.pieces
    VALUE_BOXES: gl.constexpr = PIECES * S.piece_boxes
    dtype: gl.constexpr = q_desc.dtype
    k_boxes = gl.allocate_shared_memory(dtype, [VALUE_BOXES * S.boxes, 1, S.box_keys, 64], BOX)
    rotary_boxes = gl.allocate_shared_memory(dtype, [S.stages * S.boxes, 1, S.box_keys, 64], BOX)
    q_boxes = gl.allocate_shared_memory(dtype, [S.query_stages * S.columns, S.consumer_tokens, S.padded_group, 64], BOX)
    k_tiles = reinterpret(k_boxes, dtype, [VALUE_BOXES, S.block_n, 64], TILE)
    values = reinterpret(k_boxes, dtype, [PIECES, S.block_n, S.piece_columns], TILE)
    value_chunks = reinterpret(k_boxes, dtype, [VALUE_BOXES * S.block_n // CLEARED_ROWS, CLEARED_ROWS, 64], TILE)
    rotary_tiles = reinterpret(rotary_boxes, dtype, [S.stages, S.block_n, 64], TILE)
    q_tiles = reinterpret(q_boxes, dtype, [S.query_stages * S.columns, 64, 64], TILE)
    statistics = gl.allocate_shared_memory(
        gl.float32, [S.stages * STATISTICS, 64], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    q_full = barriers_of(S.query_stages, 1)
    q_empty = barriers_of(S.query_stages, 1)
    full = barriers_of(PIECES, 1)
    empty = barriers_of(PIECES, 1)
    kept_full = barriers_of(S.stages, 1)
    weights_full = barriers_of(S.stages, 1)
    fetched = fetch_descriptors(q_desc, k_desc, k_desc, new_k_desc, new_k_desc, q_boxes, k_boxes, rotary_boxes, S)
    gdc_wait()
    mbarrier.wait(fetched.index(0), 0)

    gl.warp_specialize([
        (scorer, ((schedule, entries_at, programs_at), (scale, tanh_scale),
                  (q_tiles, k_tiles, rotary_tiles, statistics), (q_full, q_empty, full, kept_full, weights_full),
                  S, RANGE, VISIBLE)),
        (accumulator, ((schedule, entries_at, programs_at), (out, lse, sinks, scratch),
                       (rotary_tiles, values, value_chunks, statistics), (full, empty, kept_full, weights_full),
                       S, RANGE, VISIBLE, 0)),
        (accumulator, ((schedule, entries_at, programs_at), (out, lse, sinks, scratch),
                       (rotary_tiles, values, value_chunks, statistics), (full, empty, kept_full, weights_full),
                       S, RANGE, VISIBLE, 1)),
        (producer, ((q_desc, k_desc, k_desc, new_k_desc, new_k_desc), (schedule, entries_at, programs_at),
                    page_tables, table_stride, max_pages,
                    (q_boxes, k_boxes, rotary_boxes), (q_full, q_empty, full, empty), S, RANGE)),
    ], [4, 4, 1], [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS])  # fmt: skip


@gluon.jit(do_not_specialize=["table_stride", "max_pages", "table_size", "entries_at", "programs_at"])
def paged_attention_kernel(
    q_desc, k_desc, v_desc, new_k_desc, new_v_desc, page_tables, table_stride, max_pages, table_size,
    schedule, entries_at, programs_at,
    out, lse, sinks, scratch, scale, tanh_scale,
    S: gl.constexpr, RANGE: gl.constexpr, VISIBLE: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """q ``[T, Hq, D]``, caches ``[pages, page_size, Hkv * D]``, new keys ``[1, T, Hkv * D]``, out ``[T, Hq, D]``.

    Of latents, ``v_desc`` and ``new_v_desc`` are those of keys, and outputs have as many elements as values.
    ``table_size``: from the first to the last element of ``page_tables``. ``scale`` turns scores (with softcap: their
    tanh) into base-2 logarithms; ``tanh_scale`` is 2 log2(e) / cap of it.
    """
    prefetch_page_tables(page_tables, table_size)
    if S.latent:
        over_latents(
            q_desc, k_desc, new_k_desc, page_tables, table_stride, max_pages, schedule, entries_at, programs_at,
            out, lse, sinks, scratch, scale, tanh_scale, S, RANGE, VISIBLE, CONSUMER_REGISTERS, PRODUCER_REGISTERS,
        )  # fmt: skip
    else:
        over_keys_and_values(
            q_desc, k_desc, v_desc, new_k_desc, new_v_desc, page_tables, table_stride, max_pages,
            schedule, entries_at, programs_at,
            out, lse, sinks, scratch, scale, tanh_scale, S, RANGE, VISIBLE, CONSUMER_REGISTERS, PRODUCER_REGISTERS,
        )  # fmt: skip
