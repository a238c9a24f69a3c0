"""The tile loop: attention of a tile of packed query rows over tiles of keys. Kernels and templates share it.

Legend
    B, Hq, Hkv      batch, query heads, KV heads; G = Hq / Hkv query heads share one KV head (a GQA group)
    Hv              value heads; SHARING = Hkv / Hv KV heads share one (1, but for values made for all heads at once)
    D, DV           head dim of q and k, and of v; D_PAD, DV_PAD the next powers of two, at least 16
    row             a query of one head of the group: row r is query r // G, head r % G: no G wastes rows
    BLOCK_M         rows a tile; BLOCK_N keys a tile
    anchor          where a row tile's key tiles start: at its first visible key where that costs nothing, else at 0
    DESCRIPTORS     K and V are read by tensor descriptors (the GPU's bulk copy engine) instead of pointers
    ints, ...value  the mask's operands by slot (custom_ops/mask_printing.py)
    softcap         where HAS_SOFTCAP, a scaled score s counts as softcap * tanh(s / softcap)

Softmax runs online in base 2: ``qk_scale`` is scale * log2(e). Keys of partial tiles go through the mask's predicate;
keys of full tiles, which every row sees, do not. Per-key operands (padding, ids) are read and applied in every tile.
"""

import triton
import triton.language as tl


@triton.jit
def load_rows(
    base, index, stride, columns, valid, COLUMNS: tl.constexpr, COLUMNS_PAD: tl.constexpr, CHECKED: tl.constexpr
):
    """``[len(index), COLUMNS_PAD]`` rows of a matrix; 0 past COLUMNS and, where CHECKED, where not ``valid``."""
    pointers = base + index[:, None] * stride + columns[None, :]
    if CHECKED:
        if COLUMNS == COLUMNS_PAD:
            return tl.load(pointers, mask=valid[:, None], other=0.0)
        return tl.load(pointers, mask=valid[:, None] & (columns[None, :] < COLUMNS), other=0.0)
    if COLUMNS == COLUMNS_PAD:
        return tl.load(pointers)
    return tl.load(pointers, mask=columns[None, :] < COLUMNS, other=0.0)


@triton.jit
def load_query(Q, rows_at, valid, D: tl.constexpr, D_PAD: tl.constexpr):
    """The rows at offsets ``rows_at`` of Q in two parts, ``q, q_high``, for ``attend``.

    A head dim of up to three quarters of its power of two is cut at half of it: 192 is 128 + 64, 96 is 64 + 32, 80 is
    64 + 16. Then q is ``[BLOCK_M, D_PAD / 2]`` and q_high holds the rest, padded to its own power of two; other dims
    leave q whole ``[BLOCK_M, D_PAD]`` (and ``q_high`` is q again). Products of 0 cost as much as others: on an H200
    the cut gave 12% at 96, 15% at 80 and 5% at 192 / 128.
    """
    HALF: tl.constexpr = D_PAD // 2
    REST: tl.constexpr = D - HALF
    if D_PAD < 64 or REST > HALF // 2:
        q = load_rows(Q, rows_at, 1, tl.arange(0, D_PAD), valid, D, D_PAD, True)
        return q, q
    else:
        q = load_rows(Q, rows_at, 1, tl.arange(0, HALF), valid, HALF, HALF, True)
        HIGH: tl.constexpr = HALF // 4 if HALF >= 64 and REST <= HALF // 4 else HALF // 2
        return q, load_rows(Q + HALF, rows_at, 1, tl.arange(0, HIGH), valid, REST, HIGH, True)


@triton.jit
def load_key_rows(
    K, start, offsets, stride, valid,
    FROM: tl.constexpr, COLUMNS: tl.constexpr, COLUMNS_PAD: tl.constexpr,
    CHECKED: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """``[BLOCK_N, COLUMNS_PAD]``, a tile of K or V: COLUMNS columns from FROM on of the rows from ``start`` on.

    0 past COLUMNS and past the last row.
    """
    if DESCRIPTORS:
        return K.load([start.to(tl.int32), FROM])
    else:
        # 64-bit up to the tile's first key, 32-bit inside the tile.
        base = K + start.to(tl.int64) * stride + FROM
        return load_rows(base, offsets, stride, tl.arange(0, COLUMNS_PAD), valid, COLUMNS, COLUMNS_PAD, CHECKED)


@triton.jit
def load_key_operands(
    key, valid, KEY_VALUES, KEY_PADDING, HAS_KEY_VALUES: tl.constexpr, HAS_KEY_PADDING: tl.constexpr
):
    """The mask's per-key operands of these keys, and ``valid`` without the padded ones."""
    key_value = key
    key_padding = key
    if HAS_KEY_VALUES:
        key_value = tl.load(KEY_VALUES + key, mask=valid, other=0)
    if HAS_KEY_PADDING:
        key_padding = tl.load(KEY_PADDING + key, mask=valid, other=1).to(tl.int32)
        valid = valid & (key_padding == 0)
    return key_value, key_padding, valid


@triton.jit
def keep_scores(
    q_position, key, valid, ints, request_value, query_value, key_value, key_padding,
    VISIBLE: tl.constexpr, KEY_VISIBLE: tl.constexpr, PARTIAL: tl.constexpr, READS_KEYS: tl.constexpr,
):  # fmt: skip
    """Which of the ``[rows, keys]`` scores count."""
    keep = valid[None, :]
    if PARTIAL:
        keep = keep & VISIBLE(
            q_position[:, None], key[None, :], ints,
            request_value, query_value[:, None], key_value[None, :], key_padding[None, :],
        )  # fmt: skip
    if READS_KEYS:
        keep = keep & KEY_VISIBLE(
            q_position[:, None], key[None, :], ints,
            request_value, query_value[:, None], key_value[None, :], key_padding[None, :],
        )  # fmt: skip
    return keep


@triton.jit
def tanh_of_scores(scores, qk_scale, softcap):
    """``tanh(s / softcap)``, where ``s * log2(e)`` is ``scores * qk_scale``.

    ``1 - 2 / (exp(2x) + 1)`` is right at both ends, where exp is 0 or infinite, but off by a rounding of 1 whatever x
    is, which the cap multiplies: near 0 a series takes over.
    """
    # Never infinite: 0 * inf is NaN.
    doubled = scores * tl.minimum(qk_scale * 2.0 / softcap, 3e38)
    x = doubled * 0.34657359027997264
    square = x * x
    series = 1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835))))
    return tl.where(square < 0.0625, x * series, 1.0 - 2.0 / (tl.exp2(doubled) + 1.0))


@triton.jit
def attend_tiles(
    acc, row_sum, row_max, q, q_high, q_position, query_value, request_value, ints,
    K, K_HIGH, V, stride_kn, stride_vn, KEY_VALUES, KEY_PADDING,
    anchor, first_tile, tiles, jump_after, jump, key_len, qk_scale, softcap,
    VISIBLE: tl.constexpr, KEY_VISIBLE: tl.constexpr, PARTIAL: tl.constexpr, READS_KEYS: tl.constexpr,
    HAS_KEY_VALUES: tl.constexpr, HAS_KEY_PADDING: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Online softmax over ``tiles`` key tiles from ``first_tile`` on.

    It skips ``jump`` tiles after the first ``jump_after``: one loop serves the partial tiles on both sides of the
    full ones.
    """
    # A full tile lies inside the sequence whole: only its padding, if any, hides keys.
    CHECKED: tl.constexpr = PARTIAL or READS_KEYS
    LOW: tl.constexpr = q.shape[1]
    offsets = tl.arange(0, BLOCK_N)
    for i in range(tiles):
        tile = first_tile + i
        if PARTIAL:
            tile += tl.where(i >= jump_after, jump, 0)
        start = anchor + tile * BLOCK_N
        key = start + offsets
        valid = key < key_len
        key_value, key_padding, valid = load_key_operands(
            key, valid, KEY_VALUES, KEY_PADDING, HAS_KEY_VALUES, HAS_KEY_PADDING
        )
        k = load_key_rows(K, start, offsets, stride_kn, valid, 0, min(D, LOW), LOW, CHECKED, DESCRIPTORS)
        # V beside K, not where it is used. With descriptors it is waited for there (14% on an H200), as in loops of a
        # tile or two; in long loops over pointers the compiler makes the same code of both.
        v = load_key_rows(V, start, offsets, stride_vn, valid, 0, DV, DV_PAD, CHECKED, DESCRIPTORS)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if LOW < D_PAD:
            HIGH: tl.constexpr = q_high.shape[1]
            k_high = load_key_rows(K_HIGH, start, offsets, stride_kn, valid, LOW, D - LOW, HIGH, CHECKED, DESCRIPTORS)
            scores = tl.dot(q_high, tl.trans(k_high), scores, input_precision=PRECISION)
        if HAS_SOFTCAP:
            scores = tanh_of_scores(scores, qk_scale, softcap)
            to_base_2 = softcap * 1.4426950408889634
        else:
            to_base_2 = qk_scale
        if CHECKED:
            keep = keep_scores(
                q_position, key, valid, ints, request_value, query_value, key_value, key_padding,
                VISIBLE, KEY_VISIBLE, PARTIAL, READS_KEYS,
            )  # fmt: skip
            scores = tl.where(keep, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * to_base_2)
        shift = new_max
        if CHECKED:
            # A row that has seen nothing yet has maximum -inf: subtract 0 instead, -inf - -inf is NaN.
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores * to_base_2 - shift[:, None])
        correction = tl.exp2(row_max - shift)
        row_sum = row_sum * correction + tl.sum(weights, 1)
        acc = acc * correction[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
        row_max = new_max
    return acc, row_sum, row_max


@triton.jit
def key_tiles(lo_any, lo_all, hi_all, hi_any, BLOCK_N: tl.constexpr):
    """Bounds in keys as tiles: ``first <= full_first <= full_end <= end``.

    Tiles in [full_first, full_end) are full, the others partial.
    """
    first = lo_any // BLOCK_N
    end = tl.maximum(tl.cdiv(hi_any, BLOCK_N), first)
    full_first = tl.minimum(tl.maximum(tl.cdiv(lo_all, BLOCK_N), first), end)
    full_end = tl.minimum(tl.maximum(hi_all // BLOCK_N, full_first), end)
    return first, full_first, full_end, end


@triton.jit
def lowest_and_highest(low, high, other_low, other_high):
    """Both ends of a range in one reduction: half the barriers of a minimum and then a maximum."""
    return tl.minimum(low, other_low), tl.maximum(high, other_high)


@triton.jit
def row_operands(
    query, row_valid, batch, query_len, Q_START, QUERY_VALUES, REQUEST_VALUES,
    HAS_Q_START: tl.constexpr, HAS_QUERY_VALUES: tl.constexpr, HAS_REQUEST_VALUES: tl.constexpr,
    MEETS_KEYS: tl.constexpr = False,
):  # fmt: skip
    """Positions and per-query operands of the rows, the request's operand, the per-query operand's range.

    The range is over the valid rows. MEETS_KEYS: the operand is compared with one of the keys' own, so all its bits
    count.
    """
    position_shift = 0
    if HAS_Q_START:
        position_shift = tl.load(Q_START + batch)
    request_value = 0
    if HAS_REQUEST_VALUES:
        request_value = tl.load(REQUEST_VALUES + batch)
    query_value = query
    query_min = 0
    query_max = 0
    if HAS_QUERY_VALUES:
        values = QUERY_VALUES + batch.to(tl.int64) * query_len
        # 64-bit ids past 32 bits see what the nearest 32-bit id sees: positions are 32-bit.
        whole_value = tl.load(values + query, mask=row_valid, other=0)
        query_value = tl.minimum(tl.maximum(whole_value, -2147483648), 2147483647).to(tl.int32)
        low = tl.where(row_valid, query_value, 2147483647)
        high = tl.where(row_valid, query_value, -2147483648)
        query_min, query_max = tl.reduce((low, high), 0, lowest_and_highest)
        if MEETS_KEYS:
            query_value = whole_value
    return position_shift, request_value, query_value, query_min, query_max


@triton.jit
def attend(
    q, query, row_valid, first_query, last_query, batch, query_len, key_len, K, V, stride_kn, stride_vn,
    Q_START, QUERY_VALUES, REQUEST_VALUES, KEY_VALUES, KEY_PADDING, ints, scale,
    VISIBLE: tl.constexpr, KEY_VISIBLE: tl.constexpr, BOUNDS: tl.constexpr,
    READS_KEYS: tl.constexpr, MAY_BE_FULL: tl.constexpr,
    HAS_Q_START: tl.constexpr, HAS_QUERY_VALUES: tl.constexpr, HAS_REQUEST_VALUES: tl.constexpr,
    HAS_KEY_VALUES: tl.constexpr, HAS_KEY_PADDING: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    q_high=None, DESCRIPTORS: tl.constexpr = False, softcap=0.0, HAS_SOFTCAP: tl.constexpr = False,
):  # fmt: skip
    """Attention of one tile of rows against the keys and values at K and V (already at batch and KV head).

    ``q`` is ``[BLOCK_M, D_PAD]``, or the first of ``load_query``'s two parts with ``q_high`` the other. Per-query and
    per-key operands are contiguous rows ``[B, Lq]`` and ``[B, Lk]``. DESCRIPTORS only where
    ``tile_config.can_use_descriptors`` and every address and stride of K and V is a multiple of 16 bytes; such a
    launch needs Triton's allocator (``triton.set_allocator``). Returns
    ``out [BLOCK_M, DV_PAD]`` fp32, normalised (0 where a row sees nothing), and ``lse [BLOCK_M]``, natural log (-inf
    where a row sees nothing).
    """
    tl.static_assert(not (DESCRIPTORS and HAS_KEY_PADDING), "descriptors read hidden keys too, and 0 * NaN is NaN")
    position_shift, request_value, query_value, query_min, query_max = row_operands(
        query, row_valid, batch, query_len, Q_START, QUERY_VALUES, REQUEST_VALUES,
        HAS_Q_START, HAS_QUERY_VALUES, HAS_REQUEST_VALUES, HAS_KEY_VALUES,
    )  # fmt: skip
    lo_any, lo_all, hi_all, hi_any = BOUNDS(
        first_query + position_shift, last_query + position_shift, key_len, ints, request_value, query_min, query_max
    )
    # Long loops over pointers keep multiples of BLOCK_N: an anchor in their addresses cost 5% on an H200.
    anchor = 0
    if DESCRIPTORS or not MAY_BE_FULL:
        anchor = lo_any
    first, full_first, full_end, end = key_tiles(
        lo_any - anchor, lo_all - anchor, hi_all - anchor, hi_any - anchor, BLOCK_N
    )
    keys_before = batch.to(tl.int64) * key_len
    q_position = query + position_shift
    if q_high is None:
        q_high = q
    # Never 0: 0 * -inf, a hidden score, is NaN.
    qk_scale = tl.maximum(scale * 1.4426950408889634, 1e-30)
    if DESCRIPTORS:
        LOW: tl.constexpr = q.shape[1]
        HIGH: tl.constexpr = q_high.shape[1]
        keys = tl.make_tensor_descriptor(K, [key_len, D], [stride_kn, 1], [BLOCK_N, LOW])
        values = tl.make_tensor_descriptor(V, [key_len, DV], [stride_vn, 1], [BLOCK_N, DV_PAD])
        if LOW < D_PAD:
            keys_high = tl.make_tensor_descriptor(K, [key_len, D], [stride_kn, 1], [BLOCK_N, HIGH])
        else:
            keys_high = keys
    else:
        keys = K
        keys_high = K
        values = V
    acc = tl.zeros([BLOCK_M, DV_PAD], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    partial_tiles = end - first
    jump = 0
    if MAY_BE_FULL:
        acc, row_sum, row_max = attend_tiles(
            acc, row_sum, row_max, q, q_high, q_position, query_value, request_value, ints,
            keys, keys_high, values, stride_kn, stride_vn, KEY_VALUES + keys_before, KEY_PADDING + keys_before,
            anchor, full_first, full_end - full_first, 0, 0, key_len, qk_scale, softcap,
            VISIBLE, KEY_VISIBLE, False, READS_KEYS, HAS_KEY_VALUES, HAS_KEY_PADDING, HAS_SOFTCAP, PRECISION,
            BLOCK_N, D, D_PAD, DV, DV_PAD, DESCRIPTORS,
        )  # fmt: skip
        partial_tiles = full_first - first + end - full_end
        jump = full_end - full_first
    acc, row_sum, row_max = attend_tiles(
        acc, row_sum, row_max, q, q_high, q_position, query_value, request_value, ints,
        keys, keys_high, values, stride_kn, stride_vn, KEY_VALUES + keys_before, KEY_PADDING + keys_before,
        anchor, first, partial_tiles, full_first - first, jump, key_len, qk_scale, softcap,
        VISIBLE, KEY_VISIBLE, True, READS_KEYS, HAS_KEY_VALUES, HAS_KEY_PADDING, HAS_SOFTCAP, PRECISION,
        BLOCK_N, D, D_PAD, DV, DV_PAD, DESCRIPTORS,
    )  # fmt: skip
    sees_nothing = row_sum == 0.0
    out = acc * (1.0 / tl.where(sees_nothing, 1.0, row_sum))[:, None]
    lse = tl.where(sees_nothing, float("-inf"), (row_max + tl.log2(row_sum)) * 0.6931471805599453)
    return out, lse


@triton.jit
def tile_of_program(row_tiles, heads, HEADS_TOGETHER: tl.constexpr):
    """Which row tile and which (batch, KV head) a program computes.

    The last tiles first, since causal masks give them most keys, and HEADS_TOGETHER heads side by side, so that what
    runs at once reads the K and V of few heads (they fit L2).
    """
    program = tl.program_id(0)
    span = row_tiles * HEADS_TOGETHER
    first_head = (program // span) * HEADS_TOGETHER
    heads_here = tl.minimum(heads - first_head, HEADS_TOGETHER)
    inside = program % span
    return row_tiles - 1 - inside // heads_here, first_head + inside % heads_here
