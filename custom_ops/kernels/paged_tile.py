"""Attention of a row tile over the key tiles of a paged cache and of the new tokens. Kernels and templates share it.

Legend, beside that of ``custom_ops/paged/schedule_layout.py`` (unit, entry, item, part)
    G_ALL           query heads of a KV head. They are cut into HEAD_BLOCKS blocks of G, the last one maybe smaller, and
                    each is computed by a program of its own: HEAD_BLOCKS of them walk the same units
    G               query heads in a tile; PG the next power of two: row r is token ``r // PG``, head ``r % PG`` of the
                    block, and rows with ``r % PG >= G`` are empty
    BLOCK_M         rows a tile, of TILE_TOKENS = BLOCK_M / PG tokens; BLOCK_N keys a tile
    D               head dim; DV elements of a value, and DV_PAD the next power of two
    LATENT          whether a value is the first DV elements of its key: a key tile is read once for both. Else DV is D.
                    The D - DV elements after those, which may be none, are a tile of R_PAD columns of their own
    context, valid  cached tokens of the request, and its real new ones: ``values`` is these two, then what the mask
                    reads besides
    cached, new     where a key tile's keys are: behind the page table, or in k and v. No tile has both
    stored          positions that the page table covers: context, or all where new keys are in the cache too
    DIRECT          whether new keys are read from k and v
    SAME_STRIDES    whether pages and tokens of V are as far apart as those of K, in the cache and in k and v
    MERGED          whether one loop runs over cached and new tiles: both have one dtype and unit strides along D

Softmax runs online in base 2, as in ``custom_ops/kernels/tile.py``. Keys that no row of the tile sees are not read:
their slots, and the pages and padded tokens behind them, may hold NaN, and 0 * NaN is NaN.
"""

import triton
import triton.language as tl

from custom_ops.paged import schedule_layout

HEADER_SIZE = tl.constexpr(schedule_layout.HEADER_SIZE)
ENTRY_FIELDS = tl.constexpr(schedule_layout.ENTRY_FIELDS)
OF_REQUEST = tl.constexpr(schedule_layout.OF_REQUEST)
PROGRAM_FIELDS = tl.constexpr(schedule_layout.PROGRAM_FIELDS)


@triton.jit
def request_tiles(
    first_row, new, values, RANGE: tl.constexpr, DIRECT: tl.constexpr, TILE_TOKENS: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Key tiles of row tiles: ``first cached tile, cached tiles, first new tile, new tiles``, elementwise.

    ``first_row``: the row tile's first token, counted from the request's first new one; ``new``: its new tokens. Cached
    tile j has the positions from ``j * BLOCK_N`` on, new tile j those from ``context + j * BLOCK_N`` on; without DIRECT
    all keys are cached ones.
    """
    context = values[0]
    last_row = tl.minimum(first_row + TILE_TOKENS, tl.minimum(new, values[1])) - 1
    sees = last_row >= first_row
    lower, _ = RANGE(context + first_row, values)
    _, upper = RANGE(context + tl.maximum(last_row, 0), values)
    lower = tl.maximum(lower, 0)
    upper = tl.minimum(upper, context + values[1])
    stored = context
    if not DIRECT:
        stored += new
    cached_first = lower // BLOCK_N
    cached_end = tl.cdiv(tl.maximum(tl.minimum(upper, stored), 0), BLOCK_N)
    cached_tiles = tl.where(sees, tl.maximum(cached_end - cached_first, 0), 0)
    new_first = cached_first * 0
    new_tiles = cached_tiles * 0
    if DIRECT:
        new_first = tl.maximum(lower - context, 0) // BLOCK_N
        new_end = tl.cdiv(tl.maximum(upper - context, 0), BLOCK_N)
        new_tiles = tl.where(sees, tl.maximum(new_end - new_first, 0), 0)
    return cached_first, cached_tiles, new_first, new_tiles


@triton.jit
def program_range(SCHEDULE, capacity, program):
    """``first unit, end unit, entry of the first unit`` of a program. ``capacity``: E."""
    record = SCHEDULE + HEADER_SIZE + capacity * ENTRY_FIELDS
    record += program * PROGRAM_FIELDS
    return tl.load(record), tl.load(record + 1), tl.load(record + 2)


@triton.jit
def item_of_unit(SCHEDULE, entry, unit, end, HEADS: tl.constexpr):
    """The item of ``unit``, and what of it lies before ``end``.

    Returns ``request, row tile, head, first tile of the part, end of the part, tiles of the item, next entry``; the
    last is the entry of the unit after the part.
    """
    record = SCHEDULE + HEADER_SIZE + entry * ENTRY_FIELDS
    before = tl.load(record)
    tiles = tl.load(record + 1)
    head = (unit - before) // tiles
    first = unit - before - head * tiles
    part_end = tl.minimum(tiles, first + end - unit)
    next_entry = entry + tl.where((head == HEADS - 1) & (part_end == tiles), 1, 0)
    return tl.load(record + 2), tl.load(record + 3), head, first, part_end, tiles, next_entry


@triton.jit
def item_values(SCHEDULE, entry):
    """``q_start, new`` and the mask's six values of an entry's request."""
    record = SCHEDULE + HEADER_SIZE + entry * ENTRY_FIELDS + OF_REQUEST
    values = (
        tl.load(record + 2), tl.load(record + 3), tl.load(record + 4), tl.load(record + 5), tl.load(record + 6),
        tl.load(record + 7),
    )  # fmt: skip
    return tl.load(record), tl.load(record + 1), values


@triton.jit
def item_rows(
    row_tile, kv_head, block, q_start, new, values, not_negative,
    G_ALL: tl.constexpr, G: tl.constexpr, PG: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Each row's ``token`` of the request, row of q (64 bits), query head, whether it is one, and whether it sees keys.

    ``block``: of the query heads of ``kv_head``. ``not_negative``: any number that is not. Called with one before and
    another after the loop over key tiles, the compiler computes all this twice; otherwise it keeps it, 80 registers of
    spills at 64 x 64 tiles.
    """
    row = tl.arange(0, BLOCK_M) + tl.minimum(not_negative, 0)
    token = row_tile * (BLOCK_M // PG) + row // PG
    head = block * G + row % PG
    is_row = (token < new) & (row % PG < G) & (head < G_ALL)
    return token, (q_start + token).to(tl.int64), kv_head * G_ALL + head, is_row, is_row & (token < values[1])


@triton.jit
def load_queries(
    Q, at, head, stride_q, sees, D: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, R_PAD: tl.constexpr
):
    """``q [BLOCK_M, DV_PAD]``, the first DV elements of each row, and ``q_high [BLOCK_M, R_PAD]``, those after them.

    0 past D and in rows that see nothing. ``q_high`` is ``q`` again where there are none after them. ``stride_q``:
    token, head.
    """
    rows = Q + (at * stride_q[0] + head * stride_q[1])[:, None]
    column = tl.arange(0, DV_PAD)[None, :]
    q = tl.load(rows + column, mask=sees[:, None] & (column < DV), other=0.0)
    q_high = q
    if D > DV:
        column = DV + tl.arange(0, R_PAD)[None, :]
        q_high = tl.load(rows + column, mask=sees[:, None] & (column < D), other=0.0)
    return q, q_high


@triton.jit
def load_pages(PAGES, start, offsets, end, max_pages, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Page ids of the keys from ``start`` on: one where a page holds whole tiles, else ``[BLOCK_N]``.

    -1 at ``end`` and after.
    """
    if PAGE_SIZE % BLOCK_N == 0:
        page = start // PAGE_SIZE
        return tl.load(PAGES + page, mask=(start < end) & (page < max_pages), other=-1)
    else:
        page = (start + offsets) // PAGE_SIZE
        return tl.load(PAGES + page, mask=(start + offsets < end) & (page < max_pages), other=-1)


@triton.jit
def tile_rows(
    page, start, offsets, token, is_new, stride_page, stride_token, stride_new,
    CACHED: tl.constexpr, NEW: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Offsets of the keys of a tile, a scalar and ``[BLOCK_N]``: in 64 bits up to the page or the tile's first token.

    Cached ones where not ``is_new``: of the keys from ``start`` on, in ``page``; else those from ``token`` on in k or
    v. One multiplication serves both, with selected strides: a selected row a key costs registers.
    """
    if not CACHED:
        return token.to(tl.int64) * stride_new, offsets * stride_new
    elif PAGE_SIZE % BLOCK_N == 0:
        at = page.to(tl.int64) * stride_page + start % PAGE_SIZE * stride_token
        if NEW:
            at = tl.where(is_new, token.to(tl.int64) * stride_new, at)
            stride_token = tl.where(is_new, stride_new, stride_token)
        return at, offsets * stride_token
    else:
        first = 0
        if BLOCK_N % PAGE_SIZE == 0:
            # A new tile as pages of k and v, one after the other.
            offset = offsets % PAGE_SIZE
        else:
            offset = (start + offsets) % PAGE_SIZE
        if NEW:
            first = tl.where(is_new, token, 0)
            if BLOCK_N % PAGE_SIZE == 0:
                page = tl.where(is_new, offsets // PAGE_SIZE, page)
                stride_page = tl.where(is_new, stride_new * PAGE_SIZE, stride_page)
            else:
                page = tl.where(is_new, 0, page)
                offset = tl.where(is_new, offsets, offset)
            stride_token = tl.where(is_new, stride_new, stride_token)
        rows = page.to(tl.int64) * stride_page + offset * stride_token
        return tl.cast(first, tl.int64) * stride_new, rows


@triton.jit
def load_tile(base, rows, columns, valid, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """``[BLOCK_N, PADDED]`` of keys or values, 0 where not ``valid`` and from column WIDTH on."""
    if WIDTH == PADDED:
        return tl.load(base + rows[:, None] + columns[None, :], mask=valid[:, None], other=0.0)
    else:
        inside = valid[:, None] & (tl.arange(0, PADDED) < WIDTH)[None, :]
        return tl.load(base + rows[:, None] + columns[None, :], mask=inside, other=0.0)


@triton.jit
def attend_tiles(
    acc, row_sum, row_max, q, q_high, position, sees, lower, upper, values,
    PAGES, K_CACHE, V_CACHE, K, V, stride_kc, stride_vc, stride_kt, stride_vt,
    first, end, cached_tiles, cached_first, new_first, stored, q_start, page_count, max_pages,
    lowest, lowest_of_all, highest_of_all, highest, qk_scale, softcap,
    VISIBLE: tl.constexpr, EXACT: tl.constexpr, CACHED: tl.constexpr, NEW: tl.constexpr,
    SAME_STRIDES: tl.constexpr, X: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
    LATENT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, R_PAD: tl.constexpr,
):  # fmt: skip
    """Online softmax over key tiles ``first`` to ``end`` of an item: the cached ones come first, then the new ones.

    CACHED, NEW: which of them can be among these. A row sees keys in ``lower[r] <= k < upper[r]``; over the tile those
    ends are ``lowest`` to ``lowest_of_all`` and ``highest_of_all`` to ``highest``, so tiles between the inner two need
    no comparison. Where not EXACT the mask hides keys inside too.
    """
    offsets = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, DV_PAD)
    k_columns = dims
    v_columns = dims
    if not NEW:
        # In the distinct layout X elements of a key lie together, and one element of a value.
        if X < D:
            k_columns = dims // X * stride_kc[3] + dims % X
        v_columns = dims * stride_vc[3]
    context = values[0]
    cached_end = tl.minimum(stored, highest)
    page = -1
    if CACHED:
        # Loaded a tile ahead: a key's address waits for it.
        start = (cached_first + first) * BLOCK_N
        page = load_pages(PAGES, start, offsets, cached_end, max_pages, PAGE_SIZE, BLOCK_N)
    for i in range(first, end):
        start = (cached_first + i) * BLOCK_N
        token = (new_first + i - cached_tiles) * BLOCK_N
        is_new = i >= cached_tiles
        k_first, k_rows = tile_rows(
            page, start, offsets, q_start + token, is_new, stride_kc[0], stride_kc[1], stride_kt,
            CACHED, NEW, PAGE_SIZE, BLOCK_N,
        )  # fmt: skip
        v_first = k_first
        v_rows = k_rows
        if not SAME_STRIDES:
            v_first, v_rows = tile_rows(
                page, start, offsets, q_start + token, is_new, stride_vc[0], stride_vc[1], stride_vt,
                CACHED, NEW, PAGE_SIZE, BLOCK_N,
            )  # fmt: skip
        inside = offsets >= 0
        if CACHED:
            inside = inside & (page >= 0) & (page < page_count)
            page = load_pages(PAGES, start + BLOCK_N, offsets, cached_end, max_pages, PAGE_SIZE, BLOCK_N)
        if CACHED and NEW:
            inside = inside | is_new
            start = tl.where(is_new, context + token, start)
            key_end = tl.where(is_new, highest, cached_end)
            k_base = tl.where(is_new, K, K_CACHE) + k_first
            v_base = tl.where(is_new, V, V_CACHE) + v_first
        elif CACHED:
            key_end = cached_end
            k_base = K_CACHE + k_first
            v_base = V_CACHE + v_first
        else:
            start = context + token
            key_end = highest
            k_base = K + k_first
            v_base = V + v_first
        key = start + offsets
        valid = inside & (key >= lowest) & (key < key_end)
        if not EXACT:
            keep = VISIBLE(position[:, None], key[None, :], values) & sees[:, None] & valid[None, :]
            valid = valid & (tl.max(keep.to(tl.int32), 0) > 0)
        k = load_tile(k_base, k_rows, k_columns, valid, DV, DV_PAD).to(q.dtype)
        v = k
        if not LATENT:
            v = load_tile(v_base, v_rows, v_columns, valid, DV, DV_PAD).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if LATENT and D > DV:
            k_high = load_tile(k_base + DV, k_rows, tl.arange(0, R_PAD), valid, D - DV, R_PAD)
            scores = tl.dot(q_high, tl.trans(k_high), scores, input_precision=PRECISION)
        if HAS_SOFTCAP:
            # tanh(x) = 1 - 2 / (exp(2x) + 1): right at both ends, where exp is 0 or infinite.
            doubled = scores * (qk_scale * 2.0 / softcap)
            scores = (1.0 - 2.0 / (tl.exp2(doubled) + 1.0)) * (softcap * 1.4426950408889634)
            to_base_2 = 1.0
        else:
            to_base_2 = qk_scale
        if EXACT:
            if (start < lowest_of_all) | (start + BLOCK_N > tl.minimum(highest_of_all, key_end)):
                keep = (key[None, :] >= lower[:, None]) & (key[None, :] < upper[:, None]) & valid[None, :]
                scores = tl.where(keep, scores, float("-inf"))
        else:
            scores = tl.where(keep, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * to_base_2)
        # A row that has seen nothing yet has maximum -inf: subtract 0 instead, -inf - -inf is NaN.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores * to_base_2 - shift[:, None])
        correction = tl.exp2(row_max - shift)
        row_sum = row_sum * correction + tl.sum(weights, 1)
        acc = acc * correction[:, None]
        acc = tl.dot(weights.to(q.dtype), v, acc, input_precision=PRECISION)
        row_max = new_max
    return acc, row_sum, row_max


@triton.jit
def attend_part(
    q, q_high, token, first, end, first_row, new, q_start, values, kv_head,
    PAGES, K_CACHE, V_CACHE, K, V, K_SCALE, V_SCALE, stride_kc, stride_vc, stride_k, stride_v,
    page_count, max_pages, scale, softcap,
    RANGE: tl.constexpr, VISIBLE: tl.constexpr, EXACT: tl.constexpr, DIRECT: tl.constexpr, MERGED: tl.constexpr,
    HAS_K_SCALE: tl.constexpr, HAS_V_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    SAME_STRIDES: tl.constexpr, PAGE_SIZE: tl.constexpr, X: tl.constexpr, TILE_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    LATENT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, R_PAD: tl.constexpr,
):  # fmt: skip
    """Key tiles ``first`` to ``end`` of an item.

    ``q``, ``q_high``: as ``load_queries`` returns them. ``token``: each row's, counted from the request's first new
    one. ``PAGES``: the request's row of the page table. ``stride_kc``, ``stride_vc``: page, token, head and, of K,
    X elements or, of V, one element; ``stride_k``, ``stride_v``: token and head. V_CACHE and V are not read where
    LATENT. Returns ``acc`` ``[BLOCK_M, DV_PAD]``, not normalised, ``row_sum`` and ``row_max`` ``[BLOCK_M]`` in base 2.
    """
    context = values[0]
    rows = tl.minimum(new, values[1])
    last_row = tl.maximum(tl.minimum(first_row + TILE_TOKENS, rows) - 1, first_row)
    lowest, highest_of_all = RANGE(context + first_row, values)
    lowest_of_all, highest = RANGE(context + last_row, values)
    lower, upper = RANGE(context + token, values)
    highest = tl.minimum(highest, context + values[1])
    stored = context
    if not DIRECT:
        stored += new
    cached_first, cached_tiles, new_first, new_tiles = request_tiles(
        first_row, new, values, RANGE, DIRECT, TILE_TOKENS, BLOCK_N
    )
    # An item that sees nothing has one unit all the same.
    end = tl.minimum(end, cached_tiles + new_tiles)
    acc = tl.zeros([BLOCK_M, DV_PAD], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    # Never 0: 0 * -inf, a hidden score, is NaN.
    qk_scale = tl.maximum(scale * 1.4426950408889634, 1e-30)
    cached_scale = qk_scale
    if HAS_K_SCALE:
        cached_scale = tl.maximum(qk_scale * tl.load(K_SCALE), 1e-30)
    keys = K_CACHE + kv_head.to(tl.int64) * stride_kc[2]
    cached_values = V_CACHE + kv_head.to(tl.int64) * stride_vc[2]
    new_keys = K + kv_head.to(tl.int64) * stride_k[1]
    new_values = V + kv_head.to(tl.int64) * stride_v[1]
    tl.static_assert(DIRECT or not MERGED)
    loop_end = end
    if not MERGED:
        loop_end = tl.minimum(end, cached_tiles)
    acc, row_sum, row_max = attend_tiles(
        acc, row_sum, row_max, q, q_high, context + token, token < rows, lower, upper, values,
        PAGES, keys, cached_values, new_keys, new_values, stride_kc, stride_vc, stride_k[0], stride_v[0],
        first, loop_end, cached_tiles, cached_first, new_first, stored, q_start, page_count, max_pages,
        lowest, lowest_of_all, highest_of_all, highest, cached_scale, softcap,
        VISIBLE, EXACT, True, MERGED, SAME_STRIDES, X, HAS_SOFTCAP, PRECISION, PAGE_SIZE, BLOCK_N,
        LATENT, D, DV, DV_PAD, R_PAD,
    )  # fmt: skip
    if HAS_V_SCALE:
        acc *= tl.load(V_SCALE)
    if DIRECT and not MERGED:
        acc, row_sum, row_max = attend_tiles(
            acc, row_sum, row_max, q, q_high, context + token, token < rows, lower, upper, values,
            PAGES, keys, cached_values, new_keys, new_values, stride_kc, stride_vc, stride_k[0], stride_v[0],
            tl.maximum(first, cached_tiles), end, cached_tiles, cached_first, new_first, stored, q_start, page_count,
            max_pages, lowest, lowest_of_all, highest_of_all, highest, qk_scale, softcap,
            VISIBLE, EXACT, False, True, SAME_STRIDES, X, HAS_SOFTCAP, PRECISION, PAGE_SIZE, BLOCK_N,
            LATENT, D, DV, DV_PAD, R_PAD,
        )  # fmt: skip
    return acc, row_sum, row_max
