"""Forward of a bank of adapters, each sample through its own task's, in one kernel.

For a row x of a sample of task t, with W = W_down[t], U = W_up[t] and g, b the weight and bias of the task's norm:

    p   = rstd (x - mean) diag(g) W^T                       [r]
    h   = act(p + W b + b_down[t])                          [r]
    out = (x) + (skip) + h U^T + b_up[t]                    [O]

The norm is applied after the product, as in sparse_adapter_fwd.py, where it is derived: x is read from memory once.
Low-rank pairs have neither norm nor biases nor activation; x is a linear's input, skip its output.

Bytes, for M rows of B samples, s bytes an element: read x: M D s, and again in the second pass where it is added, from
the L2 cache; read skip: M O s; write out: M O s.

Weights: 4 r (D + O) for each program, from the L2 cache, and from memory once for each task of the batch whose samples
are neighbours. A program's rows are of one sample, so that a sample of T tokens has ceil(T / BLOCK_ROWS) of them. With
r = 64, D = O = 768 in bfloat16, 64 rows are 0.3 MB of activations beside 0.4 MB of weights: what limits a program is
the L2 cache, not memory. Between tasks nothing is shared: 64 of them are 25 MB a layer, beside 39 MB that 128 samples
of 197 tokens read or write once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mosa_fast.kernels.device_functions import READ_AGAIN, READ_ONCE, activate, load_tile


@triton.jit(do_not_specialize=["rows_per_group"])
def adapter_bank_fwd_kernel(
    x_ptr,
    skip_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    down_weight_ptr,
    down_bias_ptr,
    up_weight_ptr,
    up_bias_ptr,
    tasks_ptr,
    out_ptr,
    rows_per_group,
    eps,
    WIDTH: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    BOTTLENECK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ADD_INPUT: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_BOTTLENECK: tl.constexpr,
):
    """One program: BLOCK_ROWS rows of one sample. A sample's programs are neighbours, and share its task's weights.

    A group is a sample. ADD_INPUT: add x, which is as wide as out.
    """
    EVEN_WIDTH: tl.constexpr = WIDTH % BLOCK_COLUMNS == 0
    EVEN_OUT: tl.constexpr = OUT_WIDTH % BLOCK_COLUMNS == 0
    EVEN_RANKS: tl.constexpr = BOTTLENECK == BLOCK_BOTTLENECK
    FIRST_COLUMNS: tl.constexpr = BLOCK_COLUMNS if BLOCK_COLUMNS < WIDTH else WIDTH
    blocks = tl.cdiv(rows_per_group, BLOCK_ROWS)
    sample = tl.program_id(0) // blocks
    task = tl.load(tasks_ptr + sample).to(tl.int64)

    # Rows past the sample's end read its last row again and are not stored: no masks on the loads.
    rows = (tl.program_id(0) % blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_valid = rows < rows_per_group
    rows = sample.to(tl.int64) * rows_per_group + tl.minimum(rows, rows_per_group - 1)
    ranks = tl.arange(0, BLOCK_BOTTLENECK)
    rank_valid = ranks < BOTTLENECK
    x_rows = x_ptr + rows[:, None] * WIDTH

    # Pass 1: statistics and projection.
    down_weight_ptr += task * (BOTTLENECK * WIDTH)
    projected = tl.zeros([BLOCK_ROWS, BLOCK_BOTTLENECK], tl.float32)
    if norm_weight_ptr is not None:
        norm_weight_ptr += task * WIDTH
        norm_bias_ptr += task * WIDTH
        weight_bias = tl.zeros([BLOCK_BOTTLENECK], tl.float32)  # W b
        weight_sums = tl.zeros([BLOCK_BOTTLENECK], tl.float32)  # row sums of W diag(g)
        columns = tl.arange(0, BLOCK_COLUMNS)
        first = load_tile(x_rows + columns[None, :], columns[None, :] < WIDTH, EVEN_WIDTH).to(tl.float32)
        pivot = tl.sum(first, axis=1) / FIRST_COLUMNS
        total = tl.zeros([BLOCK_ROWS], tl.float32)
        squares = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(0, WIDTH, BLOCK_COLUMNS):
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        column_valid = columns < WIDTH
        EVICTION: tl.constexpr = READ_AGAIN if ADD_INPUT else READ_ONCE
        x = load_tile(x_rows + columns[None, :], column_valid[None, :], EVEN_WIDTH, EVICTION)
        valid = rank_valid[:, None] & column_valid[None, :]
        weight_tile = down_weight_ptr + ranks[:, None] * WIDTH + columns[None, :]
        weight = load_tile(weight_tile, valid, EVEN_WIDTH and EVEN_RANKS).to(tl.float32)
        if norm_weight_ptr is not None:
            x = x.to(tl.float32) - pivot[:, None]
            if not EVEN_WIDTH:
                x = tl.where(column_valid[None, :], x, 0.0)
            total += tl.sum(x, axis=1)
            squares += tl.sum(x * x, axis=1)
            norm_bias = load_tile(norm_bias_ptr + columns, column_valid, EVEN_WIDTH).to(tl.float32)
            norm_weight = load_tile(norm_weight_ptr + columns, column_valid, EVEN_WIDTH).to(tl.float32)
            weight_bias += tl.sum(weight * norm_bias[None, :], axis=1)
            # Rounded as the product rounds it, so that the mean cancels exactly.
            weight = (weight * norm_weight[None, :]).to(PRODUCT)
            weight_sums += tl.sum(weight.to(tl.float32), axis=1)
        projected = tl.dot(x.to(PRODUCT), tl.trans(weight.to(PRODUCT)), projected, input_precision=PRECISION)

    if norm_weight_ptr is not None:
        mean = total / WIDTH
        rstd = tl.rsqrt(tl.maximum(squares / WIDTH - mean * mean, 0.0) + eps)
        projected = rstd[:, None] * (projected - mean[:, None] * weight_sums[None, :]) + weight_bias[None, :]
    if down_bias_ptr is not None:
        down_bias = tl.load(down_bias_ptr + task * BOTTLENECK + ranks, mask=rank_valid, other=0.0)
        projected += down_bias.to(tl.float32)[None, :]
    hidden = (projected if ACTIVATION == "identity" else activate(projected, ACTIVATION)).to(PRODUCT)

    # Pass 2: to the output's columns. x and skip are read one block ahead, so that memory is busy during a product.
    up_weight_ptr += task * (OUT_WIDTH * BOTTLENECK)
    columns = tl.arange(0, BLOCK_COLUMNS)
    if ADD_INPUT:
        next_x = load_tile(x_rows + columns[None, :], columns[None, :] < WIDTH, EVEN_WIDTH, READ_ONCE)
    if skip_ptr is not None:
        skip_rows = skip_ptr + rows[:, None] * OUT_WIDTH
        next_skip = load_tile(skip_rows + columns[None, :], columns[None, :] < OUT_WIDTH, EVEN_OUT, READ_ONCE)
    for start in range(0, OUT_WIDTH, BLOCK_COLUMNS):
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        column_valid = columns < OUT_WIDTH
        ahead = (columns + BLOCK_COLUMNS)[None, :]
        if ADD_INPUT:
            x = next_x
            next_x = load_tile(x_rows + ahead, ahead < WIDTH, False, READ_ONCE)
        if skip_ptr is not None:
            skip = next_skip
            next_skip = load_tile(skip_rows + ahead, ahead < OUT_WIDTH, False, READ_ONCE)
        valid = column_valid[:, None] & rank_valid[None, :]
        weight_tile = up_weight_ptr + columns[:, None] * BOTTLENECK + ranks[None, :]
        weight = load_tile(weight_tile, valid, EVEN_OUT and EVEN_RANKS).to(PRODUCT)
        out = tl.dot(hidden, tl.trans(weight), input_precision=PRECISION)
        if up_bias_ptr is not None:
            up_bias = load_tile(up_bias_ptr + task * OUT_WIDTH + columns, column_valid, EVEN_OUT)
            out += up_bias.to(tl.float32)[None, :]
        if ADD_INPUT:
            out += x.to(tl.float32)
        if skip_ptr is not None:
            out += skip.to(tl.float32)
        out_tile = out_ptr + rows[:, None] * OUT_WIDTH + columns[None, :]
        tl.store(out_tile, out.to(out_ptr.dtype.element_ty), mask=row_valid[:, None] & column_valid[None, :])
