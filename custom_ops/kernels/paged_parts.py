"""Parts of a split item: left in scratch memory, combined by the last program to arrive. Legend in paged_tile.py."""

import triton
import triton.language as tl

from custom_ops.paged import schedule_layout

HEADER_SIZE = tl.constexpr(schedule_layout.HEADER_SIZE)
ENTRY_FIELDS = tl.constexpr(schedule_layout.ENTRY_FIELDS)
PROGRAM_FIELDS = tl.constexpr(schedule_layout.PROGRAM_FIELDS)


@triton.jit
def combine_rows(
    PARTS, PART_STATS, first_program, last_program, sees,
    ROWS: tl.constexpr, BLOCK_M: tl.constexpr, DV_PAD: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """The first ROWS rows of an item's parts as one: in program order, TOGETHER parts at a time.

    ``PARTS``, ``PART_STATS``: moved on to the first of these rows. ``sees``: which to read, ``acc`` of others is 0.
    """
    row = tl.arange(0, ROWS)
    column = tl.arange(0, DV_PAD)
    i = tl.arange(0, TOGETHER)
    acc = tl.zeros([ROWS, DV_PAD], tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    for start in range(first_program, last_program + 1, TOGETHER):
        program = start + i
        is_part = program <= last_program
        if ROWS == BLOCK_M:
            slot = 2 * program + tl.where(program == first_program, 1, 0)
            stats = PART_STATS
            parts = PARTS
        else:
            # From the first of these parts on: one address, and constants for the other parts.
            slot = 2 * i + tl.where(i == 0, tl.where(start == first_program, 1, 0), 0)
            first = first_program + (start - first_program)
            stats = PART_STATS + first * (4 * BLOCK_M)
            parts = PARTS + first.to(tl.int64) * (2 * BLOCK_M * DV_PAD)
        # All loads before any use. Past L1, which may hold what another launch had there.
        stats += (slot * 2 * BLOCK_M)[:, None] + row[None, :]
        part_max = tl.load(stats, mask=is_part[:, None], other=float("-inf"), cache_modifier=".cg")
        part_sum = tl.load(stats + BLOCK_M, mask=is_part[:, None], other=0.0, cache_modifier=".cg")
        at = slot.to(tl.int64)[:, None, None] * (BLOCK_M * DV_PAD) + row[None, :, None] * DV_PAD + column[None, None, :]
        part = tl.load(parts + at, mask=is_part[:, None, None] & sees[None, :, None], other=0.0, cache_modifier=".cg")
        new_max = tl.maximum(row_max, tl.max(part_max, 0))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        weight = tl.exp2(part_max - shift[None, :])
        correction = tl.exp2(row_max - shift)
        row_sum = row_sum * correction + tl.sum(part_sum * weight, 0)
        acc = acc * correction[:, None] + tl.sum(part * weight[:, :, None], 0)
        row_max = new_max
    return acc, row_sum, row_max


@triton.jit
def combine_parts(
    PARTS, PART_STATS, first_program, last_program, sees,
    PG: tl.constexpr, BLOCK_M: tl.constexpr, DV_PAD: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """The parts of a split item as one. TOGETHER: how many are combined at a time where all rows are.

    Decode has one token and many parts: the same registers then hold more parts of its rows alone. Of 33 parts of a
    group of 4 heads that is 5 rounds instead of 9, each as long as L2 takes to answer. Twice as many spill.
    """
    TOKENS: tl.constexpr = BLOCK_M // PG
    # One of the two ways a kernel: both together spill, on Triton 3.6.
    if BLOCK_M <= 16 and TOKENS > 1:
        acc = tl.zeros([BLOCK_M, DV_PAD], tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        token = tl.arange(0, BLOCK_M) // PG
        for t in range(tl.max(tl.where(sees, token + 1, 0), 0)):
            values, sums, highest = combine_rows(
                PARTS + t * (PG * DV_PAD), PART_STATS + t * PG, first_program, last_program,
                tl.full([PG], 1, tl.int1), PG, BLOCK_M, DV_PAD, TOGETHER * TOKENS // 2,
            )  # fmt: skip
            is_token = token == t
            values = tl.reshape(tl.broadcast_to(values[None, :, :], [TOKENS, PG, DV_PAD]), [BLOCK_M, DV_PAD])
            sums = tl.reshape(tl.broadcast_to(sums[None, :], [TOKENS, PG]), [BLOCK_M])
            highest = tl.reshape(tl.broadcast_to(highest[None, :], [TOKENS, PG]), [BLOCK_M])
            acc = tl.where(is_token[:, None], values, acc)
            row_sum = tl.where(is_token, sums, row_sum)
            row_max = tl.where(is_token, highest, row_max)
    else:
        acc, row_sum, row_max = combine_rows(
            PARTS, PART_STATS, first_program, last_program, sees, BLOCK_M, BLOCK_M, DV_PAD, TOGETHER
        )
    return acc, row_sum, row_max


@triton.jit
def combine_in_place(
    PARTS, PART_STATS, first_program, last_program, sees,
    BLOCK_M: tl.constexpr, DV_PAD: tl.constexpr,
):  # fmt: skip
    """The parts of a split item as one where all rows of two parts are too many registers.

    ROWS rows at a time, which are stored over those of the first part: in the end that is all of the item.
    """
    # Of a part at a time: fewer rows of more parts are summed across warps, and spill at 32 rows of 512.
    ROWS: tl.constexpr = 16
    row = tl.arange(0, BLOCK_M)
    column = tl.arange(0, DV_PAD)
    some = tl.arange(0, ROWS)
    slot = 2 * first_program + 1
    part = PARTS + slot.to(tl.int64) * (BLOCK_M * DV_PAD)
    stats = PART_STATS + slot * 2 * BLOCK_M
    for i in range(tl.max(tl.where(sees, row // ROWS + 1, 0), 0)):
        start = i * ROWS
        acc, row_sum, row_max = combine_rows(
            PARTS + start * DV_PAD, PART_STATS + start, first_program, last_program, tl.full([ROWS], 1, tl.int1),
            ROWS, BLOCK_M, DV_PAD, 1,
        )  # fmt: skip
        # All threads have read what others write over.
        tl.debug_barrier()
        tl.store(part + start * DV_PAD + some[:, None] * DV_PAD + column[None, :], acc)
        tl.store(stats + start + some, row_max)
        tl.store(stats + start + some + BLOCK_M, row_sum)
    tl.debug_barrier()
    acc = tl.load(part + row[:, None] * DV_PAD + column[None, :], mask=sees[:, None], other=0.0, cache_modifier=".cg")
    row_max = tl.load(stats + row, cache_modifier=".cg")
    return acc, tl.load(stats + row + BLOCK_M, cache_modifier=".cg"), row_max


@triton.jit
def finish_part(
    acc, row_sum, row_max, sees, sink, program, block, first, end, tiles,
    SCHEDULE, capacity, programs, PARTS, PART_STATS,
    HAS_SINKS: tl.constexpr, PG: tl.constexpr, BLOCK_M: tl.constexpr, DV_PAD: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """What there is to store of an item after one of its parts: ``out``, ``lse`` and whether to store them.

    ``first``, ``end``: the part's tiles of the item's ``tiles``. A whole item is stored at once. The parts of a split
    one go to scratch memory, ``PARTS [HEAD_BLOCKS, 2 * programs, BLOCK_M, DV_PAD]`` and ``PART_STATS [HEAD_BLOCKS,
    2 * programs, 2, BLOCK_M]``, and the last to arrive of a block combines and stores its: it has a counter a program.
    ``out`` is ``[BLOCK_M, DV_PAD]``, normalised, and ``lse`` ``[BLOCK_M]`` natural log: 0 and -inf where not ``sees``
    and where a row sees no key.
    """
    is_last = True
    if (first > 0) | (end < tiles):
        records = SCHEDULE + HEADER_SIZE + capacity * ENTRY_FIELDS
        record = records + program * PROGRAM_FIELDS
        counters = records + programs * (PROGRAM_FIELDS + block)
        PARTS += block.to(tl.int64) * (2 * BLOCK_M * DV_PAD) * programs
        PART_STATS += block * (4 * BLOCK_M) * programs
        # The first unit's item is the one that starts before the program, or ends in it, or both.
        is_first_item = first > 0
        first_program = tl.where(is_first_item, tl.load(record + 3), program)
        last_program = tl.where(is_first_item, tl.load(record + 4), tl.load(record + 5))
        slot = 2 * program + tl.where(is_first_item, 0, 1)
        row = tl.arange(0, BLOCK_M)
        at = slot.to(tl.int64) * (BLOCK_M * DV_PAD) + row[:, None] * DV_PAD + tl.arange(0, DV_PAD)[None, :]
        tl.store(PARTS + at, acc, mask=sees[:, None])
        stats = PART_STATS + slot * 2 * BLOCK_M + row
        tl.store(stats, row_max)
        tl.store(stats + BLOCK_M, row_sum)
        # All threads' stores come before the count of this part.
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + first_program, 1, sem="acq_rel", scope="gpu")
        is_last = arrived == last_program - first_program
        if is_last:
            tl.store(counters + first_program, 0)
            if TOGETHER > 0:
                acc, row_sum, row_max = combine_parts(
                    PARTS, PART_STATS, first_program, last_program, sees, PG, BLOCK_M, DV_PAD, TOGETHER
                )
            else:
                acc, row_sum, row_max = combine_in_place(
                    PARTS, PART_STATS, first_program, last_program, sees, BLOCK_M, DV_PAD
                )
    sees_nothing = (row_sum == 0.0) | (sees == 0)
    if HAS_SINKS:
        sink = sink * 1.4426950408889634
        with_sink = tl.maximum(tl.where(sees_nothing, 0.0, row_max), sink)
        correction = tl.exp2(row_max - with_sink)
        row_sum = row_sum * correction + tl.exp2(sink - with_sink)
        acc = acc * correction[:, None]
        row_max = with_sink
    total = tl.where(sees_nothing, 1.0, row_sum)
    out = tl.where(sees_nothing[:, None], 0.0, acc * (1.0 / total)[:, None])
    lse = tl.where(sees_nothing, float("-inf"), (row_max + tl.log2(total)) * 0.6931471805599453)
    return out, lse, is_last
