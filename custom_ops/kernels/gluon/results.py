"""Outputs of rows: written whole, or as parts in scratch that the last of an item's programs combines."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.core import _aggregate as aggregate

from custom_ops.kernels.gluon import walk
from custom_ops.kernels.gluon.compat import warpgroup_barrier
from custom_ops.kernels.gluon.walk import block_of, program_of, programs_of

PROGRAM_FIELDS = walk.PROGRAM_FIELDS
FIRST_PROGRAM = walk.FIRST_PROGRAM
LAST_PROGRAM = walk.LAST_PROGRAM
LAST_PROGRAM_OF_END = walk.LAST_PROGRAM_OF_END
LN_2 = gl.constexpr(0.6931471805599453)
NO_SCORE = gl.constexpr(-1e30)
"""The maximum of no scores: finite, so that differences of maxima are never NaN."""


@aggregate
class Results:
    """Where results go.

    ``scratch`` fp32: parts ``[2 P, head blocks, consumers, 64, a consumer's columns]`` not yet divided, then for each
    of their rows the maximum of its scores, in base 2, and the sum of its exponentials.
    """

    out: gl.tensor
    lse: gl.tensor
    sinks: gl.tensor
    scratch: gl.tensor

    @gluon.constexpr_function
    def __init__(self, out, lse, sinks, scratch):
        self.out = out
        self.lse = lse
        self.sinks = sinks
        self.scratch = scratch

    @gluon.jit
    def statistics(self, S: gl.constexpr):
        return self.scratch + 2 * programs_of(S) * (S.head_blocks * S.consumers * 64 * S.value_columns)

    @gluon.jit
    def finish(self, row_max, row_sum, rows, row, head, WRITES: gl.constexpr, S: gl.constexpr):
        """Where WRITES, lse of these rows of the row tile. Returns the factor that their accumulators are still to get.

        ``head``: the KV head.
        """
        token, q_head, exists, real = place(rows, row, head, S)
        if S.sinks:
            sink = gl.load(self.sinks + q_head, mask=exists, other=0.0) * (1.0 / LN_2)
            higher = gl.maximum(row_max, sink)
            kept = gl.exp2(row_max - higher)
            # A row that sees nothing stays so: its sink alone is no output.
            row_sum = gl.where(row_sum > 0, row_sum * kept + gl.exp2(sink - higher), 0.0)
            row_max = higher
        sees = real & (row_sum > 0)
        lse = gl.where(sees, (row_max + gl.log2(row_sum)) * LN_2, float("-inf"))
        if WRITES:
            q_row = (rows.q_start + token).to(gl.int64) * (S.kv_heads * S.group) + q_head
            gl.store(self.lse + q_row, lse, mask=exists)
        factor = 1.0 / row_sum
        if S.sinks:
            factor *= kept
        return gl.where(sees, factor, 0.0)

    @gluon.jit
    def write(self, values, rows, row, column, head, S: gl.constexpr):
        """Writes ``values`` [rows, columns] to these columns of the outputs of these rows of the row tile."""
        token, q_head, exists, real = place(rows, row, head, S)
        q_row = (rows.q_start + token).to(gl.int64) * (S.kv_heads * S.group) + q_head
        # Products of 0 with what a row past the valid ones gathered may be NaN.
        values = gl.where(real[:, None], values, 0.0).to(self.out.dtype.element_ty)
        gl.store(self.out + q_row[:, None] * S.out_dim + column[None, :], values, mask=exists[:, None])


@gluon.jit
def place(rows, row, head, S: gl.constexpr):
    """``(token, query head, exists, real)`` of these rows: real ones compute something, the others give 0.

    ``head``: the KV head.
    """
    token = rows.token + row // S.padded_group
    block_head = row % S.padded_group
    group_head = block_of(S) * S.block_heads + block_head
    exists = (token < rows.new) & (block_head < S.block_heads)
    if S.group % S.head_blocks != 0:
        exists = exists & (group_head < S.group)
    return token, head * S.group + group_head, exists, token < rows.real


@gluon.jit
def part_row(slot, consumer, S: gl.constexpr):
    """The row of scratch, of a consumer's columns each, where this consumer's part in ``slot`` begins."""
    if S.head_blocks > 1:
        slot = slot * S.head_blocks + block_of(S)
    return (slot * S.consumers + consumer) * 64


@gluon.jit
def out_column(column, consumer, S: gl.constexpr):
    """The column of an output that is this one of a consumer's: consumers that share columns take pieces in turn."""
    if S.latent:
        return (column // S.piece_columns * S.consumers + consumer) * S.piece_columns + column % S.piece_columns
    else:
        return column


@gluon.jit
def combine(
    results, rows, consumer: gl.constexpr, head, first_program, begin, last_program, step, is_final, S: gl.constexpr
):
    """Adds parts of an item, in the order of their programs so that results repeat bit for bit.

    Those of every ``step``-th program from ``begin`` to ``last_program``; ``first_program`` has the item's first. Where
    ``is_final`` the sum is written as outputs, else as the part of ``begin``. A block of rows at a time, and of parts:
    decode has one token and many parts, a chunk many rows and two parts.
    """
    ROWS: gl.constexpr = S.combined_rows
    PARTS: gl.constexpr = S.combined_parts
    DIM: gl.constexpr = S.value_columns
    LANES: gl.constexpr = 32 if S.value_columns >= 128 else S.value_columns // 4
    CUBE: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 32 // LANES, LANES], [1, 4, 1], [2, 1, 0])
    BY_PART: gl.constexpr = gl.SliceLayout(2, CUBE)
    BY_ROW: gl.constexpr = gl.SliceLayout(0, CUBE)
    row_of_part = gl.arange(0, ROWS, layout=gl.SliceLayout(0, BY_PART))
    part = gl.arange(0, PARTS, layout=gl.SliceLayout(1, BY_PART))
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, BY_ROW))
    column = gl.arange(0, DIM, layout=gl.SliceLayout(0, BY_ROW))
    cube_column = gl.arange(0, DIM, layout=gl.SliceLayout(0, gl.SliceLayout(1, CUBE)))[None, None, :]
    first_row = consumer * S.row_step
    tokens = gl.minimum(rows.new - rows.token - first_row // S.padded_group, S.consumer_tokens)
    for block in range(0, tokens * S.padded_group, ROWS):
        row_max = gl.full([ROWS], NO_SCORE, gl.float32, gl.SliceLayout(0, BY_PART))
        row_sum = gl.zeros([ROWS], gl.float32, gl.SliceLayout(0, BY_PART))
        total = gl.zeros([ROWS, DIM], gl.float32, BY_ROW)
        for start in range(begin, last_program + 1, PARTS * step):
            program = start + part * step
            slot = 2 * program + (program == first_program).to(gl.int32)
            at = (part_row(slot, consumer, S) + block)[:, None] + row_of_part[None, :]
            there = (program <= last_program)[:, None] & (row_of_part >= 0)[None, :]
            # From L2: other programs wrote them.
            part_max = gl.load(results.statistics(S) + at * 2, mask=there, other=NO_SCORE, cache_modifier=".cg")
            part_sum = gl.load(results.statistics(S) + at * 2 + 1, mask=there, other=0.0, cache_modifier=".cg")
            cells = gl.expand_dims(at, 2) * DIM + cube_column
            in_parts = gl.expand_dims(there, 2) & (cube_column >= 0)
            values = gl.load(results.scratch + cells, mask=in_parts, other=0.0, cache_modifier=".cg")
            higher = gl.maximum(row_max, gl.max(part_max, 0))
            kept = gl.exp2(row_max - higher)
            weight = gl.exp2(part_max - higher[None, :])
            row_sum = row_sum * kept + gl.sum(weight * part_sum, 0)
            total = total * gl.convert_layout(kept, gl.SliceLayout(1, BY_ROW))[:, None]
            total += gl.sum(gl.expand_dims(weight, 2) * values, 0)
            row_max = higher
        row_max = gl.convert_layout(row_max, gl.SliceLayout(1, BY_ROW))
        row_sum = gl.convert_layout(row_sum, gl.SliceLayout(1, BY_ROW))
        if is_final:
            in_tile = first_row + block + row
            factor = results.finish(row_max, row_sum, rows, in_tile, head, S.row_step > 0 or consumer == 0, S)
            results.write(total * factor[:, None], rows, in_tile, out_column(column, consumer, S), head, S)
        else:
            slot = 2 * begin + (begin == first_program).to(gl.int32)
            at = part_row(slot, consumer, S) + block + row
            # Other threads may not have read these rows' statistics yet.
            warpgroup_barrier()
            gl.store(results.scratch + at[:, None] * DIM + column[None, :], total)
            gl.store(results.statistics(S) + at * 2, row_max)
            gl.store(results.statistics(S) + at * 2 + 1, row_sum)


@gluon.jit
def share(results, schedule, acc, row_max, row_sum, rows, head, first, CONSUMER: gl.constexpr, S: gl.constexpr):
    """Leaves this program's part of an item in scratch; the last program to do so combines the parts."""
    column = gl.arange(0, S.value_columns, layout=gl.SliceLayout(0, acc.type.layout))
    leave_sums(results, acc, column, rows, first, CONSUMER, S)
    leave_statistics(results, row_max, row_sum, rows, first, CONSUMER, S)
    meet(results, schedule, rows, head, first, CONSUMER, S)


@gluon.jit
def slot_of(first, S: gl.constexpr):
    """The slot of this program's part of an item whose tile ``first`` is its first.

    The item begins in this program where ``first`` is 0, and then it is its last; else it began before, and then it is
    its first. A part's slot is the program's first, or for an item that begins here its second.
    """
    return 2 * program_of(S) + (first == 0).to(gl.int32)


@gluon.jit
def leave_sums(results, acc, column, rows, first, CONSUMER: gl.constexpr, S: gl.constexpr):
    """Leaves these columns of a consumer's part."""
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, acc.type.layout))
    at = part_row(slot_of(first, S), CONSUMER, S)
    cells = (at + row)[:, None] * S.value_columns + column[None, :]
    gl.store(results.scratch + cells, acc, mask=(row < real_rows(rows, CONSUMER, S))[:, None])


@gluon.jit
def leave_statistics(results, row_max, row_sum, rows, first, CONSUMER: gl.constexpr, S: gl.constexpr):
    """Leaves the maxima and sums of a consumer's part."""
    row = gl.arange(0, 64, layout=row_max.type.layout)
    at = results.statistics(S) + (part_row(slot_of(first, S), CONSUMER, S) + row) * 2
    is_real = row < real_rows(rows, CONSUMER, S)
    gl.store(at, row_max, mask=is_real)
    gl.store(at + 1, row_sum, mask=is_real)


@gluon.jit
def real_rows(rows, CONSUMER: gl.constexpr, S: gl.constexpr):
    """How many of a consumer's rows are of real tokens, more than 64 where all are."""
    return (rows.real - rows.token - CONSUMER * S.row_step // S.padded_group) * S.padded_group


@gluon.jit
def meet(results, schedule, rows, head, first, CONSUMER: gl.constexpr, S: gl.constexpr):
    """Counts this part of an item as arrived; the last to arrive combines the parts."""
    program = program_of(S)
    mine = schedule.programs + program * PROGRAM_FIELDS
    first_program = gl.load(mine + FIRST_PROGRAM)
    last_program = gl.load(mine + LAST_PROGRAM)
    if first == 0:
        first_program = program
        last_program = gl.load(mine + LAST_PROGRAM_OF_END)
    if S.grouped:
        meet_in_groups(results, schedule, rows, head, first_program, program, last_program, CONSUMER, S)
    else:
        counter = schedule.counters(S) + counter_of(first_program, CONSUMER, S)
        warpgroup_barrier()
        arrived = gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
        if arrived == last_program - first_program:
            gl.store(counter, 0)
            combine(results, rows, CONSUMER, head, first_program, first_program, last_program, 1, True, S)


@gluon.jit
def counter_of(program, CONSUMER: gl.constexpr, S: gl.constexpr):
    """Where this consumer's counters of a program begin: one for the item that begins in it, another where grouped."""
    return ((program * S.head_blocks + block_of(S)) * S.consumers + CONSUMER) * S.counters


@gluon.jit
def meet_in_groups(
    results, schedule, rows, head, first_program, program, last_program, CONSUMER: gl.constexpr, S: gl.constexpr
):
    """As ``meet``: the last part of a group combines the group's parts, the last group to do so what groups left.

    Parts of latents are large: 66 of 64 rows of 512 values are 9 MB, more than a multiprocessor reads in 100 us.
    """
    counters = schedule.counters(S)
    begin = first_program + (program - first_program) // S.grouped * S.grouped
    last = gl.minimum(begin + S.grouped - 1, last_program)
    groups = (last_program - first_program) // S.grouped + 1
    # A group counts with the second counter of its first program, the first group with that of the item's second
    # program: such programs begin inside of the item, so that no other item counts there. What groups leave is
    # counted where the item begins.
    counter = counters + counter_of(gl.maximum(begin, first_program + 1), CONSUMER, S) + 1
    expected = last - begin + 1
    step = expected * 0 + 1
    is_member = expected > 0
    while is_member:
        warpgroup_barrier()
        arrived = gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
        is_member = arrived == expected - 1
        if is_member:
            gl.store(counter, 0)
            is_final = (step > 1) | (groups == 1)
            combine(results, rows, CONSUMER, head, first_program, begin, last, step, is_final, S)
            counter = counters + counter_of(first_program, CONSUMER, S)
            expected = groups
            begin = first_program
            last = last_program
            step = step * 0 + S.grouped
            is_member = is_final ^ True
