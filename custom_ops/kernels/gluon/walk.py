"""Which items a program computes and what an item reads: the producer and the consumers walk the schedule alike.

An item is one KV head of a row tile (custom_ops/paged/schedule_layout.py). The schedule hands items out in one of two
ways, decided on the device for each step:

    ranges  program p computes units ``x`` to ``end``; items at both ends may be shared with its neighbours
    dealt   items stay whole; program p takes items p, 2P - 1 - p, 2P + p, ... of entries sorted longest first, so
            that equal loads need no cuts and the row tiles of one request run side by side and share L2

A program of the schedule is as many of the grid as a KV head's query heads have blocks.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.core import _aggregate as aggregate

from custom_ops.kernels.gluon.shape import KernelShape  # noqa: F401  the type of every S below
from custom_ops.paged import schedule_layout as layout

ENTRIES_USED = gl.constexpr(layout.ENTRIES_USED)
MODE = gl.constexpr(layout.MODE)
OF_REQUEST = gl.constexpr(layout.OF_REQUEST)
Q_START = gl.constexpr(layout.Q_START)
NEW = gl.constexpr(layout.NEW)
CONTEXT = gl.constexpr(layout.CONTEXT)
VALID = gl.constexpr(layout.VALID)
EXTRAS = gl.constexpr(layout.EXTRAS)
ENTRY_FIELDS = gl.constexpr(layout.ENTRY_FIELDS)
UNITS_BEFORE = gl.constexpr(layout.UNITS_BEFORE)
KEY_TILES = gl.constexpr(layout.KEY_TILES)
REQUEST = gl.constexpr(layout.REQUEST)
ROW_TILE = gl.constexpr(layout.ROW_TILE)
PROGRAM_FIELDS = gl.constexpr(layout.PROGRAM_FIELDS)
FIRST_UNIT = gl.constexpr(layout.FIRST_UNIT)
END_UNIT = gl.constexpr(layout.END_UNIT)
ENTRY = gl.constexpr(layout.ENTRY)
FIRST_PROGRAM = gl.constexpr(layout.FIRST_PROGRAM)
LAST_PROGRAM = gl.constexpr(layout.LAST_PROGRAM)
LAST_PROGRAM_OF_END = gl.constexpr(layout.LAST_PROGRAM_OF_END)


@gluon.jit
def anew(x):
    """``x``, an int32, from an instruction that stays in the role it is written in (``KernelShape.anew``)."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], gl.int32, is_pure=False, pack=1)


@gluon.jit
def grid_program(S: gl.constexpr):
    """``gl.program_id(0)``"""
    if S.anew:
        return gl.inline_asm_elementwise("mov.u32 $0, %ctaid.x;", "=r", [], gl.int32, is_pure=False, pack=1)
    else:
        return gl.program_id(0)


@gluon.jit
def grid_size(S: gl.constexpr):
    """``gl.num_programs(0)``"""
    if S.anew:
        return gl.inline_asm_elementwise("mov.u32 $0, %nctaid.x;", "=r", [], gl.int32, is_pure=False, pack=1)
    else:
        return gl.num_programs(0)


@gluon.jit
def program_of(S: gl.constexpr):
    """Which of the schedule's programs this is. One stands for a program a block of heads, side by side in the grid."""
    return grid_program(S) // S.head_blocks


@gluon.jit
def programs_of(S: gl.constexpr):
    """How many programs the schedule knows."""
    return grid_size(S) // S.head_blocks


@gluon.jit
def block_of(S: gl.constexpr):
    """This program's block of a KV head's query heads."""
    if S.head_blocks == 1:
        return 0
    else:
        return grid_program(S) % S.head_blocks


@aggregate
class Schedule:
    """Where the sections of the schedule begin. COUNTERS follow PROGRAMS: every pointer kept costs two registers."""

    header: gl.tensor
    entries: gl.tensor
    programs: gl.tensor

    @gluon.constexpr_function
    def __init__(self, header, entries, programs):
        self.header = header
        self.entries = entries
        self.programs = programs

    @gluon.jit
    def counters(self, S: gl.constexpr):
        return self.programs + programs_of(S) * PROGRAM_FIELDS

    @gluon.jit
    def start(self, S: gl.constexpr):
        """``(x, end, entry, step)``: where the program begins and ends.

        x counts items where they are dealt, and ``step`` is how far the next one is; where they are not, x counts
        units and ``step`` is 0.
        """
        program = program_of(S)
        mine = self.programs + program * PROGRAM_FIELDS
        x = gl.load(mine + FIRST_UNIT)
        end = gl.load(mine + END_UNIT)
        entry = gl.load(mine + ENTRY)
        step = x * 0
        if gl.load(self.header + MODE) != 0:
            x = program
            end = gl.load(self.header + ENTRIES_USED) * S.kv_heads
            step = 2 * (programs_of(S) - program) - 1
        return x, end, entry, step

    @gluon.jit
    def item(self, x, end, entry, step, S: gl.constexpr):
        """``(entry, head, first, last, whole)`` of the item at x: this program computes tiles ``first`` to ``last``.

        Cheap to call again: the loads hit L1, and registers are what the loops over keys are short of.
        """
        if step > 0:
            entry = x // S.kv_heads
        at = self.entries + entry * ENTRY_FIELDS
        tiles = gl.load(at + KEY_TILES)
        head = x % S.kv_heads
        first = x * 0
        last = tiles
        if step == 0:
            begin = x - gl.load(at + UNITS_BEFORE)
            head = begin // tiles
            first = begin - head * tiles
            last = gl.minimum(tiles, first + end - x)
        return entry, head, first, last, last - first == tiles

    @gluon.jit
    def after(self, x, end, entry, step, S: gl.constexpr):
        """``(x, entry, step)`` of the item after the one at x."""
        if step > 0:
            x += step
            step = 2 * programs_of(S) - step
        else:
            entry, head, first, last, _whole = self.item(x, end, entry, step, S)
            x += last - first
            entry_ends = (head == S.kv_heads - 1) & (last == gl.load(self.entries + entry * ENTRY_FIELDS + KEY_TILES))
            if entry_ends:
                entry += 1
        return x, entry, step


@gluon.jit
def schedule_of(schedule_at, S: gl.constexpr):
    """The Schedule at ``(pointer, entries_at, programs_at)``."""
    header, entries_at, programs_at = schedule_at
    if S.anew:
        return Schedule(header + anew(entries_at * 0), header + anew(entries_at), header + anew(programs_at))
    else:
        return Schedule(header, header + entries_at, header + programs_at)


@aggregate
class Rows:
    """A row tile's request and tokens, as its outputs need them; scalars."""

    q_start: gl.tensor
    """The request's first row of q."""
    new: gl.tensor
    """Tokens of the request, its padded ones included,"""
    real: gl.tensor
    """and those that compute something: the others write 0 and -inf."""
    token: gl.tensor
    """The tile's first token, counted from the request's first."""

    @gluon.constexpr_function
    def __init__(self, q_start, new, real, token):
        self.q_start = q_start
        self.new = new
        self.real = real
        self.token = token


@aggregate
class Keys:
    """The keys that a row tile reads; scalars, positions counted from the request's start."""

    request: gl.tensor
    context: gl.tensor
    valid: gl.tensor
    extra_0: gl.tensor
    extra_1: gl.tensor
    extra_2: gl.tensor
    extra_3: gl.tensor
    stored: gl.tensor
    """Keys that the page table covers."""
    lower: gl.tensor
    """Rows of the tile see no key before this one,"""
    upper: gl.tensor
    """nor this one or a later one."""
    cached_first: gl.tensor
    """The first tile of cached keys, in tiles,"""
    cached: gl.tensor
    """and how many there are."""
    new_first: gl.tensor
    """The first tile of new keys, in tiles from ``context`` on; they follow the cached ones."""
    tiles: gl.tensor
    """Tiles of both sources: 0 where no row sees anything."""

    @gluon.constexpr_function
    def __init__(self, request, context, valid, extra_0, extra_1, extra_2, extra_3,
                 stored, lower, upper, cached_first, cached, new_first, tiles):  # fmt: skip
        self.request = request
        self.context = context
        self.valid = valid
        self.extra_0 = extra_0
        self.extra_1 = extra_1
        self.extra_2 = extra_2
        self.extra_3 = extra_3
        self.stored = stored
        self.lower = lower
        self.upper = upper
        self.cached_first = cached_first
        self.cached = cached
        self.new_first = new_first
        self.tiles = tiles

    @gluon.jit
    def operands(self):
        """What the mask's functions take beside positions."""
        return self.context, self.valid, self.extra_0, self.extra_1, self.extra_2, self.extra_3

    @gluon.jit
    def tile(self, number, S: gl.constexpr):
        """The position of the first key of a tile, and where the keys of its source end."""
        key = (self.cached_first + number) * S.block_n
        end = self.upper
        if S.direct:
            end = gl.minimum(end, self.stored)
            if number >= self.cached:
                key = self.context + (self.new_first + number - self.cached) * S.block_n
                end = self.upper
        return key, end

    @gluon.jit
    def after(self, key, end, number, S: gl.constexpr):
        """``tile(number)``, from ``key, end`` of the tile before it."""
        key += S.block_n
        if S.direct:
            if number == self.cached:
                key = self.context + self.new_first * S.block_n
                end = self.upper
        return key, end


@gluon.jit
def rows_of_entry(schedule, entry, S: gl.constexpr):
    """The Rows of ``entry``. Loaded again where needed: registers are what the loops over keys are short of."""
    token = gl.load(schedule.entries + entry * ENTRY_FIELDS + ROW_TILE) * S.tile_tokens
    at = schedule.entries + entry * ENTRY_FIELDS + OF_REQUEST
    new = gl.load(at + NEW)
    return Rows(gl.load(at + Q_START), new, gl.minimum(new, gl.load(at + VALID)), token)


@gluon.jit
def keys_of_entry(schedule, entry, S: gl.constexpr, RANGE: gl.constexpr):
    """The Keys of ``entry``: the tiles that the schedule counted (``request_tiles`` in kernels/paged_tile.py)."""
    rows = rows_of_entry(schedule, entry, S)
    request = gl.load(schedule.entries + entry * ENTRY_FIELDS + REQUEST)
    at = schedule.entries + entry * ENTRY_FIELDS + OF_REQUEST
    context = gl.load(at + CONTEXT)
    valid = gl.load(at + VALID)
    extra_0 = gl.load(at + EXTRAS)
    extra_1 = gl.load(at + EXTRAS + 1)
    extra_2 = gl.load(at + EXTRAS + 2)
    extra_3 = gl.load(at + EXTRAS + 3)
    operands = (context, valid, extra_0, extra_1, extra_2, extra_3)
    stored = context
    if not S.direct:
        stored += rows.new
    last = gl.minimum(rows.token + S.tile_tokens, rows.real) - 1
    lower, _unused = RANGE(context + rows.token, operands)
    _unused, upper = RANGE(context + gl.maximum(last, 0), operands)
    lower = gl.maximum(lower, 0)
    upper = gl.minimum(upper, context + valid)
    cached_first = lower // S.block_n
    cached = gl.maximum(tiles_of(gl.minimum(upper, stored), S) - cached_first, 0)
    new_first = gl.maximum(lower - context, 0) // S.block_n
    tiles = cached
    if S.direct:
        tiles += gl.maximum(tiles_of(upper - context, S) - new_first, 0)
    tiles = gl.where(last < rows.token, 0, tiles)
    return Keys(
        request, context, valid, extra_0, extra_1, extra_2, extra_3,
        stored, lower, upper, cached_first, cached, new_first, tiles,
    )  # fmt: skip


@gluon.jit
def tiles_of(keys, S: gl.constexpr):
    """How many tiles this many keys take, 0 where it is negative."""
    return (gl.maximum(keys, 0) + S.block_n - 1) // S.block_n
