"""The eager forward kernel: the frame around the tile loop that the compiler's template has as text.

See ``custom_ops/kernels/tile.py`` for the legend.
"""

import triton
import triton.language as tl

from custom_ops.kernels.tile import attend, load_query, tile_of_program


# Lengths and counts vary from call to call: a kernel each for 1 and for multiples of 16 would be compiled for nothing.
@triton.jit(do_not_specialize=["kv_heads", "query_len", "key_len", "heads"])
def forward_kernel(
    Q, K, V, OUT, LSE, Q_START, QUERY_VALUES, REQUEST_VALUES, KEY_VALUES, KEY_PADDING,
    stride_q, stride_k, stride_v, stride_out,
    kv_heads, query_len, key_len, heads, ints, scale, softcap,
    VISIBLE: tl.constexpr, KEY_VISIBLE: tl.constexpr, BOUNDS: tl.constexpr,
    READS_KEYS: tl.constexpr, MAY_BE_FULL: tl.constexpr,
    HAS_Q_START: tl.constexpr, HAS_QUERY_VALUES: tl.constexpr, HAS_REQUEST_VALUES: tl.constexpr,
    HAS_KEY_VALUES: tl.constexpr, HAS_KEY_PADDING: tl.constexpr, HAS_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    G: tl.constexpr, SHARING: tl.constexpr, HEADS_TOGETHER: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
):  # fmt: skip
    """One program a tile of BLOCK_M rows of one KV head.

    ``stride_*`` are (batch, head, token) strides in elements; ``heads`` is B * Hkv.
    """
    row_tile, batch_head = tile_of_program(tl.cdiv(query_len * G, BLOCK_M), heads, HEADS_TOGETHER)
    batch = batch_head // kv_heads
    kv_head = batch_head % kv_heads
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query = row // G
    head = kv_head * G + row % G
    row_valid = query < query_len
    rows_at = batch.to(tl.int64) * stride_q[0] + head.to(tl.int64) * stride_q[1] + query.to(tl.int64) * stride_q[2]
    q, q_high = load_query(Q, rows_at, row_valid, D, D_PAD)
    out, lse = attend(
        q, query, row_valid,
        row_tile * BLOCK_M // G, tl.minimum((row_tile * BLOCK_M + BLOCK_M - 1) // G, query_len - 1), batch,
        query_len, key_len,
        K + batch.to(tl.int64) * stride_k[0] + kv_head.to(tl.int64) * stride_k[1],
        V + batch.to(tl.int64) * stride_v[0] + (kv_head // SHARING).to(tl.int64) * stride_v[1],
        stride_k[2], stride_v[2], Q_START, QUERY_VALUES, REQUEST_VALUES, KEY_VALUES, KEY_PADDING, ints, scale,
        VISIBLE, KEY_VISIBLE, BOUNDS, READS_KEYS, MAY_BE_FULL, HAS_Q_START, HAS_QUERY_VALUES, HAS_REQUEST_VALUES,
        HAS_KEY_VALUES, HAS_KEY_PADDING, PRECISION, BLOCK_M, BLOCK_N, D, D_PAD, DV, DV_PAD,
        q_high, DESCRIPTORS, softcap, HAS_SOFTCAP,
    )  # fmt: skip
    value_columns = tl.arange(0, DV_PAD)
    out_at = batch.to(tl.int64) * stride_out[0] + head.to(tl.int64) * stride_out[1] + query.to(tl.int64) * stride_out[2]
    tl.store(
        OUT + out_at[:, None] + value_columns[None, :],
        out.to(OUT.dtype.element_ty),
        mask=row_valid[:, None] & (value_columns[None, :] < DV),
    )
    tl.store(LSE + (batch * kv_heads * G + head).to(tl.int64) * query_len + query, lse, mask=row_valid)
