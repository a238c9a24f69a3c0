"""What the Gluon paged kernel is compiled for. No triton: launchers and tests read it everywhere."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from custom_ops.kernels.gluon import consumers_of, counters_a_consumer
from custom_ops.kernels.paged_config import resolve_shape_class

if TYPE_CHECKING:
    from custom_ops.kernels.paged_config import PagedConfig
    from custom_ops.paged.call import PagedCall

CONSUMER_ROWS = 64
"""Rows of a consumer warpgroup: the least that wgmma takes. Decode pads to it; where memory binds, that is free."""
BOX_COLUMNS = 64
"""Columns of a bulk copy: 128 bytes of a 16-bit dtype, the widest swizzle."""
PIECE_COLUMNS = 128
"""Columns of a tile of latents that are copied, multiplied and freed together. wgmma takes 256 too, but ptxas (C7602)
not where a program is launched with 128 registers a thread, as four warpgroups are."""
PARTS_GROUPED = 8
"""Parts of latents that are combined together. One request of 65,536 keys is 66 parts of 128 heads: 85 us on an H200,
146 where the last to arrive combines them all."""
CLEARED_ROWS = 16
"""Rows of V that are read, cleared and written back together."""


@dataclasses.dataclass(frozen=True)
class KernelShape:
    """Compile-time numbers of one kernel; it travels as a constexpr, and device code reads its fields."""

    head_dim: int
    """Elements of a key."""
    group: int
    """Query heads of one KV head."""
    kv_heads: int
    page_size: int
    block_n: int
    """Keys a tile."""
    consumers: int
    """Consumer warpgroups: of 64 rows each, or of latents of the same 64 rows and of different columns of values."""
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
    """Softmax of a tile runs beside the product of the tile before it with V: of one warpgroup that does both."""
    value_dim: int | None = None
    """Elements of a value where it is the first ones of its key, a latent; None where values come apart."""
    weights_in_registers: bool = False
    """Accumulators of latents load a tile's weights once, not with each product: shared memory limits all products."""
    head_blocks: int = 1
    """Blocks that a KV head's query heads are cut into, a program each."""

    @property
    def latent(self) -> bool:
        return self.value_dim is not None

    @property
    def block_heads(self) -> int:
        """Query heads of a block; the last block may have fewer."""
        return -(-self.group // self.head_blocks)

    @property
    def padded_group(self) -> int:
        """Row ``r`` of a tile is head ``r % padded_group`` of the block, of token ``r // padded_group``."""
        return 1 << (self.block_heads - 1).bit_length()

    @property
    def consumer_tokens(self) -> int:
        return CONSUMER_ROWS // self.padded_group

    @property
    def tile_rows(self) -> int:
        return CONSUMER_ROWS if self.latent else self.consumers * CONSUMER_ROWS

    @property
    def tile_tokens(self) -> int:
        return self.tile_rows // self.padded_group

    @property
    def row_step(self) -> int:
        """Rows from a consumer's first one to the next consumer's."""
        return 0 if self.latent else CONSUMER_ROWS

    @property
    def out_dim(self) -> int:
        """Elements of an output."""
        return self.head_dim if self.value_dim is None else self.value_dim

    @property
    def value_columns(self) -> int:
        """Columns of an output that a consumer accumulates."""
        return self.out_dim // self.consumers if self.latent else self.out_dim

    @property
    def columns(self) -> int:
        """Bulk copies beside one another across the head dim,"""
        return self.head_dim // BOX_COLUMNS

    @property
    def value_boxes(self) -> int:
        """and across the columns of V that a consumer multiplies with."""
        return self.value_columns // BOX_COLUMNS

    @property
    def piece_columns(self) -> int:
        """Columns of V that lie side by side; consumers that share columns take pieces in turn."""
        return PIECE_COLUMNS if self.latent else self.head_dim

    @property
    def piece_boxes(self) -> int:
        return self.piece_columns // BOX_COLUMNS

    @property
    def pieces(self) -> int:
        """Pieces of a value."""
        return self.out_dim // self.piece_columns

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
        special = self.direct or self.softcap or self.sinks or self.head_dim == 256 or self.reload or self.latent
        return self.consumers > 1 and special

    @property
    def reload(self) -> bool:
        """Roles read an item's fields again after each loop over its tiles, as their loops leave them no registers."""
        return self.consumers > 1 and (self.boxes > 8 or not self.exact)

    @property
    def tile_bytes(self) -> int:
        return self.block_n * self.head_dim * 2

    @property
    def piece_bytes(self) -> int:
        return self.block_n * self.piece_columns * 2

    @property
    def query_bytes(self) -> int:
        return self.tile_rows * self.head_dim * 2

    @property
    def shared_bytes(self) -> int:
        """Shared memory of tiles and queries, barriers left out."""
        return (1 if self.latent else 2) * self.stages * self.tile_bytes + self.query_stages * self.query_bytes

    @property
    def grouped(self) -> int:
        """Parts that are combined at a time before all of an item are; 0: all at once."""
        return PARTS_GROUPED if self.latent else 0

    @property
    def counters(self) -> int:
        """Counters of arrived parts, a consumer."""
        return counters_a_consumer(self.latent)

    @property
    def combined_rows(self) -> int:
        """Rows that `combine` adds together: a token's, or more where a row tile holds several tokens as a rule."""
        if self.latent:
            # More would not leave room for parts to be loaded side by side.
            return min(max(self.padded_group, 4), 16)
        return max(self.padded_group, 4) if self.consumers == 1 else max(self.padded_group, 32)

    @property
    def combined_parts(self) -> int:
        """Parts at a time: so many that a thread holds 64 of their values."""
        return max(1, min(16, 64 * 128 // (self.combined_rows * self.value_columns)))


@dataclasses.dataclass(frozen=True)
class Registers:
    """How the roles of a program share its registers; each a multiple of 8, as the instruction asks."""

    producer: int
    consumer: int = 0
    """Of the second consumer, of latents of both; the first role gets what is left."""
    limit: int = 0
    """Registers a thread at launch, 0 for as many as one program an SM may have: 128 lets two share it."""


def shape_of(call: PagedCall, config: PagedConfig) -> KernelShape:
    """The kernel of a call under a tiling of ``custom_ops/kernels/paged_config.py``."""
    sizes = call.cache_sizes
    consumers = consumers_of(config.block_m, call.latent)
    chunk = resolve_shape_class(call.shape_class, call.q.shape[0], call.requests) == "chunk"
    return KernelShape(
        head_dim=sizes.head_dim,
        group=call.q.shape[1] // sizes.kv_heads,
        kv_heads=sizes.kv_heads,
        page_size=sizes.page_size,
        block_n=config.block_n,
        consumers=consumers,
        stages=config.num_stages,
        # Two row tiles of queries, 128 x 256 or 64 x 576 each, would leave no room for a second stage.
        query_stages=1 if consumers > 1 and sizes.head_dim >= 256 else 2,
        direct=call.direct,
        exact=call.mask.interval() is not None,
        softcap=call.softcap != 0.0,
        sinks=call.sinks is not None,
        # At 256 the accumulator alone takes 128 registers a thread.
        overlap=consumers > 1 and sizes.head_dim <= 128,
        value_dim=call.value_dim,
        head_blocks=config.head_blocks,
        # Of an H200, us without and with: 128 requests of 4,096 keys and 128 heads 276, 268; 4 chunks of 512 tokens
        # 2,537, 2,297, with 16 heads 312, 291. Decode with 16 heads waits for memory instead: 162.1, 165.5.
        weights_in_registers=call.latent and (chunk or config.head_blocks > 1),
    )


def registers_of(shape: KernelShape) -> Registers:
    """By the ahead-of-time compile: the least of the producer's with which its loops do not spill."""
    if shape.latent:
        # An accumulator has 128 sums a thread, and more to keep where its rows are of several tokens. The scorer gets
        # what is left, 88 to 112.
        several = shape.weights_in_registers and shape.consumer_tokens > 1
        return Registers(producer=56 if shape.boxes > 4 else 48, consumer=184 if several else 176)
    if shape.consumers > 1:
        # 8 fewer for the producer are 8 more for the first consumer. Tiles of 8 boxes down or 4 across need them.
        few = shape.anew and shape.boxes <= 4 and shape.columns <= 2
        return Registers(producer=40 if few else 48, consumer=232)
    return Registers(producer=56, limit=128 if shape.head_dim <= 128 else 0)
