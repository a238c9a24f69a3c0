"""What the Gluon paged kernel is compiled for. No triton: launchers and tests read it everywhere."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from custom_ops.kernels.paged_config import PagedConfig
    from custom_ops.paged.call import PagedCall

CONSUMER_ROWS = 64
"""Rows of a consumer warpgroup: the least that wgmma takes. Decode pads to it; where memory binds, that is free."""
BOX_COLUMNS = 64
"""Columns of a bulk copy: 128 bytes of a 16-bit dtype, the widest swizzle."""
CLEARED_ROWS = 16
"""Rows of V that are read, cleared and written back together."""


@dataclasses.dataclass(frozen=True)
class KernelShape:
    """Compile-time numbers of one kernel; it travels as a constexpr, and device code reads its fields."""

    head_dim: int
    group: int
    """Query heads of one KV head."""
    kv_heads: int
    page_size: int
    block_n: int
    """Keys a tile."""
    consumers: int
    """Consumer warpgroups, of 64 rows each."""
    stages: int
    """Tiles of K, and of V, in shared memory."""
    query_stages: int
    direct: bool
    """New keys are read from k and v, not through the page table."""
    exact: bool
    """The mask is ``lower <= key < upper`` in every row; otherwise its predicate is applied in every tile."""
    softcap: bool
    sinks: bool
    overlap: bool
    """Softmax of a tile runs beside the product of the tile before it with V."""

    @property
    def padded_group(self) -> int:
        """Row ``r`` of a tile is head ``r % padded_group`` of token ``r // padded_group``."""
        return 1 << (self.group - 1).bit_length()

    @property
    def consumer_tokens(self) -> int:
        return CONSUMER_ROWS // self.padded_group

    @property
    def tile_tokens(self) -> int:
        return self.consumers * self.consumer_tokens

    @property
    def columns(self) -> int:
        """Bulk copies beside one another across the head dim."""
        return self.head_dim // BOX_COLUMNS

    @property
    def box_keys(self) -> int:
        """Keys a bulk copy: a page, or as much of a larger one as a tile takes."""
        return min(self.page_size, self.block_n)

    @property
    def boxes(self) -> int:
        """Bulk copies below one another, a tile."""
        return self.block_n // self.box_keys

    @property
    def anew(self) -> bool:
        """Each role makes for itself what all roles need.

        LLVM makes equal sums once, before the roles part, and every role keeps them: they are spilled where registers
        are short. Elsewhere that costs some instructions an item, or a tile.
        """
        special = self.direct or self.softcap or self.sinks or self.head_dim == 256 or self.reload
        return self.consumers > 1 and special

    @property
    def reload(self) -> bool:
        """Roles read an item's fields again after each loop over its tiles, as their loops leave them no registers."""
        return self.consumers > 1 and (self.boxes > 8 or not self.exact)

    @property
    def tile_bytes(self) -> int:
        return self.block_n * self.head_dim * 2

    @property
    def query_bytes(self) -> int:
        return self.consumers * CONSUMER_ROWS * self.head_dim * 2

    @property
    def shared_bytes(self) -> int:
        """Shared memory of tiles and queries, barriers left out."""
        return 2 * self.stages * self.tile_bytes + self.query_stages * self.query_bytes

    @property
    def combined_rows(self) -> int:
        """Rows that `combine` adds together: a token's, or more where a row tile holds several tokens as a rule."""
        return max(self.padded_group, 4) if self.consumers == 1 else max(self.padded_group, 32)

    @property
    def combined_parts(self) -> int:
        """Parts at a time: so many that a thread holds 64 of their values."""
        return max(1, min(16, 64 * 128 // (self.combined_rows * self.head_dim)))


@dataclasses.dataclass(frozen=True)
class Registers:
    """How the roles of a program share its registers; each a multiple of 8, as the instruction asks."""

    producer: int
    consumer: int = 0
    """Of the second consumer; the first gets what is left."""
    limit: int = 0
    """Registers a thread at launch, 0 for as many as one program an SM may have: 128 lets two share it."""


def shape_of(call: PagedCall, config: PagedConfig) -> KernelShape:
    """The kernel of a call under a tiling of ``custom_ops/kernels/paged_config.py``."""
    sizes = call.cache_sizes
    consumers = config.block_m // CONSUMER_ROWS
    chunk = consumers > 1
    return KernelShape(
        head_dim=sizes.head_dim,
        group=call.q.shape[1] // sizes.kv_heads,
        kv_heads=sizes.kv_heads,
        page_size=sizes.page_size,
        block_n=config.block_n,
        consumers=consumers,
        stages=config.num_stages,
        # Two row tiles of queries, 128 x 256 each, would leave no room for a second stage.
        query_stages=1 if chunk and sizes.head_dim == 256 else 2,
        direct=call.direct,
        exact=call.mask.interval() is not None,
        softcap=call.softcap != 0.0,
        sinks=call.sinks is not None,
        # At 256 the accumulator alone takes 128 registers a thread.
        overlap=chunk and sizes.head_dim <= 128,
    )


def registers_of(shape: KernelShape) -> Registers:
    """By the ahead-of-time compile: the least of the producer's with which its loops do not spill."""
    if shape.consumers > 1:
        # 8 fewer for the producer are 8 more for the first consumer. Tiles of 8 boxes down or 4 across need them.
        few = shape.anew and shape.boxes <= 4 and shape.columns <= 2
        return Registers(producer=40 if few else 48, consumer=232)
    return Registers(producer=56, limit=128 if shape.head_dim <= 128 else 0)
