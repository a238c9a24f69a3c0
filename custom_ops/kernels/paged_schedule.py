"""The schedule kernel of paged attention: how the key tiles of a step are dealt out. Once a step, for all layers.

``custom_ops/paged/schedule_layout.py`` says what it writes and what the words mean. One program does it all in one
launch: a lane has a request, and writes the entries of its row tiles. Nothing on the host depends on lengths.

Where SORT, requests come longest first: dealing needs that. Ranges suffer from it, as the last programs get all the
short items (128 requests of 128 to 8,192 keys: 0.85 of FlashAttention-3's rate, unsorted 0.99). The way is chosen:

    dealt   where DEAL, and equal numbers of whole items in snake order give no program more than TOLERANCE percent
            above an even share: no item is split, and the row tiles of a request, which lie one after the
            other, are computed side by side and share L2 (20% on ragged chunks of an H200)
    whole   the same tolerance, of whole items in contiguous ranges of equal numbers
    ranges  otherwise: even shares, wherever that cuts items
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from custom_ops.kernels.paged_tile import request_tiles
from custom_ops.paged import schedule_layout

HEADER_SIZE = tl.constexpr(schedule_layout.HEADER_SIZE)
ENTRY_FIELDS = tl.constexpr(schedule_layout.ENTRY_FIELDS)
PROGRAM_FIELDS = tl.constexpr(schedule_layout.PROGRAM_FIELDS)
OF_REQUEST = tl.constexpr(schedule_layout.OF_REQUEST)
SAMPLES = tl.constexpr(16)
"""Programs whose share of dealt items is added up, evenly spaced, the first and the last among them."""


@triton.jit
def load_request(
    CU_SEQLENS_Q, CONTEXT_LENS, VALID_LENS, EXTRA_0, EXTRA_1, EXTRA_2, EXTRA_3,
    request, requests, tokens,
    HAS_VALID: tl.constexpr, EXTRAS: tl.constexpr,
):  # fmt: skip
    """``q_start, n`` and the mask's six values of these requests.

    Lengths are held to what the row count allows: wrong ones must not make kernels leave their tensors.
    """
    is_request = request < requests
    q_start = tl.load(CU_SEQLENS_Q + request, mask=is_request, other=0)
    q_start = tl.minimum(tl.maximum(q_start, 0), tokens)
    q_end = tl.minimum(tl.load(CU_SEQLENS_Q + request + 1, mask=is_request, other=0), tokens)
    new = tl.maximum(q_end - q_start, 0)
    context = tl.maximum(tl.load(CONTEXT_LENS + request, mask=is_request, other=0), 0)
    if HAS_VALID:
        real = tl.minimum(tl.maximum(tl.load(VALID_LENS + request, mask=is_request, other=0), 0), new)
    else:
        real = new
    extra_0 = request * 0
    extra_1 = extra_0
    extra_2 = extra_0
    extra_3 = extra_0
    if EXTRAS > 0:
        extra_0 = tl.load(EXTRA_0 + request, mask=is_request, other=0)
    if EXTRAS > 1:
        extra_1 = tl.load(EXTRA_1 + request, mask=is_request, other=0)
    if EXTRAS > 2:
        extra_2 = tl.load(EXTRA_2 + request, mask=is_request, other=0)
    if EXTRAS > 3:
        extra_3 = tl.load(EXTRA_3 + request, mask=is_request, other=0)
    return q_start, new, (context, real, extra_0, extra_1, extra_2, extra_3)


@triton.jit
def entry_of_unit(entries, unit, used):
    """The last entry that does not begin after ``unit``."""
    low = unit * 0
    size = used
    while size > 1:
        half = size // 2
        before = tl.load(entries + (low + half) * ENTRY_FIELDS) <= unit
        low = tl.where(before, low + half, low)
        size -= half
    return low


@triton.jit
def item_of_unit(entries, unit, used, HEADS: tl.constexpr):
    """The entry of ``unit``, and its item's first unit and key tiles."""
    entry = entry_of_unit(entries, unit, used)
    before = tl.load(entries + entry * ENTRY_FIELDS)
    key_tiles = tl.maximum(tl.load(entries + entry * ENTRY_FIELDS + 1), 1)
    head = tl.minimum((unit - before) // key_tiles, HEADS - 1)
    return entry, before + head * key_tiles, key_tiles


@triton.jit
def even_cut(program, units, active):
    """The first unit of these programs where the first ``active`` have even shares: some have one unit more."""
    return tl.minimum(program, active) * (units // active) + tl.minimum(program, units % active)


@triton.jit
def program_of_unit(unit, units, active):
    """The program that computes ``unit``: the last one whose ``even_cut`` is not after it."""
    share = units // active
    larger = units % active
    in_larger = larger * (share + 1)
    return tl.where(unit < in_larger, unit // (share + 1), larger + (unit - in_larger) // tl.maximum(share, 1))


@triton.jit
def first_of_item(entries, item, items, units, HEADS: tl.constexpr):
    """The first unit of these items, ``units`` where there is no such item."""
    at = entries + tl.minimum(item, items - 1) // HEADS * ENTRY_FIELDS
    return tl.where(item < items, tl.load(at) + item % HEADS * tl.load(at + 1), units)


@triton.jit
def dealt_before(item, program, PROGRAMS: tl.constexpr):
    """How many of the items before ``item`` are dealt to ``program``, in snake order."""
    rest = item % (2 * PROGRAMS)
    in_turn = tl.where(rest > program, 1, 0) + tl.where(rest > 2 * PROGRAMS - 1 - program, 1, 0)
    return item // (2 * PROGRAMS) * 2 + in_turn


@triton.jit
def largest_share(first_item, items, item_units, PROGRAMS: tl.constexpr):
    """The most units that a sampled program is given where items are dealt: ``items`` a request, of equal size."""
    program = tl.arange(0, SAMPLES) * (PROGRAMS - 1) // (SAMPLES - 1)
    after = dealt_before((first_item + items)[None, :], program[:, None], PROGRAMS)
    dealt = after - dealt_before(first_item[None, :], program[:, None], PROGRAMS)
    return tl.max(tl.sum(dealt * item_units[None, :], 1), 0)


@triton.jit
def count_key_tiles(
    row_tile, new, values, RANGE: tl.constexpr, DIRECT: tl.constexpr, TILE_TOKENS: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Key tiles of these row tiles: at least 1, and 0 for a row tile past the request's last."""
    _, cached, _, fresh = request_tiles(row_tile * TILE_TOKENS, new, values, RANGE, DIRECT, TILE_TOKENS, BLOCK_N)
    return tl.where(row_tile * TILE_TOKENS < new, tl.maximum(cached + fresh, 1), 0)


@triton.jit
def store_entries(entries, entry, before, key_tiles, request, row_tile, q_start, new, values, mask):
    """Writes the records of these entries, with what each repeats of its request."""
    at = entries + entry * ENTRY_FIELDS
    tl.store(at, before, mask=mask)
    tl.store(at + 1, key_tiles, mask=mask)
    tl.store(at + 2, request, mask=mask)
    tl.store(at + 3, row_tile, mask=mask)
    tl.store(at + OF_REQUEST, q_start, mask=mask)
    tl.store(at + OF_REQUEST + 1, new, mask=mask)
    for i in tl.static_range(6):
        tl.store(at + OF_REQUEST + 2 + i, values[i], mask=mask)


# Counts change from step to step: a kernel each for 1 and for multiples of 16 would be compiled for nothing.
@triton.jit(do_not_specialize=["requests", "tokens", "capacity"])
def schedule_kernel(
    SCHEDULE, CU_SEQLENS_Q, CONTEXT_LENS, VALID_LENS, EXTRA_0, EXTRA_1, EXTRA_2, EXTRA_3,
    requests, tokens, capacity,
    RANGE: tl.constexpr, DIRECT: tl.constexpr, HAS_VALID: tl.constexpr, EXTRAS: tl.constexpr,
    HEADS: tl.constexpr, TILE_TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, TOLERANCE: tl.constexpr,
    COUNTERS_PER_PROGRAM: tl.constexpr, DEAL: tl.constexpr, SORT: tl.constexpr, OVERLAP: tl.constexpr,
    PROGRAMS: tl.constexpr, REQUESTS_BLOCK: tl.constexpr, TILES_BLOCK: tl.constexpr, PROGRAMS_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program writes the whole schedule.

    ``capacity``: E. HEADS: items an entry has. REQUESTS_BLOCK: at least R. TILES_BLOCK: row tiles of a request that are
    worked on at once. PROGRAMS: P, PROGRAMS_BLOCK: at least P. Small code is fast code here: it runs once, from the
    first to the last instruction, and most of its time goes into fetching them.
    """
    if OVERLAP:
        # Attention, where it comes next, may take its place on the GPU now; it waits for this kernel before it reads.
        gdc_launch_dependents()
    entries = SCHEDULE + HEADER_SIZE
    program_records = entries + capacity * ENTRY_FIELDS
    counters = program_records + PROGRAMS * PROGRAM_FIELDS

    request = tl.arange(0, REQUESTS_BLOCK)
    if SORT:
        _q_start, _new, lengths = load_request(
            CU_SEQLENS_Q, CONTEXT_LENS, VALID_LENS, EXTRA_0, EXTRA_1, EXTRA_2, EXTRA_3,
            request, requests, tokens, HAS_VALID, 0,
        )  # fmt: skip
        # Sorted with their lengths, in units of 16 tokens, in the 21 bits above them; others come last.
        longest: tl.constexpr = 2097151
        shorter = longest - tl.where(request < requests, tl.minimum((lengths[0] + lengths[1]) // 16, longest), 0)
        request = tl.sort(shorter * 1024 + request) % 1024
    q_start, new, values = load_request(
        CU_SEQLENS_Q, CONTEXT_LENS, VALID_LENS, EXTRA_0, EXTRA_1, EXTRA_2, EXTRA_3,
        request, requests, tokens, HAS_VALID, EXTRAS,
    )  # fmt: skip
    # Rows past the last request are the bucket's padding: one more request, of which nothing is real.
    padding_start = tl.minimum(tl.maximum(tl.load(CU_SEQLENS_Q + requests), 0), tokens)
    padding_tiles = tl.cdiv(tokens - padding_start, TILE_TOKENS)

    row_tiles = tl.cdiv(new, TILE_TOKENS)
    most_row_tiles = tl.max(row_tiles, 0)
    wide = (
        values[0][:, None], values[1][:, None], values[2][:, None],
        values[3][:, None], values[4][:, None], values[5][:, None],
    )  # fmt: skip
    # The first row tiles of a request are worked out once, since most requests have no others.
    row_tile = tl.arange(0, TILES_BLOCK)[None, :]
    key_tiles = count_key_tiles(row_tile, new[:, None], wide, RANGE, DIRECT, TILE_TOKENS, BLOCK_N)
    request_units = tl.sum(key_tiles, 1) * HEADS
    most_tiles = tl.max(tl.max(key_tiles, 1), 0)
    for start in range(TILES_BLOCK, most_row_tiles, TILES_BLOCK):
        more = count_key_tiles(start + row_tile, new[:, None], wide, RANGE, DIRECT, TILE_TOKENS, BLOCK_N)
        request_units += tl.sum(more, 1) * HEADS
        most_tiles = tl.maximum(most_tiles, tl.max(tl.max(more, 1), 0))
    most_tiles = tl.maximum(most_tiles, tl.where(padding_tiles > 0, 1, 0))

    first_entry = tl.cumsum(row_tiles, 0) - row_tiles
    first_unit = tl.cumsum(request_units, 0) - request_units
    requests_used = tl.sum(row_tiles, 0)
    requests_units = tl.sum(request_units, 0)
    used = requests_used + padding_tiles
    units = requests_units + padding_tiles * HEADS

    before = first_unit
    start = 0
    while start < most_row_tiles:
        store_entries(
            entries, first_entry[:, None] + start + row_tile,
            before[:, None] + (tl.cumsum(key_tiles, 1) - key_tiles) * HEADS, key_tiles,
            request[:, None], start + row_tile, q_start[:, None], new[:, None], wide, key_tiles > 0,
        )  # fmt: skip
        before += tl.sum(key_tiles, 1) * HEADS
        start += TILES_BLOCK
        if start < most_row_tiles:
            key_tiles = count_key_tiles(start + row_tile, new[:, None], wide, RANGE, DIRECT, TILE_TOKENS, BLOCK_N)
    nothing = tl.zeros([REQUESTS_BLOCK], tl.int32)
    for start in range(0, padding_tiles, REQUESTS_BLOCK):
        padded_tile = start + tl.arange(0, REQUESTS_BLOCK)
        store_entries(
            entries, requests_used + padded_tile, requests_units + padded_tile * HEADS, nothing + 1, nothing + requests,
            padded_tile, nothing + padding_start, nothing + tokens - padding_start,
            (nothing, nothing, nothing, nothing, nothing, nothing), padded_tile < padding_tiles,
        )  # fmt: skip

    items = used * HEADS
    quantum = tl.maximum(tl.cdiv(units, PROGRAMS), 1)
    dealt = used * 0
    if DEAL:
        item_units = request_units.to(tl.float32) / tl.maximum(row_tiles * HEADS, 1)
        share = largest_share(first_entry * HEADS, row_tiles * HEADS, item_units, PROGRAMS)
        # Padding's items, of one unit, come last: to whom does not matter.
        dealt = tl.where(share * 100 <= quantum * (100 + TOLERANCE), 1, 0)
    tl.store(SCHEDULE + 0, units)
    tl.store(SCHEDULE + 1, quantum)
    tl.store(SCHEDULE + 2, dealt)
    tl.store(SCHEDULE + 3, used)

    program = tl.arange(0, PROGRAMS_BLOCK)
    is_program = program < PROGRAMS
    for at in range(0, PROGRAMS * COUNTERS_PER_PROGRAM, PROGRAMS_BLOCK):
        tl.store(counters + at + program, 0, mask=at + program < PROGRAMS * COUNTERS_PER_PROGRAM)
    if dealt == 0:
        program_record = program_records + program * PROGRAM_FIELDS
        items_each = tl.cdiv(items, PROGRAMS)
        # Entries were written by other threads of this program.
        tl.debug_barrier()
        if items_each * most_tiles * 100 <= quantum * (100 + TOLERANCE):
            item = tl.minimum(program * items_each, items)
            tl.store(program_record, first_of_item(entries, item, items, units, HEADS), mask=is_program)
            end_item = tl.minimum(item + items_each, items)
            tl.store(program_record + 1, first_of_item(entries, end_item, items, units, HEADS), mask=is_program)
            tl.store(program_record + 2, tl.minimum(item, items - 1) // HEADS, mask=is_program)
            for i in tl.static_range(3):
                tl.store(program_record + 3 + i, program, mask=is_program)
        else:
            active = tl.maximum(tl.minimum(PROGRAMS, units), 1)
            first = even_cut(program, units, active)
            end = even_cut(program + 1, units, active)
            entry, item, item_tiles = item_of_unit(entries, tl.minimum(first, units - 1), used, HEADS)
            _, end_item, end_tiles = item_of_unit(entries, tl.maximum(end, 1) - 1, used, HEADS)
            tl.store(program_record, first, mask=is_program)
            tl.store(program_record + 1, end, mask=is_program)
            tl.store(program_record + 2, entry, mask=is_program)
            tl.store(program_record + 3, program_of_unit(item, units, active), mask=is_program)
            tl.store(program_record + 4, program_of_unit(item + item_tiles - 1, units, active), mask=is_program)
            tl.store(program_record + 5, program_of_unit(end_item + end_tiles - 1, units, active), mask=is_program)
