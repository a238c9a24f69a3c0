"""Consumers over a cache of latents, where a tile of K is its tile of V too, and each value has 512 columns.

64 rows of outputs are half of a multiprocessor's registers: no other row tile fits beside them. So roles differ:

    scorer        a warpgroup: scores and softmax of the 64 rows; it leaves *weights*, P, in shared memory
    accumulator   a consumer: multiplies the weights with two of the four *pieces* of the values, 128 columns each

Every score is computed once: by each of two consumers, a tile would take 3,330 cycles of the tensor cores, not 2,180.

A tile's weights take the place of its rotary part, which only scores need, and its statistics lie beside them: both are
free when all pieces are, so that nobody has to say that they were read.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from custom_ops.kernels.gluon.consumer import clear_unseen_values, seen_scores, thread_sums, visible_to
from custom_ops.kernels.gluon.results import NO_SCORE, Results, leave_statistics, leave_sums, meet, out_column
from custom_ops.kernels.gluon.walk import anew, keys_of_entry, rows_of_entry, schedule_of

STATISTICS = gl.constexpr(3)
"""Of each row: the factor of what was summed before a tile, and with an item's last tile the item's maximum and sum."""
KEPT = gl.constexpr(0)
ROW_MAX = gl.constexpr(1)
ROW_SUM = gl.constexpr(2)


@gluon.jit
def scores_of_latents(q_tiles, query_stage, k_tiles, rotary_tiles, full, filled, S: gl.constexpr):
    """Scores, [64, keys] and unscaled, of the tile that ``filled`` counts; each piece of it as it comes.

    It is called when the weights of the tile before are handed over. Beside their softmax would be too early: they
    would have to wait for pieces of this tile (276 us with none ahead, 284, 298 and 319 with one, two and three).
    """
    KEYS: gl.constexpr = S.block_n
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    PIECES: gl.constexpr = S.pieces
    BOXES: gl.constexpr = S.piece_boxes
    stage = filled % S.stages
    phase = (filled // S.stages) & 1
    # Worked out anew in each tile: the addresses of nine tiles of queries would take 36 registers.
    q_first = anew(query_stage) * S.columns
    scores = gl.zeros([64, KEYS], gl.float32, SCORES)
    for i in gl.static_range(PIECES):
        mbarrier.wait(full.index(stage * PIECES + i), phase)
        for j in gl.static_range(i * BOXES, (i + 1) * BOXES):
            k_tile = k_tiles.index(stage * (PIECES * BOXES) + j).permute((1, 0))
            scores = warpgroup_mma(q_tiles.index(q_first + j), k_tile, scores, use_acc=j > 0, is_async=True)
    # It came with the last piece.
    k_tile = rotary_tiles.index(stage).permute((1, 0))
    scores = warpgroup_mma(q_tiles.index(q_first + S.columns - 1), k_tile, scores, is_async=True)
    return warpgroup_mma_wait(0, [scores])


@gluon.jit
def hand_over_weights(
    scores, row_max, sums, key, end, keys, visible, scale, tanh_scale, rotary_tiles, statistics,
    kept_full, weights_full, filled, IS_LAST: gl.constexpr, S: gl.constexpr, VISIBLE: gl.constexpr,
):  # fmt: skip
    """Online softmax, into shared memory, of the tile that ``filled`` counts: ``row_max, sums``."""
    stage = filled % S.stages
    scores = seen_scores(scores, key, end, keys, visible, tanh_scale, S, VISIBLE)
    highest = gl.maximum(row_max, gl.max(scores, 1) * scale)
    kept = gl.exp2(row_max - highest)
    # Ahead of the weights: accumulators multiply their sums with it meanwhile.
    statistics.index(stage * STATISTICS + KEPT).store(kept)
    mbarrier.arrive(kept_full.index(stage), count=1)
    p = gl.exp2(scores * scale - highest[:, None])
    sums = sums * gl.convert_layout(kept, gl.SliceLayout(1, sums.type.layout))[:, None] + thread_sums(p, S)
    rotary_tiles.index(stage).store(p.to(rotary_tiles.dtype))
    if IS_LAST:
        statistics.index(stage * STATISTICS + ROW_MAX).store(highest)
        row_sum = gl.convert_layout(gl.sum(sums, 1), highest.type.layout)
        statistics.index(stage * STATISTICS + ROW_SUM).store(row_sum)
    # wgmma reads shared memory by another path than the stores took.
    fence_async_shared()
    mbarrier.arrive(weights_full.index(stage), count=1)
    return highest, sums


@gluon.jit
def score(
    query_stage, keys, visible, first, last, filled, scale, tanh_scale, tiles, barriers, q_free,
    S: gl.constexpr, VISIBLE: gl.constexpr,
):  # fmt: skip
    """Tiles ``first`` to ``last``: ``filled`` after them."""
    KEYS: gl.constexpr = S.block_n
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    q_tiles, k_tiles, rotary_tiles, statistics = tiles
    full, kept_full, weights_full = barriers
    row_max = gl.full([64], NO_SCORE, gl.float32, gl.SliceLayout(1, SCORES))
    sums = thread_sums(gl.zeros([64, KEYS], gl.float32, SCORES), S)
    key, end = keys.tile(first, S)
    scores = scores_of_latents(q_tiles, query_stage, k_tiles, rotary_tiles, full, filled, S)
    for tile in range(first + 1, last):
        row_max, sums = hand_over_weights(
            scores, row_max, sums, key, end, keys, visible, scale, tanh_scale, rotary_tiles, statistics,
            kept_full, weights_full, filled, False, S, VISIBLE,
        )  # fmt: skip
        filled += 1
        key, end = keys.after(key, end, tile, S)
        scores = scores_of_latents(q_tiles, query_stage, k_tiles, rotary_tiles, full, filled, S)
    mbarrier.arrive(q_free, count=1)
    row_max, sums = hand_over_weights(
        scores, row_max, sums, key, end, keys, visible, scale, tanh_scale, rotary_tiles, statistics,
        kept_full, weights_full, filled, True, S, VISIBLE,
    )  # fmt: skip
    return filled + 1


@gluon.jit
def scorer(schedule_at, scales, tiles, barriers, S: gl.constexpr, RANGE: gl.constexpr, VISIBLE: gl.constexpr):
    """Walks the same items as the producer."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, S.block_n, 16])
    scale, tanh_scale = scales
    q_full, q_empty, full, kept_full, weights_full = barriers
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    schedule = schedule_of(schedule_at, S)
    x, end, entry, step = schedule.start(S)
    filled = x * 0
    queries = x * 0
    while x < end:
        if S.reload:
            schedule = schedule_of(schedule_at, S)
        entry, _head, first, last, _whole = schedule.item(x, end, entry, step, S)
        keys = keys_of_entry(schedule, entry, S, RANGE)
        if keys.tiles > 0:
            visible = visible_to(keys, rows_of_entry(schedule, entry, S), row, 0, S, RANGE)
            stage = queries % S.query_stages
            mbarrier.wait(q_full.index(stage), (queries // S.query_stages) & 1)
            filled = score(
                stage, keys, visible, first, last, filled, scale, tanh_scale, tiles,
                (full, kept_full, weights_full), q_empty.index(stage), S, VISIBLE,
            )  # fmt: skip
            queries += 1
        if S.reload:
            schedule = schedule_of(schedule_at, S)
        x, entry, step = schedule.after(x, end, entry, step, S)


@gluon.jit
def accumulate(
    keys, rows, first, last, filled, tiles, barriers, CONSUMER: gl.constexpr, S: gl.constexpr, VISIBLE: gl.constexpr
):
    """Tiles ``first`` to ``last`` of this consumer's two pieces: ``(acc_0, acc_1, row_max, row_sum, filled)``."""
    COLUMNS: gl.constexpr = S.piece_columns
    OUTPUTS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    BY_ROW: gl.constexpr = gl.SliceLayout(1, OUTPUTS)
    weights, values, value_chunks, statistics = tiles
    full, empty, kept_full, weights_full = barriers
    acc_0 = gl.zeros([64, COLUMNS], gl.float32, OUTPUTS)
    acc_1 = gl.zeros([64, COLUMNS], gl.float32, OUTPUTS)
    key, end = keys.tile(first, S)
    for tile in range(first, last):
        stage = filled % S.stages
        phase = (filled // S.stages) & 1
        piece_0 = stage * S.pieces + CONSUMER
        piece_1 = piece_0 + S.consumers
        mbarrier.wait(full.index(piece_0), phase)
        mbarrier.wait(full.index(piece_1), phase)
        # The scorer may read a row meanwhile: no row of queries sees it, and its scores are replaced.
        clear_unseen_values(value_chunks, piece_0, key, end, keys, rows, S, VISIBLE)
        mbarrier.wait(kept_full.index(stage), phase)
        kept = statistics.index(stage * STATISTICS + KEPT).load(BY_ROW)[:, None]
        acc_0 = acc_0 * kept
        acc_1 = acc_1 * kept
        mbarrier.wait(weights_full.index(stage), phase)
        p = weights.index(stage)
        if S.weights_in_registers:
            p = p.load(gl.DotOperandLayout(0, OUTPUTS, 2))
        acc_0 = warpgroup_mma(p, values.index(piece_0), acc_0, is_async=True)
        acc_1 = warpgroup_mma(p, values.index(piece_1), acc_1, is_async=True)
        acc_0 = warpgroup_mma_wait(1, [acc_0])
        mbarrier.arrive(empty.index(piece_0), count=1)
        acc_1 = warpgroup_mma_wait(0, [acc_1])
        # The last tile stays until its statistics are read.
        mbarrier.arrive(empty.index(piece_1), count=1, pred=tile < last - 1)
        filled += 1
        key, end = keys.after(key, end, tile + 1, S)
    stage = (filled - 1) % S.stages
    row_max = statistics.index(stage * STATISTICS + ROW_MAX).load(BY_ROW)
    row_sum = statistics.index(stage * STATISTICS + ROW_SUM).load(BY_ROW)
    mbarrier.arrive(empty.index(stage * S.pieces + S.consumers + CONSUMER), count=1)
    return acc_0, acc_1, row_max, row_sum, filled


@gluon.jit
def accumulator(
    schedule_at, outputs, tiles, barriers,
    S: gl.constexpr, RANGE: gl.constexpr, VISIBLE: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """Walks the same items as the producer, for two pieces of the columns of each row tile's outputs."""
    COLUMNS: gl.constexpr = S.piece_columns
    OUTPUTS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, OUTPUTS))
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, OUTPUTS))
    schedule = schedule_of(schedule_at, S)
    results = Results(outputs[0], outputs[1], outputs[2], outputs[3])
    x, end, entry, step = schedule.start(S)
    filled = x * 0
    while x < end:
        if S.reload:
            schedule = schedule_of(schedule_at, S)
        entry, _head, first, last, _whole = schedule.item(x, end, entry, step, S)
        keys = keys_of_entry(schedule, entry, S, RANGE)
        acc_0 = gl.zeros([64, COLUMNS], gl.float32, OUTPUTS)
        acc_1 = gl.zeros([64, COLUMNS], gl.float32, OUTPUTS)
        row_max = gl.full([64], NO_SCORE, gl.float32, gl.SliceLayout(1, OUTPUTS))
        row_sum = gl.zeros([64], gl.float32, gl.SliceLayout(1, OUTPUTS))
        if keys.tiles > 0:
            rows = rows_of_entry(schedule, entry, S)
            acc_0, acc_1, row_max, row_sum, filled = accumulate(
                keys, rows, first, last, filled, tiles, barriers, CONSUMER, S, VISIBLE
            )
        if S.reload:
            schedule = schedule_of(schedule_at, S)
        _entry, head, first, _last, whole = schedule.item(x, end, entry, step, S)
        rows = rows_of_entry(schedule, entry, S)
        if whole:
            factor = results.finish(row_max, row_sum, rows, row, head, CONSUMER == 0, S)[:, None]
            results.write(acc_0 * factor, rows, row, out_column(column, CONSUMER, S), head, S)
            results.write(acc_1 * factor, rows, row, out_column(COLUMNS + column, CONSUMER, S), head, S)
        else:
            leave_sums(results, acc_0, column, rows, first, CONSUMER, S)
            leave_sums(results, acc_1, COLUMNS + column, rows, first, CONSUMER, S)
            leave_statistics(results, row_max, row_sum, rows, first, CONSUMER, S)
            meet(results, schedule, rows, head, first, CONSUMER, S)
        x, entry, step = schedule.after(x, end, entry, step, S)
