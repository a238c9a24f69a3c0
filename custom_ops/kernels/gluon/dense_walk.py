"""Which row tiles a program of the dense kernel computes and which keys they read; all roles walk alike.

An item is a tile of ``block_m`` queries of one head. Tiles are moved up by as many whole consumers as the last one has
too many: those without queries are in the first tile, which under a causal mask has the fewest keys. (Only by whole
ones: to write a box that begins before its tensor is an illegal instruction of the copy engine.)

The grid is persistent, and program p of P takes items p, P + p, 2P + p, ... or with ``snake`` p, 2P - 1 - p, 2P + p,
... Items are ordered by groups of heads whose K and V share L2; in every other group tiles run from the last to the
first, so that neighbouring rounds take about as long: under a causal mask that deals out work to within one or two
percent of what a list schedule does, with no table and no counter.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.core import _aggregate as aggregate

from custom_ops.kernels.gluon.dense_shape import DenseShape  # noqa: F401  the type of every S below
from custom_ops.kernels.gluon.walk import anew


@aggregate
class Walk:
    """Sizes of a call; scalars."""

    items: gl.tensor
    row_tiles: gl.tensor
    groups: gl.tensor
    """Of heads. It follows from the sizes, but every role would divide for it at every item."""
    group_heads: gl.tensor
    """Query heads of a group,"""
    all_heads: gl.tensor
    """those of all requests, and"""
    heads: gl.tensor
    """those of one."""
    query_len: gl.tensor
    key_len: gl.tensor
    snake: gl.tensor

    @gluon.constexpr_function
    def __init__(self, items, row_tiles, groups, group_heads, all_heads, heads, query_len, key_len, snake):
        self.items = items
        self.row_tiles = row_tiles
        self.groups = groups
        self.group_heads = group_heads
        self.all_heads = all_heads
        self.heads = heads
        self.query_len = query_len
        self.key_len = key_len
        self.snake = snake

    @gluon.jit
    def number(self, turn):
        """The item of this program's turn; ``items`` or more where it has none left."""
        program = anew(gl.program_id(0))
        programs = anew(gl.num_programs(0))
        if (turn & self.snake) != 0:
            program = programs - 1 - program
        return turn * programs + program

    @gluon.jit
    def item(self, number, S: gl.constexpr):
        """``(batch, head, first query)``; of a head's first tile the first query may be -64 or -128."""
        group = number // (self.group_heads * self.row_tiles)
        inside = number - group * (self.group_heads * self.row_tiles)
        first_head = group * self.group_heads
        heads_here = gl.minimum(self.all_heads - first_head, self.group_heads)
        tile = inside // heads_here
        head = first_head + inside - tile * heads_here
        if ((self.groups - group) & 1) != 0:
            tile = self.row_tiles - 1 - tile
        batch = head // self.heads
        unused = (self.row_tiles * S.block_m - self.query_len) // 64 * 64
        return batch, head - batch * self.heads, tile * S.block_m - unused


@gluon.jit
def walk_of(sizes):
    """The Walk of kernel arguments. Made again where needed: registers are what the loops over keys are short of."""
    return Walk(
        anew(sizes[0]), anew(sizes[1]), anew(sizes[2]), anew(sizes[3]), anew(sizes[4]), anew(sizes[5]), anew(sizes[6]),
        anew(sizes[7]), anew(sizes[8]),
    )  # fmt: skip


@aggregate
class Operands:
    """The mask's operands: pointers, and ints as a tuple."""

    q_start: gl.tensor
    query_values: gl.tensor
    request_values: gl.tensor
    key_values: gl.tensor
    key_padding: gl.tensor

    @gluon.constexpr_function
    def __init__(self, q_start, query_values, request_values, key_values, key_padding):
        self.q_start = q_start
        self.query_values = query_values
        self.request_values = request_values
        self.key_values = key_values
        self.key_padding = key_padding

    @gluon.jit
    def of_request(self, batch, S: gl.constexpr):
        """``(position of its first query, its per-request value)``"""
        shift = batch * 0
        value = batch * 0
        if S.q_start:
            shift = gl.load(self.q_start + batch).to(gl.int32)
        if S.request_values:
            value = gl.load(self.request_values + batch).to(gl.int32)
        return shift, value


@gluon.jit
def query_range(operands, batch, first, end, query_len, ROWS: gl.constexpr):
    """Least and greatest per-query operand of queries ``first`` to ``end``, at most ROWS; of no query: of one.

    Every warp reads all of them: no shared memory, no barrier.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([ROWS // 32], [32], [gl.num_warps()], [0])
    # Rows past the end repeat the last one.
    at = gl.minimum(first + gl.arange(0, ROWS, layout=LAYOUT), gl.maximum(end - 1, first))
    values = nearest_int32(gl.load(operands.query_values + batch.to(gl.int64) * query_len + at))
    return gl.min(values, 0), gl.max(values, 0)


@gluon.jit
def nearest_int32(values):
    """64-bit ids past 32 bits see what the nearest 32-bit id sees: positions are 32-bit."""
    return gl.minimum(gl.maximum(values, -2147483648), 2147483647).to(gl.int32)


@gluon.jit
def bounds_of(
    operands, ints, batch, first, query_len, key_len, ROWS: gl.constexpr, S: gl.constexpr, BOUNDS: gl.constexpr
):
    """``lo_any, lo_all, hi_all, hi_any`` of those of the queries from ``first`` to ROWS further that there are."""
    shift, request_value = operands.of_request(batch, S)
    end = gl.minimum(first + ROWS, query_len)
    first = gl.maximum(first, 0)
    low = first
    high = first
    if S.query_values:
        PADDED: gl.constexpr = 256 if ROWS > 128 else ROWS
        low, high = query_range(operands, batch, first, end, query_len, PADDED)
    return BOUNDS(first + shift, gl.maximum(end - 1, 0) + shift, key_len, ints, request_value, low, high)


@gluon.jit
def tiles_of(lo_any, hi_any, S: gl.constexpr):
    """How many key tiles from ``lo_any`` on a row tile reads."""
    return (gl.maximum(hi_any - lo_any, 0) + S.block_n - 1) // S.block_n
