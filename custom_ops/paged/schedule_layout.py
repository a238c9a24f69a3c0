"""How the schedule of a step lies in memory: one int32 tensor that the schedule kernel writes and every layer reads.

    HEADER    [16]         total units, quantum, mode, entries in use
    ENTRIES   [E, 16]      units before, key tiles of one head, request, row tile; of the request: q_start, n, context,
                           valid, four values of the mask. Request R holds a bucket's padding rows
    PROGRAMS  [P, 8]       first unit, end unit, entry of the first unit; whose parts an item is, see below
    COUNTERS  [P * counters_per_program]  0 before and after every launch of attention

A *unit* is one key tile of one head of one row tile. An *entry* is a row tile of a request, all heads. Entries in use
come first, longest request first where they may be dealt, else in the order of requests; the others are not written.
One in use has at least one unit a head: where no row sees anything, that unit computes nothing and writes the outputs
of rows that see nothing. An *item* is one head of an entry. Item ``h`` of an entry has the units ``before + h *
n_tiles`` up to ``n_tiles`` further. Each of the P programs computes the units from its first to its end; those ranges
lie one after the other, and only the last ones may be empty.

An item that several programs share is a *split* item, and each share a *part*. The last part to arrive combines all
parts in program order. Which programs those are is in the record of a program: FIRST_PROGRAM to LAST_PROGRAM for the
item of its first unit, and for the item of its last unit the program itself (unless that is the same item) to
LAST_PROGRAM_OF_END.

No triton: ops size the tensor from here while they are traced.
"""

from __future__ import annotations

import dataclasses

HEADER_SIZE = 16
TOTAL_UNITS = 0
QUANTUM = 1
"""An even share of the units, rounded up."""
MODE = 2
"""0: programs take the ranges of PROGRAMS. 1: items are dealt out whole, and PROGRAMS is not filled: program p takes
items ``p``, ``2P - 1 - p``, ``2P + p``, ...; item i is head ``i % heads`` of entry ``i // heads``."""
ENTRIES_USED = 3

ENTRY_FIELDS = 16
UNITS_BEFORE = 0
KEY_TILES = 1
"""Key tiles of one head."""
REQUEST = 2
ROW_TILE = 3
OF_REQUEST = 4
"""Where the request's own fields begin, in each of its entries: one record to load instead of one after the other."""

Q_START = 0
NEW = 1
CONTEXT = 2
VALID = 3
EXTRAS = 4
"""The first of the mask's own values; 0 where the mask has fewer."""

PROGRAM_FIELDS = 8
FIRST_UNIT = 0
END_UNIT = 1
ENTRY = 2
FIRST_PROGRAM = 3
LAST_PROGRAM = 4
LAST_PROGRAM_OF_END = 5


@dataclasses.dataclass(frozen=True)
class ScheduleLayout:
    """Where the sections begin, in elements. Sizes may be symbolic."""

    requests: int
    """R."""
    tokens: int
    """T, the capacity: a bucket's padding included."""
    tile_tokens: int
    """Tokens a row tile."""
    programs: int
    """P."""
    counters_per_program: int = 1

    @property
    def entries(self) -> int:
        """E: request r has at most ``n // tile_tokens + 1`` row tiles, and there are R + 1 requests."""
        return self.requests + 1 + (self.tokens + self.tile_tokens - 1) // self.tile_tokens

    @property
    def entries_at(self) -> int:
        return HEADER_SIZE

    @property
    def programs_at(self) -> int:
        return self.entries_at + self.entries * ENTRY_FIELDS

    @property
    def counters_at(self) -> int:
        return self.programs_at + self.programs * PROGRAM_FIELDS

    @property
    def size(self) -> int:
        """Elements of the whole tensor."""
        return self.counters_at + self.programs * self.counters_per_program
