"""The backward kernels.

The weights of a tile are recomputed from the saved log-sum-exp, nothing of size [Lq, Lk] is stored.

See ``custom_ops/kernels/tile.py`` for the legend. With ``P = exp(scale * Q K^T - lse)`` and ``delta = rowsum(dO * O)
- dlse``: ``dV = P^T dO``, ``dS = P * (dO V^T - delta)``, ``dQ = scale * dS K``, ``dK = scale * dS^T Q``. A soft-cap
multiplies dS by the slope of ``softcap * tanh(s / softcap)``, ``1 - tanh(s / softcap)^2``. The heads of a GQA group
are rows of one tile, so dK and dV sum over the group in registers, and one program takes all KV heads that share a
value head one after the other; no atomics, so two runs are bitwise equal.
"""

import triton
import triton.language as tl

from custom_ops.kernels.tile import keep_scores, key_tiles, load_key_operands, load_rows, row_operands, tanh_of_scores


# Lengths and counts vary from call to call: see forward_kernel.
@triton.jit(do_not_specialize=["heads", "query_len"])
def delta_kernel(
    GRAD_OUT, OUT, GRAD_LSE, DELTA, stride_grad, stride_out, heads, query_len,
    HAS_GRAD_LSE: tl.constexpr, BLOCK_M: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
):  # fmt: skip
    """``delta [B, Hq, Lq]`` fp32; one program BLOCK_M queries of one head. GRAD_LSE is contiguous."""
    tiles = tl.cdiv(query_len, BLOCK_M)
    batch_head = tl.program_id(0) // tiles
    query = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = query < query_len
    batch = (batch_head // heads).to(tl.int64)
    head = (batch_head % heads).to(tl.int64)
    columns = tl.arange(0, DV_PAD)
    grad = load_rows(
        GRAD_OUT + batch * stride_grad[0] + head * stride_grad[1],
        query.to(tl.int64),
        stride_grad[2],
        columns,
        valid,
        DV,
        DV_PAD,
        True,
    )
    out = load_rows(
        OUT + batch * stride_out[0] + head * stride_out[1],
        query.to(tl.int64),
        stride_out[2],
        columns,
        valid,
        DV,
        DV_PAD,
        True,
    )
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    at = batch_head.to(tl.int64) * query_len + query
    if HAS_GRAD_LSE:
        delta -= tl.load(GRAD_LSE + at, mask=valid, other=0.0)
    tl.store(DELTA + at, delta, mask=valid)


@triton.jit
def load_row_tile(
    row_tile, batch, kv_head, kv_heads, query_len, Q, GRAD_OUT, LSE, DELTA, stride_q, stride_grad,
    G: tl.constexpr, BLOCK_M: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    DV: tl.constexpr, DV_PAD: tl.constexpr,
):  # fmt: skip
    """A tile of packed rows: its queries, validity, q, dO, lse in base 2 (0 where the row saw nothing) and delta."""
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query = row // G
    head = kv_head * G + row % G
    valid = query < query_len
    q_at = batch.to(tl.int64) * stride_q[0] + head.to(tl.int64) * stride_q[1] + query.to(tl.int64) * stride_q[2]
    grad_at = (
        batch.to(tl.int64) * stride_grad[0] + head.to(tl.int64) * stride_grad[1] + query.to(tl.int64) * stride_grad[2]
    )
    q = load_rows(Q, q_at, 1, tl.arange(0, D_PAD), valid, D, D_PAD, True)
    grad = load_rows(GRAD_OUT, grad_at, 1, tl.arange(0, DV_PAD), valid, DV, DV_PAD, True)
    scalar_at = (batch * kv_heads * G + head).to(tl.int64) * query_len + query
    lse = tl.load(LSE + scalar_at, mask=valid, other=0.0)
    lse = tl.where(lse == float("-inf"), 0.0, lse * 1.4426950408889634)
    delta = tl.load(DELTA + scalar_at, mask=valid, other=0.0)
    return query, valid, q, grad, lse, delta


@triton.jit
def weights_and_grad_scores(
    q, k, v, grad, lse, delta, keep, qk_scale, softcap, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr
):
    """``P`` and ``dS`` (without scale) of one tile, fp32, 0 where not kept.

    ``lse`` and ``delta`` broadcast over the keys. With q and k, and v and grad, in each other's places, and everything
    else transposed, both come out as ``[keys, rows]``.
    """
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if HAS_SOFTCAP:
        capped = tanh_of_scores(scores, qk_scale, softcap)
        weights = tl.where(keep, tl.exp2(capped * (softcap * 1.4426950408889634) - lse), 0.0)
        slope_weights = weights * (1.0 - capped * capped)
    else:
        weights = tl.where(keep, tl.exp2(scores * qk_scale - lse), 0.0)
        slope_weights = weights
    grad_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    return weights, slope_weights * (grad_weights - delta)


@triton.jit(do_not_specialize=["kv_heads", "query_len", "key_len"])
def query_gradient_kernel(
    Q, K, V, GRAD_OUT, LSE, DELTA, DQ, Q_START, QUERY_VALUES, REQUEST_VALUES, KEY_VALUES, KEY_PADDING,
    stride_q, stride_k, stride_v, stride_grad, stride_dq, kv_heads, query_len, key_len, ints, scale, softcap,
    VISIBLE: tl.constexpr, KEY_VISIBLE: tl.constexpr, BOUNDS: tl.constexpr, READS_KEYS: tl.constexpr,
    HAS_Q_START: tl.constexpr, HAS_QUERY_VALUES: tl.constexpr, HAS_REQUEST_VALUES: tl.constexpr,
    HAS_KEY_VALUES: tl.constexpr, HAS_KEY_PADDING: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    G: tl.constexpr, SHARING: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
):  # fmt: skip
    """dQ: one program a row tile, over the key tiles that the forward visited."""
    row_tiles = tl.cdiv(query_len * G, BLOCK_M)
    row_tile = tl.program_id(0) % row_tiles
    batch = tl.program_id(0) // row_tiles // kv_heads
    kv_head = tl.program_id(0) // row_tiles % kv_heads
    query, row_valid, q, grad, lse, delta = load_row_tile(
        row_tile,
        batch,
        kv_head,
        kv_heads,
        query_len,
        Q,
        GRAD_OUT,
        LSE,
        DELTA,
        stride_q,
        stride_grad,
        G,
        BLOCK_M,
        D,
        D_PAD,
        DV,
        DV_PAD,
    )
    position_shift, request_value, query_value, query_min, query_max = row_operands(
        query,
        row_valid,
        batch,
        query_len,
        Q_START,
        QUERY_VALUES,
        REQUEST_VALUES,
        HAS_Q_START,
        HAS_QUERY_VALUES,
        HAS_REQUEST_VALUES,
        HAS_KEY_VALUES,
    )
    first_query = row_tile * BLOCK_M // G + position_shift
    last_query = tl.minimum((row_tile * BLOCK_M + BLOCK_M - 1) // G, query_len - 1) + position_shift
    lo_any, lo_all, hi_all, hi_any = BOUNDS(first_query, last_query, key_len, ints, request_value, query_min, query_max)
    first, full_first, full_end, end = key_tiles(lo_any, lo_all, hi_all, hi_any, BLOCK_N)
    K += batch.to(tl.int64) * stride_k[0] + kv_head.to(tl.int64) * stride_k[1]
    V += batch.to(tl.int64) * stride_v[0] + (kv_head // SHARING).to(tl.int64) * stride_v[1]
    keys_before = batch.to(tl.int64) * key_len
    columns = tl.arange(0, D_PAD)
    dq = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    for tile in range(first, end):
        key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        key_value, key_padding, valid = load_key_operands(
            key, key < key_len, KEY_VALUES + keys_before, KEY_PADDING + keys_before, HAS_KEY_VALUES, HAS_KEY_PADDING
        )
        k = load_rows(K, key.to(tl.int64), stride_k[2], columns, valid, D, D_PAD, True)
        v = load_rows(V, key.to(tl.int64), stride_v[2], tl.arange(0, DV_PAD), valid, DV, DV_PAD, True)
        keep = keep_scores(
            query + position_shift, key, valid, ints, request_value, query_value, key_value, key_padding,
            VISIBLE, KEY_VISIBLE, True, READS_KEYS,
        )  # fmt: skip
        weights, grad_scores = weights_and_grad_scores(
            q, k, v, grad, lse[:, None], delta[:, None], keep, scale * 1.4426950408889634, softcap,
            HAS_SOFTCAP, PRECISION,
        )  # fmt: skip
        dq = tl.dot(grad_scores.to(k.dtype), k, dq, input_precision=PRECISION)
    head = kv_head * G + (row_tile * BLOCK_M + tl.arange(0, BLOCK_M)) % G
    at = batch.to(tl.int64) * stride_dq[0] + head.to(tl.int64) * stride_dq[1] + query.to(tl.int64) * stride_dq[2]
    tl.store(
        DQ + at[:, None] + columns[None, :],
        (dq * scale).to(DQ.dtype.element_ty),
        mask=row_valid[:, None] & (columns[None, :] < D),
    )


@triton.jit(do_not_specialize=["kv_heads", "query_len", "key_len"])
def key_value_gradient_kernel(
    Q, K, V, GRAD_OUT, LSE, DELTA, DK, DV_OUT, Q_START, QUERY_VALUES, REQUEST_VALUES, KEY_VALUES, KEY_PADDING,
    stride_q, stride_k, stride_v, stride_grad, stride_dk, stride_dv, kv_heads, query_len, key_len, ints, scale, softcap,
    VISIBLE: tl.constexpr, KEY_VISIBLE: tl.constexpr, BOUNDS: tl.constexpr, READS_KEYS: tl.constexpr,
    HAS_Q_START: tl.constexpr, HAS_QUERY_VALUES: tl.constexpr, HAS_REQUEST_VALUES: tl.constexpr,
    HAS_KEY_VALUES: tl.constexpr, HAS_KEY_PADDING: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    G: tl.constexpr, SHARING: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
):  # fmt: skip
    """dK and dV: one program a key tile of a value head, over the KV heads that share it and over all row tiles.

    Row tiles whose bounds miss these keys are left out.
    """
    tiles = tl.cdiv(key_len, BLOCK_N)
    tile = tl.program_id(0) % tiles
    value_heads = kv_heads // SHARING
    batch = tl.program_id(0) // tiles // value_heads
    value_head = tl.program_id(0) // tiles % value_heads
    key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    keys_before = batch.to(tl.int64) * key_len
    key_value, key_padding, valid = load_key_operands(
        key, key < key_len, KEY_VALUES + keys_before, KEY_PADDING + keys_before, HAS_KEY_VALUES, HAS_KEY_PADDING
    )
    columns = tl.arange(0, D_PAD)
    value_columns = tl.arange(0, DV_PAD)
    key_at = key.to(tl.int64)
    v = load_rows(
        V + batch.to(tl.int64) * stride_v[0] + value_head.to(tl.int64) * stride_v[1],
        key_at,
        stride_v[2],
        value_columns,
        valid,
        DV,
        DV_PAD,
        True,
    )
    dv = tl.zeros([BLOCK_N, DV_PAD], tl.float32)
    # Transposed products leave their factors where they are: at 512 no transposed copies, and no spills (76 to 840
    # bytes else). Narrower values were measured with the other order.
    KEYS_FIRST: tl.constexpr = DV_PAD > 256
    inside = (key < key_len)[:, None]
    for shared in range(SHARING):
        kv_head = value_head * SHARING + shared
        k = load_rows(
            K + batch.to(tl.int64) * stride_k[0] + kv_head.to(tl.int64) * stride_k[1],
            key_at,
            stride_k[2],
            columns,
            valid,
            D,
            D_PAD,
            True,
        )
        dk = tl.zeros([BLOCK_N, D_PAD], tl.float32)
        for row_tile in range(tl.cdiv(query_len * G, BLOCK_M)):
            query = (row_tile * BLOCK_M + tl.arange(0, BLOCK_M)) // G
            position_shift, request_value, query_value, query_min, query_max = row_operands(
                query, query < query_len, batch, query_len, Q_START, QUERY_VALUES, REQUEST_VALUES,
                HAS_Q_START, HAS_QUERY_VALUES, HAS_REQUEST_VALUES, HAS_KEY_VALUES,
            )  # fmt: skip
            first_query = row_tile * BLOCK_M // G + position_shift
            last_query = tl.minimum((row_tile * BLOCK_M + BLOCK_M - 1) // G, query_len - 1) + position_shift
            lo_any, lo_all, hi_all, hi_any = BOUNDS(
                first_query, last_query, key_len, ints, request_value, query_min, query_max
            )
            if (lo_any < tile * BLOCK_N + BLOCK_N) & (hi_any > tile * BLOCK_N):
                query, row_valid, q, grad, lse, delta = load_row_tile(
                    row_tile, batch, kv_head, kv_heads, query_len, Q, GRAD_OUT, LSE, DELTA, stride_q, stride_grad,
                    G, BLOCK_M, D, D_PAD, DV, DV_PAD,
                )  # fmt: skip
                keep = row_valid[:, None] & keep_scores(
                    query + position_shift, key, valid, ints, request_value, query_value, key_value, key_padding,
                    VISIBLE, KEY_VISIBLE, True, READS_KEYS,
                )  # fmt: skip
                qk_scale = scale * 1.4426950408889634
                if KEYS_FIRST:
                    weights, grad_scores = weights_and_grad_scores(
                        k, q, grad, v, lse[None, :], delta[None, :], tl.trans(keep), qk_scale, softcap,
                        HAS_SOFTCAP, PRECISION,
                    )  # fmt: skip
                else:
                    weights, grad_scores = weights_and_grad_scores(
                        q, k, v, grad, lse[:, None], delta[:, None], keep, qk_scale, softcap, HAS_SOFTCAP, PRECISION
                    )
                    weights, grad_scores = tl.trans(weights), tl.trans(grad_scores)
                dv = tl.dot(weights.to(grad.dtype), grad, dv, input_precision=PRECISION)
                dk = tl.dot(grad_scores.to(q.dtype), q, dk, input_precision=PRECISION)
        dk_at = batch.to(tl.int64) * stride_dk[0] + kv_head.to(tl.int64) * stride_dk[1] + key_at * stride_dk[2]
        tl.store(
            DK + dk_at[:, None] + columns[None, :],
            (dk * scale).to(DK.dtype.element_ty),
            mask=inside & (columns[None, :] < D),
        )
    dv_at = batch.to(tl.int64) * stride_dv[0] + value_head.to(tl.int64) * stride_dv[1] + key_at * stride_dv[2]
    tl.store(
        DV_OUT + dv_at[:, None] + value_columns[None, :],
        dv.to(DV_OUT.dtype.element_ty),
        mask=inside & (value_columns[None, :] < DV),
    )
