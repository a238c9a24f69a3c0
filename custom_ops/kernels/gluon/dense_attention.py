"""Dense attention on Hopper in Gluon: one TMA producer warp, and two or three consumer warpgroups of 64 queries.

Legend
    S           the DenseShape: every compile-time number
    row         a query of one head. Consumer c has rows ``64 c`` to ``64 c + 64`` of a row tile
    tile        block_n keys. All consumers of a row tile pass by all of its key tiles, the last first, and compute
                those that one of their own rows sees
    box         what one TMA copy moves: 64, 32 or 16 columns (one swizzle atom wide) of a tile; it fills with zeros
                what lies outside of the tensor
    part        head dims that are no power of two are two that are, the low and the high one
    stage       a slot of shared memory for a tile of K, or of V; ``full`` and ``empty`` are its barriers

The warpgroups overlap one another. Where the shape says ``overlap``, products and softmax of one do so too, for which
three consumers of 128 keys a tile lack registers: they have 160 a thread. Where it says ``turns``, they start those
products in turn.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from custom_ops.kernels.gluon.compat import async_load, reinterpret
from custom_ops.kernels.gluon.dense_consumer import dense_consumer
from custom_ops.kernels.gluon.dense_epilogue import load_extra, wait_for_keys
from custom_ops.kernels.gluon.dense_walk import Operands, bounds_of, tiles_of, walk_of
from custom_ops.kernels.gluon.paged_attention import barriers_of


@gluon.jit
def copy_part(
    source, batch, head, row, boxes, part, full, FROM: gl.constexpr, COLUMNS: gl.constexpr, BOX: gl.constexpr
):
    """Copies COLUMNS columns, from column FROM on, to the boxes of a part; BOX: columns of one."""
    for j in gl.static_range(COLUMNS // BOX):
        async_load(source, [batch, head, row, FROM + j * BOX], full, boxes.index(part * (COLUMNS // BOX) + j))


@gluon.jit
def dense_producer(sources, operands_at, ints, sizes, boxes, barriers, S: gl.constexpr, BOUNDS: gl.constexpr):
    """Copies queries, keys and values into shared memory, ahead of the consumers.

    ``filled`` counts key tiles and ``turn`` items: stages and phases follow from them.
    """
    q_source, k_source, v_source, extra_source = sources
    q_low, q_high, k_low, k_high, v_low, v_high, out_tiles = boxes
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    CONSUMERS: gl.constexpr = S.consumers
    walk = walk_of(sizes)
    operands = Operands(operands_at[0], operands_at[1], operands_at[2], operands_at[3], operands_at[4])
    turn = walk.items * 0
    filled = walk.items * 0
    number = walk.number(turn)
    # What the epilogue of the item before reads comes over its queries. Where there is room for this tile of K, all
    # consumers are done with the last one of that item, and so with its queries.
    due = filled - 1
    due_batch = walk.items
    due_head = walk.items
    due_first = walk.items
    while number < walk.items:
        batch, head, first = walk.item(number, S)
        kv_head = head // S.group
        stage = turn % S.query_stages
        mbarrier.wait(q_empty.index(stage), ((turn // S.query_stages) & 1) ^ 1)
        mbarrier.expect(q_full.index(stage), S.query_bytes)
        for c in gl.static_range(CONSUMERS):
            at = stage * CONSUMERS + c
            row = first + c * 64
            copy_part(q_source, batch, head, row, q_low, at, q_full.index(stage), 0, S.low_dim, S.box)
            copy_part(q_source, batch, head, row, q_high, at, q_full.index(stage), S.low_dim, S.high_dim, S.box)
        lo_any, _lo_all, _hi_all, hi_any = bounds_of(
            operands, ints, batch, first, walk.query_len, walk.key_len, S.block_m, S, BOUNDS
        )
        key = lo_any + (tiles_of(lo_any, hi_any, S) - 1) * S.block_n
        while key >= lo_any:
            stage = filled % S.stages
            mbarrier.wait(k_empty.index(stage), ((filled // S.stages) & 1) ^ 1)
            if S.extra:
                if filled == due:
                    load_extra(extra_source, turn - 1, due_batch, due_head, due_first, q_full, out_tiles, S)
            full = k_full.index(stage)
            mbarrier.expect(full, S.key_bytes)
            copy_part(k_source, batch, kv_head, key, k_low, stage, full, 0, S.low_dim, S.box)
            copy_part(k_source, batch, kv_head, key, k_high, stage, full, S.low_dim, S.high_dim, S.box)
            stage = filled % S.value_stages
            mbarrier.wait(v_empty.index(stage), ((filled // S.value_stages) & 1) ^ 1)
            full = v_full.index(stage)
            mbarrier.expect(full, S.value_bytes)
            value_head = kv_head // S.sharing
            copy_part(v_source, batch, value_head, key, v_low, stage, full, 0, S.value_low_dim, S.value_box)
            copy_part(
                v_source, batch, value_head, key, v_high, stage, full, S.value_low_dim, S.value_high_dim, S.value_box
            )
            filled += 1
            key -= S.block_n
        if S.extra:
            if due >= filled:
                # Few tiles: the next item's queries wait for the outputs of the item before, and those for this.
                wait_for_keys(due - S.stages, k_empty, S)
                load_extra(extra_source, turn - 1, due_batch, due_head, due_first, q_full, out_tiles, S)
            due = filled - 1 + S.stages
            due_batch = batch
            due_head = head
            due_first = first
        turn += 1
        number = walk.number(turn)
    if S.extra:
        if turn > 0:
            wait_for_keys(filled - 1, k_empty, S)
            load_extra(extra_source, turn - 1, due_batch, due_head, due_first, q_full, out_tiles, S)


@gluon.jit
def part_tiles(dtype: gl.constexpr, COUNT: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, BOX: gl.constexpr):
    """Shared memory of COUNT tiles of a part: as boxes of BOX columns, and as [ROWS, COLUMNS].

    It begins where the widest swizzle may, whatever BOX is: outputs leave through that of queries.
    """
    WIDEST: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    BOX_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(BOX * 2, 16, rank=4)
    TILE_LAYOUT: gl.constexpr = gl.NVMMASharedLayout(BOX * 2, 16, rank=2)
    memory = gl.allocate_shared_memory(dtype, [COUNT, ROWS * COLUMNS // 64, 64], WIDEST)
    boxes = reinterpret(memory, dtype, [COUNT * (COLUMNS // BOX), 1, 1, ROWS, BOX], BOX_LAYOUT)
    return boxes, reinterpret(memory, dtype, [COUNT, ROWS, COLUMNS], TILE_LAYOUT)


@gluon.jit(do_not_specialize=[
    "items", "row_tiles", "groups", "group_heads", "all_heads", "heads", "query_len", "key_len", "snake",
])  # fmt: skip
def dense_attention_kernel(
    q_desc, k_desc, v_desc, out_desc, extra_desc, lse,
    q_start, query_values, request_values, key_values, key_padding, ints,
    items, row_tiles, groups, group_heads, all_heads, heads, query_len, key_len, snake, scale, tanh_scale,
    S: gl.constexpr, VISIBLE: gl.constexpr, KEY_VISIBLE: gl.constexpr, BOUNDS: gl.constexpr,
    INTERVAL: gl.constexpr, EPILOGUE: gl.constexpr,
):  # fmt: skip
    """q ``[B, Hq, Lq, D]``, k ``[B, Hkv, Lk, D]``, v ``[B, Hv, Lk, DV]``, out ``[B, Hq, Lq, DV]``, lse contiguous.

    ``scale`` turns scores (with softcap: their tanh) into base-2 logarithms; ``tanh_scale`` is 2 log2(e) / cap of it.
    EPILOGUE: what outputs become before they are stored, or None (``dense_epilogue``). ``extra_desc``: of what it reads
    where ``S.extra``, as large as out, else None.
    """
    OUT_BOX: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=4)
    OUT_TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    dtype: gl.constexpr = q_desc.dtype
    QUERIES: gl.constexpr = S.query_stages * S.consumers
    N: gl.constexpr = S.block_n
    q_low, q_low_tiles = part_tiles(dtype, QUERIES, 64, S.low_dim, S.box)
    k_low, k_low_tiles = part_tiles(dtype, S.stages, N, S.low_dim, S.box)
    v_low, v_low_tiles = part_tiles(dtype, S.value_stages, N, S.value_low_dim, S.value_box)
    q_high = q_low
    q_high_tiles = q_low_tiles
    k_high = k_low
    k_high_tiles = k_low_tiles
    v_high = v_low
    v_high_tiles = v_low_tiles
    if S.high_dim > 0:
        q_high, q_high_tiles = part_tiles(dtype, QUERIES, 64, S.high_dim, S.box)
        k_high, k_high_tiles = part_tiles(dtype, S.stages, N, S.high_dim, S.box)
    if S.value_high_dim > 0:
        v_high, v_high_tiles = part_tiles(dtype, S.value_stages, N, S.value_high_dim, S.value_box)
    out = q_low
    OUT_TILES: gl.constexpr = S.consumers if S.own_outputs else QUERIES * S.low_columns // S.value_columns
    if S.own_outputs:
        out = gl.allocate_shared_memory(dtype, [OUT_TILES, 1, 1, 64, S.value_dim], OUT_BOX)
    out_tiles = reinterpret(out, dtype, [OUT_TILES, 1, 1, 64, S.value_dim], OUT_BOX)
    out_rows = reinterpret(out, dtype, [OUT_TILES, 64, S.value_dim], OUT_TILE)
    # Extras' behind those of queries: other barriers' address would be one more register.
    q_full = barriers_of(S.query_stages * (1 + S.consumers if S.extra else 1), 1)
    q_empty = barriers_of(S.query_stages, S.consumers)
    k_full = barriers_of(S.stages, 1)
    k_empty = barriers_of(S.stages, S.consumers)
    v_full = barriers_of(S.value_stages, 1)
    v_empty = barriers_of(S.value_stages, S.consumers)
    turns = barriers_of(S.consumers, 1)
    extra = out_desc
    if S.extra:
        extra = extra_desc
    fence_async_shared()

    # Tuples are written out where they are passed: a constexpr kept in a tuple variable becomes a tensor.
    if S.consumers == 2:
        gl.warp_specialize([
            (dense_consumer, (
                out_desc, lse, (q_start, query_values, request_values, key_values, key_padding), ints,
                (items, row_tiles, groups, group_heads, all_heads, heads, query_len, key_len, snake),
                (scale, tanh_scale),
                (out_tiles, out_rows, q_low_tiles, q_high_tiles, k_low_tiles, k_high_tiles, v_low_tiles, v_high_tiles),
                (q_full, q_empty, k_full, k_empty, v_full, v_empty, turns),
                S, VISIBLE, KEY_VISIBLE, BOUNDS, INTERVAL, EPILOGUE, 0)),
            (dense_consumer, (
                out_desc, lse, (q_start, query_values, request_values, key_values, key_padding), ints,
                (items, row_tiles, groups, group_heads, all_heads, heads, query_len, key_len, snake),
                (scale, tanh_scale),
                (out_tiles, out_rows, q_low_tiles, q_high_tiles, k_low_tiles, k_high_tiles, v_low_tiles, v_high_tiles),
                (q_full, q_empty, k_full, k_empty, v_full, v_empty, turns),
                S, VISIBLE, KEY_VISIBLE, BOUNDS, INTERVAL, EPILOGUE, 1)),
            (dense_producer, (
                (q_desc, k_desc, v_desc, extra), (q_start, query_values, request_values, key_values, key_padding), ints,
                (items, row_tiles, groups, group_heads, all_heads, heads, query_len, key_len, snake),
                (q_low, q_high, k_low, k_high, v_low, v_high, out_tiles),
                (q_full, q_empty, k_full, k_empty, v_full, v_empty), S, BOUNDS)),
        ], [4, 1], [S.consumer_registers, S.producer_registers])  # fmt: skip
    else:
        gl.warp_specialize([
            (dense_consumer, (
                out_desc, lse, (q_start, query_values, request_values, key_values, key_padding), ints,
                (items, row_tiles, groups, group_heads, all_heads, heads, query_len, key_len, snake),
                (scale, tanh_scale),
                (out_tiles, out_rows, q_low_tiles, q_high_tiles, k_low_tiles, k_high_tiles, v_low_tiles, v_high_tiles),
                (q_full, q_empty, k_full, k_empty, v_full, v_empty, turns),
                S, VISIBLE, KEY_VISIBLE, BOUNDS, INTERVAL, EPILOGUE, 0)),
            (dense_consumer, (
                out_desc, lse, (q_start, query_values, request_values, key_values, key_padding), ints,
                (items, row_tiles, groups, group_heads, all_heads, heads, query_len, key_len, snake),
                (scale, tanh_scale),
                (out_tiles, out_rows, q_low_tiles, q_high_tiles, k_low_tiles, k_high_tiles, v_low_tiles, v_high_tiles),
                (q_full, q_empty, k_full, k_empty, v_full, v_empty, turns),
                S, VISIBLE, KEY_VISIBLE, BOUNDS, INTERVAL, EPILOGUE, 1)),
            (dense_consumer, (
                out_desc, lse, (q_start, query_values, request_values, key_values, key_padding), ints,
                (items, row_tiles, groups, group_heads, all_heads, heads, query_len, key_len, snake),
                (scale, tanh_scale),
                (out_tiles, out_rows, q_low_tiles, q_high_tiles, k_low_tiles, k_high_tiles, v_low_tiles, v_high_tiles),
                (q_full, q_empty, k_full, k_empty, v_full, v_empty, turns),
                S, VISIBLE, KEY_VISIBLE, BOUNDS, INTERVAL, EPILOGUE, 2)),
            (dense_producer, (
                (q_desc, k_desc, v_desc, extra), (q_start, query_values, request_values, key_values, key_padding), ints,
                (items, row_tiles, groups, group_heads, all_heads, heads, query_len, key_len, snake),
                (q_low, q_high, k_low, k_high, v_low, v_high, out_tiles),
                (q_full, q_empty, k_full, k_empty, v_full, v_empty), S, BOUNDS)),
        ], [4, 4, 1], [S.consumer_registers, S.consumer_registers, S.producer_registers])  # fmt: skip
