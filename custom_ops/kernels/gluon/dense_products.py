"""The two products of the dense kernel, by wgmma: of queries with keys, and of weights with values.

Head dims that are no power of two are two parts that are, each with a product of its own. ``tiles``: shared memory of
outputs as boxes and as rows, then of both parts of q, of k and of v.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from custom_ops.kernels.gluon.assembly import scaled_if_any
from custom_ops.kernels.gluon.dense_shape import DenseShape  # noqa: F401  the type of every S below


@gluon.jit
def start_scores(at, stage, tiles, S: gl.constexpr):
    """Starts the product of the queries in slot ``at`` with the keys of a stage: [64, keys], unscaled."""
    _out_tiles, _out_rows, q_low, q_high, k_low, k_high, _v_low, _v_high = tiles
    KEYS: gl.constexpr = S.block_n
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    zeros = gl.zeros([64, KEYS], gl.float32, SCORES)
    scores = warpgroup_mma(q_low.index(at), k_low.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
    if S.high_dim > 0:
        scores = warpgroup_mma(q_high.index(at), k_high.index(stage).permute((1, 0)), scores, is_async=True)
    return scores


@gluon.jit
def no_outputs(S: gl.constexpr):
    """Outputs before the first tile: [64, columns] of both parts of v, the second one anything where there is none."""
    LOW_DIM: gl.constexpr = S.value_low_dim
    HIGH_DIM: gl.constexpr = S.value_high_dim
    low = gl.zeros([64, LOW_DIM], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, LOW_DIM, 16]))
    if HIGH_DIM > 0:
        high = gl.zeros([64, HIGH_DIM], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HIGH_DIM, 16]))
    else:
        high = gl.to_tensor(0)
    return low, high


@gluon.jit
def scaled_outputs(low, high, factor, S: gl.constexpr):
    low = _scaled(low, factor, S)
    if S.value_high_dim > 0:
        high = _scaled(high, factor, S)
    return low, high


@gluon.jit
def _scaled(part, factor, S: gl.constexpr):
    factors = gl.convert_layout(factor, gl.SliceLayout(1, part.type.layout))[:, None]
    if S.lazy:
        return scaled_if_any(part, factors)
    else:
        return part * factors


@gluon.jit
def start_outputs(p, low, high, stage, tiles, ADD: gl.constexpr, S: gl.constexpr):
    """Starts the product of weights with the values of a stage, with ADD added to the outputs."""
    low = warpgroup_mma(p, tiles[6].index(stage), low, use_acc=ADD, is_async=True)
    if S.value_high_dim > 0:
        p = gl.convert_layout(p, gl.DotOperandLayout(0, high.type.layout, 2))
        high = warpgroup_mma(p, tiles[7].index(stage), high, use_acc=ADD, is_async=True)
    return low, high


@gluon.jit
def finish_outputs(low, high, S: gl.constexpr):
    if S.value_high_dim > 0:
        low, high = warpgroup_mma_wait(0, [low, high])
    else:
        low = warpgroup_mma_wait(0, [low])
    return low, high


@gluon.jit
def whole_outputs(low, high, S: gl.constexpr):
    """Outputs of both parts, [64, value_dim]: zeros after the second one."""
    if S.value_high_dim > 0:
        ALL: gl.constexpr = S.value_dim
        HIGH_DIM: gl.constexpr = S.value_high_dim
        # Nothing moves: the columns of a row that a thread has are registers, and stay its.
        if HIGH_DIM == 16:
            high = gl.reshape(gl.permute(gl.join(high, gl.zeros_like(high)), (0, 2, 1)), [64, 32])
        if HIGH_DIM <= 32:
            high = gl.reshape(gl.permute(gl.join(high, gl.zeros_like(high)), (0, 2, 1)), [64, 64])
        high = gl.convert_layout(high, low.type.layout)
        low = gl.reshape(gl.permute(gl.join(low, high), (0, 2, 1)), [64, ALL])
        low = gl.convert_layout(low, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ALL, 16]))
    return low
