"""Outputs of rows: written whole, or as parts in scratch that the last of an item's programs combines."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.core import _aggregate as aggregate

from custom_ops.kernels.gluon import walk
from custom_ops.kernels.gluon.compat import warpgroup_barrier
from custom_ops.kernels.gluon.walk import program_of, programs_of

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

    ``scratch`` fp32: parts ``[2 P, rows of a tile, D]`` not yet divided, then for each of their rows the maximum of its
    scores, in base 2, and the sum of its exponentials.
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
        return self.scratch + 2 * programs_of(S) * (64 * S.consumers * S.head_dim)

    @gluon.jit
    def finish(self, row_max, row_sum, rows, row, head, S: gl.constexpr):
        """Writes lse of these rows of the row tile, and returns the factor that their accumulators are still to get.

        ``head``: the KV head.
        """
        token, group_head, exists, real = place(rows, row, S)
        q_head = head * S.group + group_head
        if S.sinks:
            sink = gl.load(self.sinks + q_head, mask=exists, other=0.0) * (1.0 / LN_2)
            higher = gl.maximum(row_max, sink)
            kept = gl.exp2(row_max - higher)
            # A row that sees nothing stays so: its sink alone is no output.
            row_sum = gl.where(row_sum > 0, row_sum * kept + gl.exp2(sink - higher), 0.0)
            row_max = higher
        sees = real & (row_sum > 0)
        lse = gl.where(sees, (row_max + gl.log2(row_sum)) * LN_2, float("-inf"))
        q_row = (rows.q_start + token).to(gl.int64) * (S.kv_heads * S.group) + q_head
        gl.store(self.lse + q_row, lse, mask=exists)
        factor = 1.0 / row_sum
        if S.sinks:
            factor *= kept
        return gl.where(sees, factor, 0.0)

    @gluon.jit
    def write(self, values, rows, row, column, head, S: gl.constexpr):
        """Writes ``values`` [rows, D] to the outputs of these rows of the row tile."""
        token, group_head, exists, real = place(rows, row, S)
        q_row = (rows.q_start + token).to(gl.int64) * (S.kv_heads * S.group) + head * S.group + group_head
        # Products of 0 with what a row past the valid ones gathered may be NaN.
        values = gl.where(real[:, None], values, 0.0).to(self.out.dtype.element_ty)
        gl.store(self.out + q_row[:, None] * S.head_dim + column[None, :], values, mask=exists[:, None])


@gluon.jit
def place(rows, row, S: gl.constexpr):
    """``(token, head of the group, exists, real)`` of these rows: real ones compute something, the others give 0."""
    token = rows.token + row // S.padded_group
    group_head = row % S.padded_group
    exists = (token < rows.new) & (group_head < S.group)
    return token, group_head, exists, token < rows.real


@gluon.jit
def combine(results, rows, consumer, head, first_program, last_program, S: gl.constexpr):
    """Adds the parts of an item, in the order of their programs so that results repeat bit for bit, and writes them.

    A block of rows at a time, and of parts: decode has one token and many parts, a chunk many rows and two parts.
    """
    ROWS: gl.constexpr = S.combined_rows
    PARTS: gl.constexpr = S.combined_parts
    DIM: gl.constexpr = S.head_dim
    LANES: gl.constexpr = 32 if S.head_dim >= 128 else S.head_dim // 4
    CUBE: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 32 // LANES, LANES], [1, 4, 1], [2, 1, 0])
    BY_PART: gl.constexpr = gl.SliceLayout(2, CUBE)
    BY_ROW: gl.constexpr = gl.SliceLayout(0, CUBE)
    part_row = gl.arange(0, ROWS, layout=gl.SliceLayout(0, BY_PART))
    part = gl.arange(0, PARTS, layout=gl.SliceLayout(1, BY_PART))
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, BY_ROW))
    column = gl.arange(0, S.head_dim, layout=gl.SliceLayout(0, BY_ROW))
    cube_column = gl.arange(0, S.head_dim, layout=gl.SliceLayout(0, gl.SliceLayout(1, CUBE)))[None, None, :]
    first_row = consumer * 64
    tokens = gl.minimum(rows.new - rows.token - consumer * S.consumer_tokens, S.consumer_tokens)
    for block in range(0, tokens * S.padded_group, ROWS):
        row_max = gl.full([ROWS], NO_SCORE, gl.float32, gl.SliceLayout(0, BY_PART))
        row_sum = gl.zeros([ROWS], gl.float32, gl.SliceLayout(0, BY_PART))
        total = gl.zeros([ROWS, DIM], gl.float32, BY_ROW)
        for start in range(first_program, last_program + 1, PARTS):
            program = start + part
            slot = 2 * program + (program == first_program).to(gl.int32)
            at = (slot * (S.consumers * 64) + first_row + block)[:, None] + part_row[None, :]
            there = (program <= last_program)[:, None] & (part_row >= 0)[None, :]
            # From L2: other programs wrote them.
            part_max = gl.load(results.statistics(S) + at * 2, mask=there, other=NO_SCORE, cache_modifier=".cg")
            part_sum = gl.load(results.statistics(S) + at * 2 + 1, mask=there, other=0.0, cache_modifier=".cg")
            cells = gl.expand_dims(at, 2) * S.head_dim + cube_column
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
        factor = results.finish(row_max, row_sum, rows, first_row + block + row, head, S)
        results.write(total * factor[:, None], rows, first_row + block + row, column, head, S)


@gluon.jit
def share(results, schedule, acc, row_max, row_sum, rows, head, first, CONSUMER: gl.constexpr, S: gl.constexpr):
    """Leaves this program's part of an item in scratch; the last program to do so combines the parts.

    The item begins in this program where ``first`` is 0, and then it is its last; else it began before, and then it is
    its first. A part's slot is the program's first, or for an item that begins here its second.
    """
    program = program_of(S)
    mine = schedule.programs + program * PROGRAM_FIELDS
    slot = 2 * program
    first_program = gl.load(mine + FIRST_PROGRAM)
    last_program = gl.load(mine + LAST_PROGRAM)
    if first == 0:
        slot = 2 * program + 1
        first_program = program
        last_program = gl.load(mine + LAST_PROGRAM_OF_END)
    output_row = gl.arange(0, 64, layout=gl.SliceLayout(1, acc.type.layout))
    row = gl.arange(0, 64, layout=row_max.type.layout)
    column = gl.arange(0, S.head_dim, layout=gl.SliceLayout(0, acc.type.layout))
    count = (rows.real - rows.token - CONSUMER * S.consumer_tokens) * S.padded_group
    at = (slot * S.consumers + CONSUMER) * 64
    cells = (at + output_row)[:, None] * S.head_dim + column[None, :]
    gl.store(results.scratch + cells, acc, mask=(output_row < count)[:, None])
    gl.store(results.statistics(S) + (at + row) * 2, row_max, mask=row < count)
    gl.store(results.statistics(S) + (at + row) * 2 + 1, row_sum, mask=row < count)
    counter = schedule.counters(S) + first_program * S.consumers + CONSUMER
    warpgroup_barrier()
    arrived = gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    if arrived == last_program - first_program:
        gl.store(counter, 0)
        combine(results, rows, CONSUMER, head, first_program, last_program, S)
