"""A consumer warpgroup: 64 rows of an item against its key tiles, by wgmma and online softmax in base 2."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.core import _aggregate as aggregate

from custom_ops.kernels.gluon import shape
from custom_ops.kernels.gluon.compat import warpgroup_barrier
from custom_ops.kernels.gluon.results import NO_SCORE, Results, share
from custom_ops.kernels.gluon.walk import keys_of_entry, rows_of_entry, schedule_of

CLEARED_ROWS = gl.constexpr(shape.CLEARED_ROWS)
RISE = gl.constexpr(8.0)
"""What a row's maximum, a base-2 logarithm, may be short of. Weights of 256 are far from what fp16 holds, and have the
same relative error as those of 1."""


@aggregate
class Visible:
    """What the rows of a consumer see of an item's keys."""

    position: gl.tensor
    """[64], of each row's query."""
    lower: gl.tensor
    upper: gl.tensor
    """[64]: a row sees keys from ``lower`` to before ``upper``, of which an inexact mask hides some."""
    lower_all: gl.tensor
    upper_all: gl.tensor
    """Scalars: every row sees the keys from ``lower_all`` to before ``upper_all``."""

    @gluon.constexpr_function
    def __init__(self, position, lower, upper, lower_all, upper_all):
        self.position = position
        self.lower = lower
        self.upper = upper
        self.lower_all = lower_all
        self.upper_all = upper_all


@gluon.jit
def visible_to(keys, rows, row, CONSUMER: gl.constexpr, S: gl.constexpr, RANGE: gl.constexpr):
    """The Visible of this consumer's rows."""
    operands = keys.operands()
    first = keys.context + rows.token + CONSUMER * S.consumer_tokens
    position = first + row // S.padded_group
    lower, upper = RANGE(position, operands)
    # Both ends grow with the position (custom_ops/mask_printing.py makes sure of it).
    lower_all, _unused = RANGE(first + S.consumer_tokens - 1, operands)
    _unused, upper_all = RANGE(first, operands)
    return Visible(position, lower, upper, lower_all, upper_all)


@gluon.jit
def thread_sums(p, S: gl.constexpr):
    """[64, 4]: what each thread of a row adds up by itself; the threads' sums meet once an item, not once a tile."""
    return gl.sum(gl.sum(gl.reshape(p, [64, S.block_n // 8, 4, 2]), 3), 1)


@gluon.jit
def product_with_keys(q, k_tiles, k_full, filled, S: gl.constexpr):
    """Starts the scores of the tile that ``filled`` counts: [64, keys], unscaled."""
    KEYS: gl.constexpr = S.block_n
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    stage = filled % S.stages
    mbarrier.wait(k_full.index(stage), (filled // S.stages) & 1)
    zeros = gl.zeros([64, KEYS], gl.float32, SCORES)
    return warpgroup_mma(q, k_tiles.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def capped(scores, tanh_scale, S: gl.constexpr):
    """Scores as they are, or with a softcap their tanh."""
    if S.softcap:
        # tanh by exponentials: tanh.approx errs by 5e-4, which a cap of 50 makes 0.02.
        scores = 1.0 - 2.0 / (gl.exp2(scores * tanh_scale) + 1.0)
    return scores


@gluon.jit
def raised_maximum(scores, row_max, scale, LAZY: gl.constexpr = False):
    """The rows' greatest scaled scores so far, and the factor of what was summed before.

    LAZY: greatest but for RISE, so that the factor is 1 for nearly every tile after the first; weights may be 2^RISE.
    """
    highest = gl.max(scores, 1) * scale
    if LAZY:
        highest = gl.where(highest > row_max + RISE, highest, row_max)
    else:
        highest = gl.maximum(row_max, highest)
    return highest, gl.exp2(row_max - highest)


@gluon.jit
def weights(scores, row_max, sums, kept, scale, S: gl.constexpr):
    """``p`` of a tile's scores, and the sums with it."""
    p = gl.exp2(scores * scale - row_max[:, None])
    sums = sums * gl.convert_layout(kept, gl.SliceLayout(1, sums.type.layout))[:, None] + thread_sums(p, S)
    return p, sums


@gluon.jit
def seen_scores(scores, key, end, keys, visible, tanh_scale, S: gl.constexpr, VISIBLE: gl.constexpr):
    """Scores, capped, of the tile whose keys begin at ``key``, of a source whose keys stop before ``end``.

    -inf where a row does not see a key.
    """
    scores = capped(scores, tanh_scale, S)
    partial = (key < visible.lower_all) | (key + S.block_n > gl.minimum(visible.upper_all, end))
    if not S.exact:
        partial = partial | True
    if partial:
        at = (key + gl.arange(0, S.block_n, layout=gl.SliceLayout(0, scores.type.layout)))[None, :]
        keep = (at >= visible.lower[:, None]) & (at < gl.minimum(visible.upper, end)[:, None])
        if not S.exact:
            keep = keep & VISIBLE(visible.position[:, None], at, keys.operands())
        scores = gl.where(keep, scores, float("-inf"))
    return scores


@gluon.jit
def softmax_step(
    scores, row_max, sums, key, end, keys, visible, scale, tanh_scale, S: gl.constexpr, VISIBLE: gl.constexpr
):
    """Online softmax of a tile, see ``seen_scores``: ``p, row_max, sums``, the factor of what was summed before."""
    scores = seen_scores(scores, key, end, keys, visible, tanh_scale, S, VISIBLE)
    highest, kept = raised_maximum(scores, row_max, scale)
    p, sums = weights(scores, highest, sums, kept, scale, S)
    return p, highest, sums, kept


@gluon.jit
def seen_by_any(key, keys, rows, S: gl.constexpr, VISIBLE: gl.constexpr):
    """Which keys any real token of the row tile sees: every consumer gets the same answer, as they share V."""
    seen = key < 0
    for token in range(rows.token, gl.minimum(rows.token + S.tile_tokens, rows.real)):
        seen = seen | VISIBLE(keys.context + token, key, keys.operands())
    return seen


@gluon.jit
def clear_unseen_values(v_chunks, piece, key, end, keys, rows, S: gl.constexpr, VISIBLE: gl.constexpr):
    """Zeroes the rows of V that no row of the row tile sees, in the tile whose keys begin at ``key``.

    From ``piece`` of shared memory on, as far as this consumer multiplies with them.

    Such keys may be padded tokens, slots that were never filled, or a neighbour's: their V may be NaN, and 0 * NaN is
    NaN. The mask hides them at both ends of the keys, an inexact one anywhere. Boxes without a key are zeros already:
    what is left lies in the boxes where the keys begin and end.
    """
    if S.exact:
        if key + S.block_n > end:
            ends_at = end - key
            box_end = (ends_at + S.box_keys - 1) // S.box_keys * S.box_keys
            if box_end > ends_at:
                clear_chunks(v_chunks, piece, key, end, keys, rows, ends_at // CLEARED_ROWS, box_end, S, VISIBLE)
        if key < keys.lower:
            begins_at = keys.lower - key
            box = begins_at // S.box_keys * S.box_keys
            if box < begins_at:
                clear_chunks(v_chunks, piece, key, end, keys, rows, box // CLEARED_ROWS, begins_at, S, VISIBLE)
    else:
        clear_chunks(v_chunks, piece, key, end, keys, rows, key * 0, key * 0 + S.block_n, S, VISIBLE)


@gluon.jit
def clear_chunks(v_chunks, piece, key, end, keys, rows, first_chunk, end_row, S: gl.constexpr, VISIBLE: gl.constexpr):
    """Zeroes unseen rows of V from chunk ``first_chunk`` of the tile to its row ``end_row``."""
    CHUNKS: gl.constexpr = S.block_n // CLEARED_ROWS
    COLUMNS: gl.constexpr = S.value_boxes
    PIECE: gl.constexpr = S.piece_boxes
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    for chunk in range(first_chunk, (end_row + CLEARED_ROWS - 1) // CLEARED_ROWS):
        at = key + chunk * CLEARED_ROWS + gl.arange(0, CLEARED_ROWS, layout=gl.SliceLayout(1, LAYOUT))
        seen = (at >= keys.lower) & (at < end)
        if not S.exact:
            seen = seen & seen_by_any(at, keys, rows, S, VISIBLE)
        for j in gl.static_range(COLUMNS):
            box = (piece + j // PIECE * S.consumers) * PIECE + j % PIECE
            values = v_chunks.index(box * CHUNKS + chunk)
            old = values.load(LAYOUT)
            values.store(gl.where(seen[:, None], old, gl.zeros_like(old)))
    # wgmma reads shared memory by another path than the stores took: each thread fences its own, then all meet.
    fence_async_shared()
    warpgroup_barrier()


@gluon.jit
def attend(
    q, keys, rows, visible, first, last, filled, scale, tanh_scale, k_tiles, v_tiles, v_chunks,
    k_full, k_empty, v_full, v_empty, q_free, S: gl.constexpr, VISIBLE: gl.constexpr,
):  # fmt: skip
    """Tiles ``first`` to ``last`` one after the other: ``(acc, row_max, sums, filled)``.

    For decode: it waits for memory, and two programs share an SM, so that one computes while the other waits.
    """
    KEYS: gl.constexpr = S.block_n
    DIM: gl.constexpr = S.head_dim
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OUTPUTS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    acc = gl.zeros([64, DIM], gl.float32, OUTPUTS)
    row_max = gl.full([64], NO_SCORE, gl.float32, gl.SliceLayout(1, SCORES))
    sums = thread_sums(gl.zeros([64, KEYS], gl.float32, SCORES), S)
    key, end = keys.tile(first, S)
    for tile in range(first, last):
        stage = filled % S.stages
        scores = product_with_keys(q, k_tiles, k_full, filled, S)
        scores = warpgroup_mma_wait(0, [scores])
        mbarrier.arrive(k_empty.index(stage), count=1)
        mbarrier.arrive(q_free, count=1, pred=tile == last - 1)
        p, row_max, sums, kept = softmax_step(
            scores, row_max, sums, key, end, keys, visible, scale, tanh_scale, S, VISIBLE
        )
        acc = acc * gl.convert_layout(kept, gl.SliceLayout(1, OUTPUTS))[:, None]
        p = gl.convert_layout(p.to(v_tiles.dtype), gl.DotOperandLayout(0, OUTPUTS, 2))
        mbarrier.wait(v_full.index(stage), (filled // S.stages) & 1)
        clear_unseen_values(v_chunks, stage, key, end, keys, rows, S, VISIBLE)
        acc = warpgroup_mma(p, v_tiles.index(stage), acc, is_async=True)
        acc = warpgroup_mma_wait(0, [acc])
        mbarrier.arrive(v_empty.index(stage), count=1)
        filled += 1
        key, end = keys.after(key, end, tile + 1, S)
    return acc, row_max, sums, filled


@gluon.jit
def attend_overlapped(
    q, keys, rows, visible, first, last, filled, scale, tanh_scale, k_tiles, v_tiles, v_chunks,
    k_full, k_empty, v_full, v_empty, q_free, S: gl.constexpr, VISIBLE: gl.constexpr,
):  # fmt: skip
    """As ``attend``, with the scores of a tile computed while the tile before it is multiplied with V."""
    KEYS: gl.constexpr = S.block_n
    DIM: gl.constexpr = S.head_dim
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OUTPUTS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    P_OPERAND: gl.constexpr = gl.DotOperandLayout(0, OUTPUTS, 2)
    acc = gl.zeros([64, DIM], gl.float32, OUTPUTS)
    row_max = gl.full([64], NO_SCORE, gl.float32, gl.SliceLayout(1, SCORES))
    sums = thread_sums(gl.zeros([64, KEYS], gl.float32, SCORES), S)
    scores = product_with_keys(q, k_tiles, k_full, filled, S)
    scores = warpgroup_mma_wait(0, [scores])
    mbarrier.arrive(k_empty.index(filled % S.stages), count=1)
    key, end = keys.tile(first, S)
    p, row_max, sums, _kept = softmax_step(
        scores, row_max, sums, key, end, keys, visible, scale, tanh_scale, S, VISIBLE
    )
    p_operand = gl.convert_layout(p.to(v_tiles.dtype), P_OPERAND)
    for tile in range(first + 1, last):
        stage = filled % S.stages
        scores = product_with_keys(q, k_tiles, k_full, filled + 1, S)
        mbarrier.wait(v_full.index(stage), (filled // S.stages) & 1)
        clear_unseen_values(v_chunks, stage, key, end, keys, rows, S, VISIBLE)
        acc = warpgroup_mma(p_operand, v_tiles.index(stage), acc, is_async=True)
        scores = warpgroup_mma_wait(1, [scores])
        mbarrier.arrive(k_empty.index((filled + 1) % S.stages), count=1)
        key, end = keys.after(key, end, tile, S)
        p, row_max, sums, kept = softmax_step(
            scores, row_max, sums, key, end, keys, visible, scale, tanh_scale, S, VISIBLE
        )
        acc = warpgroup_mma_wait(0, [acc])
        mbarrier.arrive(v_empty.index(stage), count=1)
        acc = acc * gl.convert_layout(kept, gl.SliceLayout(1, OUTPUTS))[:, None]
        p_operand = gl.convert_layout(p.to(v_tiles.dtype), P_OPERAND)
        filled += 1
    # Before the last product with V: the next item's queries are on their way while this item ends.
    mbarrier.arrive(q_free, count=1)
    stage = filled % S.stages
    mbarrier.wait(v_full.index(stage), (filled // S.stages) & 1)
    clear_unseen_values(v_chunks, stage, key, end, keys, rows, S, VISIBLE)
    acc = warpgroup_mma(p_operand, v_tiles.index(stage), acc, is_async=True)
    acc = warpgroup_mma_wait(0, [acc])
    mbarrier.arrive(v_empty.index(stage), count=1)
    return acc, row_max, sums, filled + 1


@gluon.jit
def pass_over(first, last, filled, k_full, k_empty, v_full, v_empty, q_free, S: gl.constexpr):
    """Tiles ``first`` to ``last`` for a consumer without real rows: it frees them for those that have some."""
    mbarrier.arrive(q_free, count=1)
    for _tile in range(first, last):
        stage = filled % S.stages
        mbarrier.wait(k_full.index(stage), (filled // S.stages) & 1)
        mbarrier.arrive(k_empty.index(stage), count=1)
        mbarrier.wait(v_full.index(stage), (filled // S.stages) & 1)
        mbarrier.arrive(v_empty.index(stage), count=1)
        filled += 1
    return filled


@gluon.jit
def consumer(
    schedule_at, outputs, scales, tiles, barriers,
    S: gl.constexpr, RANGE: gl.constexpr, VISIBLE: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """Walks the same items as the producer, for rows ``64 * CONSUMER`` to 64 further of each row tile."""
    ATTEND: gl.constexpr = attend_overlapped if S.overlap else attend
    DIM: gl.constexpr = S.head_dim
    KEYS: gl.constexpr = S.block_n
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OUTPUTS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    scale, tanh_scale = scales
    q_tiles, k_tiles, v_tiles, v_chunks = tiles
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    output_row = gl.arange(0, 64, layout=gl.SliceLayout(1, OUTPUTS))
    column = gl.arange(0, DIM, layout=gl.SliceLayout(0, OUTPUTS))
    schedule = schedule_of(schedule_at, S)
    results = Results(outputs[0], outputs[1], outputs[2], outputs[3])
    x, end, entry, step = schedule.start(S)
    filled = x * 0
    queries = x * 0
    while x < end:
        if S.reload:
            schedule = schedule_of(schedule_at, S)
        entry, _head, first, last, _whole = schedule.item(x, end, entry, step, S)
        keys = keys_of_entry(schedule, entry, S, RANGE)
        acc = gl.zeros([64, DIM], gl.float32, OUTPUTS)
        row_max = gl.full([64], NO_SCORE, gl.float32, gl.SliceLayout(1, SCORES))
        sums = thread_sums(gl.zeros([64, KEYS], gl.float32, SCORES), S)
        if keys.tiles > 0:
            rows = rows_of_entry(schedule, entry, S)
            visible = visible_to(keys, rows, row, CONSUMER, S, RANGE)
            stage = queries % S.query_stages
            mbarrier.wait(q_full.index(stage), (queries // S.query_stages) & 1)
            if rows.token + CONSUMER * S.consumer_tokens < rows.real:
                acc, row_max, sums, filled = ATTEND(
                    q_tiles.index(stage * S.consumers + CONSUMER), keys, rows, visible, first, last, filled,
                    scale, tanh_scale, k_tiles, v_tiles, v_chunks,
                    k_full, k_empty, v_full, v_empty, q_empty.index(stage), S, VISIBLE,
                )  # fmt: skip
            else:
                filled = pass_over(first, last, filled, k_full, k_empty, v_full, v_empty, q_empty.index(stage), S)
            queries += 1
        row_sum = gl.convert_layout(gl.sum(sums, 1), gl.SliceLayout(1, SCORES))
        if S.reload:
            schedule = schedule_of(schedule_at, S)
        _entry, head, first, _last, whole = schedule.item(x, end, entry, step, S)
        rows = rows_of_entry(schedule, entry, S)
        if whole:
            factor = results.finish(row_max, row_sum, rows, CONSUMER * 64 + row, head, True, S)
            acc = acc * gl.convert_layout(factor, gl.SliceLayout(1, OUTPUTS))[:, None]
            results.write(acc, rows, CONSUMER * 64 + output_row, column, head, S)
        else:
            share(results, schedule, acc, row_max, row_sum, rows, head, first, CONSUMER, S)
        x, entry, step = schedule.after(x, end, entry, step, S)
