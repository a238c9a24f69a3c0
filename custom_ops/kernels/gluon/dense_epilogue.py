"""What the dense kernel computes from outputs before it stores them: an epilogue made from text.

It may read one further tensor like the outputs, the extra: a gate, a residual. The producer loads each consumer's part
of it over that consumer's queries, while the last softmax and product with V run. Loaded later, or by the consumers,
it costs as much as a kernel of its own.
"""

from __future__ import annotations

import functools
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from custom_ops.epilogue import Epilogue
from custom_ops.kernels.gluon.assembly import fast_exp, fast_inverse, fast_sigmoid
from custom_ops.kernels.gluon.compat import async_load, reinterpret
from custom_ops.kernels.mask_functions import device_functions


@functools.cache
def epilogue_function(epilogue: Epilogue) -> Any:
    """The device function ``epilogue(x, y)`` of fp32 tiles: of outputs, and of the extra, or anything without one."""
    lines = [*epilogue.lines("gluon"), f"return {epilogue.result}"]
    source = "\n    ".join(["def epilogue(x, y):", *lines]) + "\n"
    fast = {"fast_exp": fast_exp, "fast_inverse": fast_inverse, "fast_sigmoid": fast_sigmoid}
    return device_functions("epilogue", source, gluon=True, **fast)["epilogue"]


@gluon.jit
def wait_for_keys(tile, k_empty, S: gl.constexpr):
    """Waits until all consumers are done with K of a tile, the last of an item; -1: there was none."""
    if tile >= 0:
        mbarrier.wait(k_empty.index(tile % S.stages), (tile // S.stages) & 1)


@gluon.jit
def load_extra(source, turn, batch, head, first, q_full, out_tiles, S: gl.constexpr):
    """Starts the copies of a turn's extras over its queries, which nobody reads any more."""
    CONSUMERS: gl.constexpr = S.consumers
    stage = turn % S.query_stages
    # Of an item without key tiles nobody may have waited for the queries, which must not come after the extras.
    mbarrier.wait(q_full.index(stage), (turn // S.query_stages) & 1)
    for c in gl.static_range(CONSUMERS):
        at = stage * CONSUMERS + c
        full = q_full.index(S.query_stages + at)
        mbarrier.expect(full, 64 * S.value_dim * 2)
        tile = out_tiles.index(at * (S.low_columns // S.value_columns))
        async_load(source, [batch, head, first + c * 64, 0], full, tile)


@gluon.jit
def wait_for_extra(turn, q_full, S: gl.constexpr, CONSUMER: gl.constexpr):
    """Of consumers without rows too: who loads the next queries into this place must not meet it."""
    if S.extra:
        at = S.query_stages + turn % S.query_stages * S.consumers + CONSUMER
        mbarrier.wait(q_full.index(at), (turn // S.query_stages) & 1)


@gluon.jit
def store_epilogue(acc, out_tiles, box, EPILOGUE: gl.constexpr, S: gl.constexpr):
    """EPILOGUE of outputs [64, columns] to boxes of 64 columns of ``out_tiles``, from ``box`` on, where the extra is.

    64 columns at a time: past a fence nothing of later columns is loaded, for which there are no registers.
    """
    HALF: gl.constexpr = acc.shape[1] // 2
    if acc.shape[1] == 64:
        LAYOUT: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
        COUNT: gl.constexpr = out_tiles.shape[0] * out_tiles.shape[4] // 64
        tile = reinterpret(out_tiles, out_tiles.dtype, [COUNT, 64, 64], LAYOUT).index(box)
        extra = acc
        if S.extra:
            extra = tile.load(acc.type.layout).to(gl.float32)
        tile.store(EPILOGUE(acc, extra).to(out_tiles.dtype))
        fence_async_shared()
    else:
        # A thread has both halves of its rows: nothing moves.
        low, high = acc.reshape([64, 2, HALF]).permute((0, 2, 1)).split()
        store_epilogue(low, out_tiles, box, EPILOGUE, S)
        store_epilogue(high, out_tiles, box + HALF // 64, EPILOGUE, S)
