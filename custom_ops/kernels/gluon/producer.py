"""The producer warp: copies queries, and keys and values page by page, into shared memory, ahead of the consumers."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from custom_ops.kernels.gluon.compat import async_load
from custom_ops.kernels.gluon.walk import block_of, keys_of_entry, rows_of_entry, schedule_of


@gluon.jit
def copy_tile(source, page, row, column, boxes, tile, full, COLUMNS: gl.constexpr, S: gl.constexpr):
    """Copies a tile of ``COLUMNS`` boxes across, from (page, row) a box on, to shared memory's ``tile``.

    TMA fills a box of a page outside the cache with zeros.
    """
    BOXES: gl.constexpr = S.boxes
    for i in gl.static_range(BOXES):
        for j in gl.static_range(COLUMNS):
            box = boxes.index((tile * COLUMNS + j) * BOXES + i)
            async_load(source, [page[i], row[i], column + j * 64], full, box)


@gluon.jit
def copy_queries(source, token, head, boxes, full, stage, S: gl.constexpr):
    """Copies the queries of a row tile: the rows past the last token or head are 0, or a neighbour's."""
    PARTS: gl.constexpr = S.tile_rows // 64
    COLUMNS: gl.constexpr = S.columns
    mbarrier.expect(full.index(stage), S.query_bytes)
    for c in gl.static_range(PARTS):
        for j in gl.static_range(COLUMNS):
            box = boxes.index((stage * PARTS + c) * COLUMNS + j)
            at = [token + c * S.consumer_tokens, head * S.group + block_of(S) * S.block_heads, j * 64]
            async_load(source, at, full.index(stage), box)


@gluon.jit
def copy_item_queries(source, token, head, queries, boxes, full, empty, S: gl.constexpr):
    """Copies the queries of the item that ``queries`` counts, as soon as their stage is free."""
    stage = queries % S.query_stages
    mbarrier.wait(empty.index(stage), ((queries // S.query_stages) & 1) ^ 1)
    copy_queries(source, token, head, boxes, full, stage, S)


@gluon.jit
def copy_keys_and_values(
    k_source, v_source, page, row, column, filled, is_first, q_source, token, head, queries, boxes, barriers,
    S: gl.constexpr,
):  # fmt: skip
    """Copies the tile that ``filled`` counts into its stage of K and of V, each as soon as it is free.

    The queries of an item come after the first tile of its K, which need not wait for them to be free.
    """
    q_boxes, k_boxes, v_boxes = boxes
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    stage = filled % S.stages
    free = ((filled // S.stages) & 1) ^ 1
    mbarrier.wait(k_empty.index(stage), free)
    mbarrier.expect(k_full.index(stage), S.tile_bytes)
    copy_tile(k_source, page, row, column, k_boxes, stage, k_full.index(stage), S.columns, S)
    if is_first:
        copy_item_queries(q_source, token, head, queries, q_boxes, q_full, q_empty, S)
    mbarrier.wait(v_empty.index(stage), free)
    mbarrier.expect(v_full.index(stage), S.tile_bytes)
    copy_tile(v_source, page, row, column, v_boxes, stage, v_full.index(stage), S.columns, S)


@gluon.jit
def copy_latents(
    source, _v_source, page, row, column, filled, is_first, q_source, token, head, queries, boxes, barriers,
    S: gl.constexpr,
):  # fmt: skip
    """Copies the tile that ``filled`` counts, each piece of it as soon as it is free.

    The rotary part goes with the last piece: it is free when all pieces are (latents.py).
    """
    q_boxes, k_boxes, rotary_boxes = boxes
    q_full, q_empty, full, empty = barriers
    PIECES: gl.constexpr = S.pieces
    ROTARY_BYTES: gl.constexpr = S.tile_bytes - PIECES * S.piece_bytes
    stage = filled % S.stages
    free = ((filled // S.stages) & 1) ^ 1
    for i in gl.static_range(PIECES):
        piece = stage * PIECES + i
        piece_full = full.index(piece)
        mbarrier.wait(empty.index(piece), free)
        mbarrier.expect(piece_full, S.piece_bytes if i < PIECES - 1 else S.piece_bytes + ROTARY_BYTES)
        copy_tile(source, page, row, column + i * S.piece_columns, k_boxes, piece, piece_full, S.piece_boxes, S)
        if i == PIECES - 1:
            copy_tile(source, page, row, column + S.out_dim, rotary_boxes, stage, piece_full, 1, S)
    if is_first:
        copy_item_queries(q_source, token, head, queries, q_boxes, q_full, q_empty, S)


@gluon.jit
def producer(
    sources, schedule_at, page_tables, table_stride, max_pages, boxes, barriers, S: gl.constexpr, RANGE: gl.constexpr
):
    """Walks the program's items. ``filled`` counts tiles and ``queries`` items: stages and phases follow from them."""
    COPY: gl.constexpr = copy_latents if S.latent else copy_keys_and_values
    q_source, k_source, v_source, new_k_source, new_v_source = sources
    BOXES: gl.constexpr = S.boxes
    schedule = schedule_of(schedule_at, S)
    x, end, entry, step = schedule.start(S)
    filled = x * 0
    queries = x * 0
    while x < end:
        if S.reload:
            schedule = schedule_of(schedule_at, S)
        entry, head, first, last, _whole = schedule.item(x, end, entry, step, S)
        keys = keys_of_entry(schedule, entry, S, RANGE)
        if keys.tiles > 0:
            rows = rows_of_entry(schedule, entry, S)
            token = rows.q_start + rows.token
            column = head * S.head_dim
            # Pages without a key of this row tile become -1: what the table says of them may be anything.
            pages = page_tables + keys.request.to(gl.int64) * table_stride
            page_first = keys.lower // S.page_size
            page_end = gl.minimum((gl.minimum(keys.upper, keys.stored) + S.page_size - 1) // S.page_size, max_pages)
            cached_last = last
            if S.direct:
                cached_last = gl.minimum(last, keys.cached)
            for tile in range(first, cached_last):
                key = (keys.cached_first + tile) * S.block_n
                # Loaded before the wait for a free stage, which hides what the load takes.
                page = ()
                row = ()
                for i in gl.static_range(BOXES):
                    number = key // S.page_size + i
                    is_read = (number >= page_first) & (number < page_end)
                    page = page + (gl.load(pages + number, mask=is_read, other=-1),)  # type: ignore[assignment]
                    row = row + (key % S.page_size,)  # type: ignore[assignment]
                COPY(
                    k_source, v_source, page, row, column, filled,
                    tile == first, q_source, token, head, queries, boxes, barriers, S,
                )  # fmt: skip
                filled += 1
            if S.direct:
                if S.reload:
                    schedule = schedule_of(schedule_at, S)
                    _entry, head, first, last, _whole = schedule.item(x, end, entry, step, S)
                    keys = keys_of_entry(schedule, entry, S, RANGE)
                    rows = rows_of_entry(schedule, entry, S)
                    token = rows.q_start + rows.token
                    column = head * S.head_dim
                for tile in range(gl.maximum(first, keys.cached), last):
                    key = (keys.new_first + tile - keys.cached) * S.block_n
                    page = ()
                    row = ()
                    for i in gl.static_range(BOXES):
                        at = key + i * S.box_keys
                        page = page + (gl.where(at < keys.upper - keys.context, 0, -1),)  # type: ignore[assignment]
                        row = row + (rows.q_start + at,)  # type: ignore[assignment]
                    COPY(
                        new_k_source, new_v_source, page, row, column, filled,
                        tile == first, q_source, token, head, queries, boxes, barriers, S,
                    )  # fmt: skip
                    filled += 1
            queries += 1
        if S.reload:
            schedule = schedule_of(schedule_at, S)
        x, entry, step = schedule.after(x, end, entry, step, S)
