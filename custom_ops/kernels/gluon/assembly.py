"""PTX for what Gluon cannot say: a branch of each warp's own, an order that ptxas keeps, a register of a kind."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

MOST_REGISTERS = gl.constexpr(64)
"""Of a tile that one piece of PTX takes: its operands are three times as many."""


@gluon.jit
def uniform(x):
    """``x``, an int32, in a uniform register: ptxas keeps minima and maxima in those that loops are short of."""
    return gl.inline_asm_elementwise(
        "redux.sync.min.s32 $0, $1, 0xffffffff;", "=r,r", [x], gl.int32, is_pure=False, pack=1
    )


@gluon.constexpr_function
def _scale_code(count):
    """Register $i becomes $i times its factor, unless all factors of the warp are 1. A thread has two rows of a wgmma
    accumulator, two columns of one in turn with two of the other: registers 0 and 2 have the factors of both."""
    factor = [f"${2 * count + i}" for i in range(count)]
    scale = " ".join(f"mul.rn.f32 ${i}, ${i}, {factor[i]};" for i in range(count))
    return f"""
    {{
        .reg .pred ones;
        setp.eq.f32 ones, {factor[0]}, 0f3F800000;
        setp.eq.and.f32 ones, {factor[2]}, 0f3F800000, ones;
        vote.sync.all.pred ones, ones, 0xffffffff;
        @ones bra.uni done;
        {scale}
        done:
    }}
    """


@gluon.constexpr_function
def _scale_constraints(count):
    """Results, the values in the same registers, and the factors."""
    return ",".join(["=f"] * count + [str(i) for i in range(count)] + ["f"] * count)


@gluon.jit
def scaled_if_any(x, factors):
    """``x * factors`` of a wgmma accumulator, [64, columns], and [64, 1]: a warp whose factors are all 1 skips it.

    A condition on a tensor would be the same for all warps, and they would have to meet for it.
    """
    COUNT: gl.constexpr = min(MOST_REGISTERS, x.shape[1] // 2)
    CODE: gl.constexpr = _scale_code(COUNT)
    CONSTRAINTS: gl.constexpr = _scale_constraints(COUNT)
    return gl.inline_asm_elementwise(CODE, CONSTRAINTS, [x, factors], gl.float32, is_pure=True, pack=COUNT)


@gluon.jit
def computed(sums):
    """``sums``, which are not negative, before all that follows: as if they were stored, if they were negative.

    ptxas moves a wait for products ahead of a softmax that was to run beside them, but nothing past a store.
    """
    return gl.inline_asm_elementwise(
        """
        {
            .reg .pred never;
            .reg .b32 nowhere;
            mov.b32 nowhere, 0;
            setp.lt.f32 never, $1, 0f00000000;
            @never st.volatile.shared.f32 [nowhere], $1;
            mov.f32 $0, $1;
        }
        """,
        "=f,f", [sums], gl.float32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def fast_exp(x):
    """``exp(x)`` of fp32, to a relative 2^-22 and 2^-23 of x; what is less than 2^-126 is 0.

    ``exp`` and ``/`` take twice the instructions, for numbers near the ends of fp32's range.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .f32 e; mul.ftz.f32 e, $1, 0f3FB8AA3B; ex2.approx.ftz.f32 $0, e; }", "=f,f", [x], gl.float32,
        is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def fast_inverse(x):
    """``1 / x`` of fp32, to a relative 2^-23; what is less than 2^-126 is 0."""
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, is_pure=True, pack=1)


@gluon.jit
def fast_sigmoid(x):
    return fast_inverse(1.0 + fast_exp(-x))
