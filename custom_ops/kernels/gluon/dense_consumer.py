"""A consumer warpgroup of the dense kernel: 64 rows of an item against its key tiles, by wgmma and online softmax."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma_wait,
)
from triton.language.core import _aggregate as aggregate

from custom_ops.kernels.gluon.assembly import computed, uniform
from custom_ops.kernels.gluon.compat import async_store
from custom_ops.kernels.gluon.consumer import capped, raised_maximum, thread_sums, weights
from custom_ops.kernels.gluon.dense_epilogue import store_epilogue, wait_for_extra
from custom_ops.kernels.gluon.dense_products import (
    finish_outputs,
    no_outputs,
    scaled_outputs,
    start_outputs,
    start_scores,
    whole_outputs,
)
from custom_ops.kernels.gluon.dense_walk import Operands, bounds_of, nearest_int32, tiles_of, walk_of
from custom_ops.kernels.gluon.results import LN_2, NO_SCORE
from custom_ops.kernels.gluon.walk import anew

FULL = gl.constexpr(0)
PARTIAL = gl.constexpr(1)
ANY = gl.constexpr(2)
"""Which tiles a loop meets: those that all rows see whole, others, or both."""


@aggregate
class RowView:
    """What the rows of a consumer bring to a mask: [64] or scalars, anything where the mask does not read it."""

    first: gl.tensor
    """The first one's position among the keys."""
    query_value: gl.tensor
    request_value: gl.tensor
    keys_before: gl.tensor
    """Where the request's per-key operands begin."""

    @gluon.constexpr_function
    def __init__(self, first, query_value, request_value, keys_before):
        self.first = first
        self.query_value = query_value
        self.request_value = request_value
        self.keys_before = keys_before


@gluon.jit
def row_view(operands, walk, batch, first, rows, S: gl.constexpr):
    shift, request_value = operands.of_request(batch, S)
    query_value = first
    if S.query_values:
        at = batch.to(gl.int64) * walk.query_len + rows
        query_value = gl.load(operands.query_values + at, mask=rows < walk.query_len, other=0)
        if not S.key_values:
            # Compared with keys' own values all its bits count.
            query_value = nearest_int32(query_value)
    return RowView(first + shift, query_value, request_value, batch.to(gl.int64) * walk.key_len)


@gluon.jit
def keep_scores(
    scores, key, key_len, view, operands, ints,
    S: gl.constexpr, VISIBLE: gl.constexpr, KEY_VISIBLE: gl.constexpr, INTERVAL: gl.constexpr,
):  # fmt: skip
    """``scores`` of the tile whose keys begin at ``key``, -inf where a row does not see a key."""
    keys = key + gl.arange(0, S.block_n, layout=gl.SliceLayout(0, scores.type.layout))
    # Not once for all tiles: registers are what loops are short of.
    position = anew(view.first) + gl.arange(0, 64, layout=gl.SliceLayout(1, scores.type.layout))
    query_value = position
    if S.query_values:
        query_value = view.query_value
    key_value = keys
    padding = keys
    if S.key_values:
        key_value = gl.load(operands.key_values + view.keys_before + keys, mask=keys < key_len, other=0)
    if S.key_padding:
        padding = gl.load(operands.key_padding + view.keys_before + keys, mask=keys < key_len, other=1).to(gl.int32)
    if S.exact:
        lower, upper = INTERVAL(position, key_len, ints, view.request_value, query_value)
        keep = keys[None, :] < upper[:, None]
        if S.masked_first:
            keep = keep & (keys[None, :] >= lower[:, None])
    else:
        keep = (keys < key_len)[None, :] & VISIBLE(
            position[:, None], keys[None, :], ints,
            view.request_value, query_value[:, None], key_value[None, :], padding[None, :],
        )  # fmt: skip
    scores = gl.where(keep, scores, float("-inf"))
    if S.reads_keys:
        keep = KEY_VISIBLE(
            position[:, None], keys[None, :], ints,
            view.request_value, query_value[:, None], key_value[None, :], padding[None, :],
        )  # fmt: skip
        scores = gl.where(keep, scores, float("-inf"))
    return scores


@gluon.jit
def take_turn(filled, barriers):
    """Waits until the consumer before this one has done its part of the tile that ``filled`` counts."""
    mbarrier.wait(barriers[4], (filled & 1) ^ barriers[6])


@gluon.jit
def pass_turn(barriers):
    mbarrier.arrive(barriers[5], count=1)


@gluon.jit
def masked(
    scores, filled, full_begin, full_end, last_key, key_len, view, operands, ints,
    S: gl.constexpr, VISIBLE: gl.constexpr, KEY_VISIBLE: gl.constexpr, INTERVAL: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """``keep_scores`` of the tile that ``filled`` counts, if rows differ there in what they see."""
    if TILES != FULL:
        partial = key_len > 0
        if TILES == ANY and not S.reads_keys:
            partial = (filled < full_begin) | (filled >= full_end)
        # A branch even where it is always taken: without one, comparisons move before the product that they wait for,
        # and 64 answers have to be kept.
        if partial:
            key = last_key - filled * S.block_n
            scores = keep_scores(scores, key, key_len, view, operands, ints, S, VISIBLE, KEY_VISIBLE, INTERVAL)
    return scores


@gluon.jit
def attend_tiles(
    acc, high, row_max, sums, at, filled, until, full_begin, full_end, last_key, key_len, view, operands, ints,
    scale, tanh_scale, tiles, barriers,
    S: gl.constexpr, VISIBLE: gl.constexpr, KEY_VISIBLE: gl.constexpr, INTERVAL: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """Online softmax of the tiles that ``filled`` counts up to ``until``.

    Their keys begin at ``last_key - filled * block_n``.
    """
    OUTPUTS: gl.constexpr = acc.type.layout
    k_full, k_empty, v_full, v_empty, _mine, _following, _ahead = barriers
    while filled < until:
        stage = filled % S.stages
        mbarrier.wait(k_full.index(stage), (filled // S.stages) & 1)
        scores = start_scores(at, stage, tiles, S)
        scores = warpgroup_mma_wait(0, [scores])
        mbarrier.arrive(k_empty.index(stage), count=1)
        scores = capped(scores, tanh_scale, S)
        scores = masked(
            scores, filled, full_begin, full_end, last_key, key_len, view, operands, ints,
            S, VISIBLE, KEY_VISIBLE, INTERVAL, TILES,
        )  # fmt: skip
        row_max, kept = raised_maximum(scores, row_max, scale, S.lazy)
        # Before the weights: from there on the factor needs two more registers. But a branch here would keep the
        # exponentials of a row from running beside the maximum of the next.
        if not S.lazy:
            acc, high = scaled_outputs(acc, high, kept, S)
        p, sums = weights(scores, row_max, sums, kept, scale, S)
        p = gl.convert_layout(p.to(tiles[6].dtype), gl.DotOperandLayout(0, OUTPUTS, 2))
        if S.lazy:
            acc, high = scaled_outputs(acc, high, kept, S)
        stage = filled % S.value_stages
        mbarrier.wait(v_full.index(stage), (filled // S.value_stages) & 1)
        acc, high = start_outputs(p, acc, high, stage, tiles, True, S)
        acc, high = finish_outputs(acc, high, S)
        mbarrier.arrive(v_empty.index(stage), count=1)
        filled += 1
    return acc, high, row_max, sums, filled


@gluon.jit
def attend_first(
    at, filled, full_begin, full_end, last_key, key_len, view, operands, ints, scale, tanh_scale, tiles, barriers,
    S: gl.constexpr, VISIBLE: gl.constexpr, KEY_VISIBLE: gl.constexpr, INTERVAL: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """As ``attend_tiles`` of the first tile alone: no outputs beside its scores, which leaves its mask room."""
    acc, high = no_outputs(S)
    OUTPUTS: gl.constexpr = acc.type.layout
    k_full, k_empty, v_full, v_empty, _mine, _following, _ahead = barriers
    stage = filled % S.stages
    mbarrier.wait(k_full.index(stage), (filled // S.stages) & 1)
    scores = start_scores(at, stage, tiles, S)
    scores = warpgroup_mma_wait(0, [scores])
    mbarrier.arrive(k_empty.index(stage), count=1)
    scores = capped(scores, tanh_scale, S)
    scores = masked(
        scores, filled, full_begin, full_end, last_key, key_len, view, operands, ints,
        S, VISIBLE, KEY_VISIBLE, INTERVAL, TILES
    )
    row_max = gl.maximum(gl.max(scores, 1) * scale, NO_SCORE)
    p = gl.exp2(scores * scale - row_max[:, None])
    sums = thread_sums(p, S)
    p = gl.convert_layout(p.to(tiles[6].dtype), gl.DotOperandLayout(0, OUTPUTS, 2))
    stage = filled % S.value_stages
    mbarrier.wait(v_full.index(stage), (filled // S.value_stages) & 1)
    acc, high = start_outputs(p, acc, high, stage, tiles, False, S)
    acc, high = finish_outputs(acc, high, S)
    mbarrier.arrive(v_empty.index(stage), count=1)
    return acc, high, row_max, sums, filled + 1


@gluon.jit
def overlap_tiles(
    acc, high, p, row_max, sums, at, filled, until, full_begin, full_end, last_key, key_len, view, operands, ints,
    scale, tanh_scale, tiles, barriers,
    S: gl.constexpr, VISIBLE: gl.constexpr, KEY_VISIBLE: gl.constexpr, INTERVAL: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """The middle of ``attend_overlapped``: in comes ``p`` of the tile before ``filled``, out goes that of the last."""
    k_full, k_empty, v_full, v_empty, _mine, _following, _ahead = barriers
    while filled < until:
        stage = filled % S.stages
        before = (filled - 1) % S.value_stages
        mbarrier.wait(k_full.index(stage), (filled // S.stages) & 1)
        if S.turns:
            take_turn(filled, barriers)
        scores = start_scores(at, stage, tiles, S)
        mbarrier.wait(v_full.index(before), ((filled - 1) // S.value_stages) & 1)
        acc, high = start_outputs(p, acc, high, before, tiles, True, S)
        if S.turns:
            pass_turn(barriers)
        # All but the products with V, one for each part.
        scores = warpgroup_mma_wait(2 if S.value_high_dim > 0 else 1, [scores])
        mbarrier.arrive(k_empty.index(stage), count=1)
        scores = capped(scores, tanh_scale, S)
        scores = masked(
            scores, filled, full_begin, full_end, last_key, key_len, view, operands, ints,
            S, VISIBLE, KEY_VISIBLE, INTERVAL, TILES,
        )  # fmt: skip
        row_max, kept = raised_maximum(scores, row_max, scale, S.lazy)
        weight, sums = weights(scores, row_max, sums, kept, scale, S)
        if S.late_wait:
            sums = computed(sums)
        acc, high = finish_outputs(acc, high, S)
        mbarrier.arrive(v_empty.index(before), count=1)
        acc, high = scaled_outputs(acc, high, kept, S)
        p = gl.convert_layout(weight.to(tiles[6].dtype), p.type.layout)
        filled += 1
    return acc, high, p, row_max, sums, filled


@gluon.jit
def attend_overlapped(
    acc, high, row_max, sums, at, filled, until, full_begin, full_end, last_key, key_len, view, operands, ints,
    scale, tanh_scale, tiles, barriers,
    S: gl.constexpr, VISIBLE: gl.constexpr, KEY_VISIBLE: gl.constexpr, INTERVAL: gl.constexpr,
):  # fmt: skip
    """As ``attend_tiles`` of at least one tile, with the scores of a tile computed beside the product before it."""
    OUTPUTS: gl.constexpr = acc.type.layout
    k_full, k_empty, v_full, v_empty, _mine, _following, _ahead = barriers
    mbarrier.wait(k_full.index(filled % S.stages), (filled // S.stages) & 1)
    if S.turns:
        take_turn(filled, barriers)
    scores = start_scores(at, filled % S.stages, tiles, S)
    if S.turns:
        pass_turn(barriers)
    scores = warpgroup_mma_wait(0, [scores])
    mbarrier.arrive(k_empty.index(filled % S.stages), count=1)
    scores = capped(scores, tanh_scale, S)
    scores = masked(
        scores, filled, full_begin, full_end, last_key, key_len, view, operands, ints,
        S, VISIBLE, KEY_VISIBLE, INTERVAL, PARTIAL,
    )  # fmt: skip
    row_max, kept = raised_maximum(scores, row_max, scale, S.lazy)
    p, sums = weights(scores, row_max, sums, kept, scale, S)
    p = gl.convert_layout(p.to(tiles[6].dtype), gl.DotOperandLayout(0, OUTPUTS, 2))
    filled += 1
    if S.split:
        acc, high, p, row_max, sums, filled = overlap_tiles(
            acc, high, p, row_max, sums, at, filled, full_begin, full_begin, full_end, last_key, key_len, view,
            operands, ints, scale, tanh_scale, tiles, barriers, S, VISIBLE, KEY_VISIBLE, INTERVAL, PARTIAL,
        )  # fmt: skip
        acc, high, p, row_max, sums, filled = overlap_tiles(
            acc, high, p, row_max, sums, at, filled, full_end, full_begin, full_end, last_key, key_len, view,
            operands, ints, scale, tanh_scale, tiles, barriers, S, VISIBLE, KEY_VISIBLE, INTERVAL, FULL,
        )  # fmt: skip
        if S.masked_first:
            acc, high, p, row_max, sums, filled = overlap_tiles(
                acc, high, p, row_max, sums, at, filled, until, full_begin, full_end, last_key, key_len, view,
                operands, ints, scale, tanh_scale, tiles, barriers, S, VISIBLE, KEY_VISIBLE, INTERVAL, PARTIAL,
            )  # fmt: skip
    else:
        acc, high, p, row_max, sums, filled = overlap_tiles(
            acc, high, p, row_max, sums, at, filled, until, full_begin, full_end, last_key, key_len, view,
            operands, ints, scale, tanh_scale, tiles, barriers, S, VISIBLE, KEY_VISIBLE, INTERVAL, ANY,
        )  # fmt: skip
    before = (filled - 1) % S.value_stages
    mbarrier.wait(v_full.index(before), ((filled - 1) // S.value_stages) & 1)
    acc, high = start_outputs(p, acc, high, before, tiles, True, S)
    acc, high = finish_outputs(acc, high, S)
    mbarrier.arrive(v_empty.index(before), count=1)
    return acc, high, row_max, sums, filled


@gluon.jit
def pass_tiles(filled, until, barriers, S: gl.constexpr):
    """Hands back tiles that these rows do not see, once they are filled: a phase of a barrier has one arrival each."""
    k_full, k_empty, v_full, v_empty, _mine, _following, _ahead = barriers
    while filled < until:
        if S.turns:
            take_turn(filled, barriers)
            pass_turn(barriers)
        stage = filled % S.stages
        mbarrier.wait(k_full.index(stage), (filled // S.stages) & 1)
        mbarrier.arrive(k_empty.index(stage), count=1)
        stage = filled % S.value_stages
        mbarrier.wait(v_full.index(stage), (filled // S.value_stages) & 1)
        mbarrier.arrive(v_empty.index(stage), count=1)
        filled += 1
    return filled


@gluon.jit
def dense_consumer(
    out_desc, lse, operands_at, ints, sizes, scales, tiles, barriers,
    S: gl.constexpr, VISIBLE: gl.constexpr, KEY_VISIBLE: gl.constexpr, BOUNDS: gl.constexpr, INTERVAL: gl.constexpr,
    EPILOGUE: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """Walks the same items as the producer, for rows ``64 * CONSUMER`` to 64 further of each row tile."""
    KEYS: gl.constexpr = S.block_n
    VALUES: gl.constexpr = S.value_dim
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OUTPUTS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, VALUES, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    scale, tanh_scale = scales
    out_tiles = tiles[0]
    out_rows = tiles[1]
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turns = barriers
    mine = turns.index(CONSUMER)
    following = turns.index((CONSUMER + 1) % S.consumers)
    # The first one waits for the last one's turn at the tile before.
    ahead = gl.to_tensor(1 if CONSUMER == 0 else 0)
    tile_barriers = (k_full, k_empty, v_full, v_empty, mine, following, ahead)
    operands = Operands(operands_at[0], operands_at[1], operands_at[2], operands_at[3], operands_at[4])
    walk = walk_of(sizes)
    turn = walk.items * 0
    filled = walk.items * 0
    while walk.number(turn) < walk.items:
        batch, head, first = walk.item(walk.number(turn), S)
        key_len = walk.key_len
        anchor, _lo_all, _hi_all, hi_any = bounds_of(
            operands, ints, batch, first, walk.query_len, key_len, S.block_m, S, BOUNDS
        )
        after = filled + tiles_of(anchor, hi_any, S)
        last_key = anchor + (after - 1) * S.block_n
        first += CONSUMER * 64
        lo_any, lo_all, hi_all, hi_any = bounds_of(
            operands, ints, batch, first, walk.query_len, key_len, 64, S, BOUNDS
        )
        # Tiles counted as ``filled`` does, the last keys first: these rows see those from ``begin`` to before ``end``,
        # and all of those from ``full_begin`` to before ``full_end``.
        begin = gl.maximum(after - tiles_of(anchor, hi_any, S), filled)
        begin = gl.where(first >= 0, begin, after)
        end = after
        full_end = after
        if S.masked_first:
            end = gl.maximum(after - gl.maximum(lo_any - anchor, 0) // S.block_n, begin)
            full_end = gl.maximum(gl.minimum(after - tiles_of(anchor, lo_all, S), end), begin)
        full_begin = gl.maximum(gl.minimum(after - gl.maximum(hi_all - anchor, 0) // S.block_n, full_end), begin)
        end = uniform(end)
        full_begin = uniform(full_begin)
        if S.masked_first:
            full_end = uniform(full_end)
        rows = first + gl.arange(0, 64, layout=ROWS)
        view = row_view(operands, walk, batch, first, rows, S)
        at = turn % S.query_stages * S.consumers + CONSUMER
        mbarrier.wait(q_full.index(turn % S.query_stages), (turn // S.query_stages) & 1)
        filled = pass_tiles(filled, begin, tile_barriers, S)
        acc, high = no_outputs(S)
        row_max = gl.full([64], NO_SCORE, gl.float32, ROWS)
        sums = thread_sums(gl.zeros([64, KEYS], gl.float32, SCORES), S)
        if S.overlap:
            if filled < end:
                acc, high, row_max, sums, filled = attend_overlapped(
                    acc, high, row_max, sums, at, filled, end, full_begin, full_end, last_key, key_len, view,
                    operands, ints, scale, tanh_scale, tiles, tile_barriers, S, VISIBLE, KEY_VISIBLE, INTERVAL,
                )  # fmt: skip
        elif S.split:
            if filled < end:
                acc, high, row_max, sums, filled = attend_first(
                    at, filled, full_begin, full_end, last_key, key_len, view, operands, ints,
                    scale, tanh_scale, tiles, tile_barriers,
                    S, VISIBLE, KEY_VISIBLE, INTERVAL, PARTIAL,
                )  # fmt: skip
            acc, high, row_max, sums, filled = attend_tiles(
                acc, high, row_max, sums, at, filled, full_begin, full_begin, full_end, last_key, key_len, view,
                operands, ints, scale, tanh_scale, tiles, tile_barriers, S, VISIBLE, KEY_VISIBLE, INTERVAL, PARTIAL,
            )  # fmt: skip
            acc, high, row_max, sums, filled = attend_tiles(
                acc, high, row_max, sums, at, filled, full_end, full_begin, full_end, last_key, key_len, view,
                operands, ints, scale, tanh_scale, tiles, tile_barriers, S, VISIBLE, KEY_VISIBLE, INTERVAL, FULL,
            )  # fmt: skip
            if S.masked_first:
                acc, high, row_max, sums, filled = attend_tiles(
                    acc, high, row_max, sums, at, filled, end, full_begin, full_end, last_key, key_len, view,
                    operands, ints, scale, tanh_scale, tiles, tile_barriers, S, VISIBLE, KEY_VISIBLE, INTERVAL,
                    PARTIAL,
                )  # fmt: skip
        else:
            acc, high, row_max, sums, filled = attend_tiles(
                acc, high, row_max, sums, at, filled, end, full_begin, full_end, last_key, key_len, view, operands,
                ints, scale, tanh_scale, tiles, tile_barriers, S, VISIBLE, KEY_VISIBLE, INTERVAL, ANY,
            )  # fmt: skip
        if S.masked_first:
            filled = pass_tiles(filled, after, tile_barriers, S)
        acc = whole_outputs(acc, high, S)
        if S.own_outputs:
            mbarrier.arrive(q_empty.index(turn % S.query_stages), count=1)
        if not S.keeps_item:
            turn = anew(turn)
            walk = walk_of(sizes)
            batch, head, first = walk.item(walk.number(turn), S)
            first += CONSUMER * 64
        # Outputs leave through this consumer's own part of the queries, or of shared memory.
        at = (turn % S.query_stages * S.consumers + CONSUMER) * (S.low_columns // S.value_columns)
        if S.own_outputs:
            at = CONSUMER
        if first >= 0:
            rows = first + gl.arange(0, 64, layout=ROWS)
            row_sum = gl.convert_layout(gl.sum(sums, 1), ROWS)
            sees = row_sum > 0
            lse_at = lse + (batch * walk.heads + head).to(gl.int64) * walk.query_len + rows
            row_lse = gl.where(sees, (row_max + gl.log2(row_sum)) * LN_2, float("-inf"))
            gl.store(lse_at, row_lse, mask=rows < walk.query_len)
            factor = gl.where(sees, 1.0 / row_sum, 0.0)
            acc = acc * gl.convert_layout(factor, gl.SliceLayout(1, OUTPUTS))[:, None]
            if EPILOGUE is None:
                out_rows.index(at).store(acc.to(out_desc.dtype))
                fence_async_shared()
            else:
                wait_for_extra(turn, q_full, S, CONSUMER)
                store_epilogue(acc, out_tiles, at * S.value_columns, EPILOGUE, S)
            async_store(out_desc, [batch, head, first, 0], out_tiles.index(at))
            tma.store_wait(0)
        else:
            wait_for_extra(turn, q_full, S, CONSUMER)
        if not S.own_outputs:
            mbarrier.arrive(q_empty.index(turn % S.query_stages), count=1)
        turn += 1
