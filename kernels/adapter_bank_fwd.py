"""Forward of a bank of adapters, each sample through its own task's, in one kernel.

For a row x of a sample of task t, with W = W_down[t], U = W_up[t] and g, b the weight and bias of the task's norm:

    p   = rstd (x - mean) diag(g) W^T                       [r]
    h   = act(p + W b + b_down[t])                          [r]
    out = (x) + (skip) + h U^T + b_up[t]                    [O]

The norm is applied after the product, as in sparse_adapter_fwd.py, where it is derived: x is read from memory once.
Low-rank pairs have neither norm nor biases nor activation; x is a linear's input, skip its output, and each of T
targets has a pair of its own: hidden values of all are side by side, R = T r, as in sparse_lora_fwd.py.

Bytes, for M rows of B samples, s bytes an element: read x: M D s, and again in the second pass where it is added, from
the L2 cache; read skip: M O s; write out: M O s.

Weights: 4 (R D + r W) for each program, W the targets' columns, from the L2 cache, and from memory once for each task
of the batch whose samples are neighbours. A program's rows are of one sample, so that a sample of T tokens has
ceil(T / BLOCK_ROWS) of them. With r = 64, D = O = 768, a program of 128 rows in bfloat16 reads 0.4 MB of weights beside
0.6 MB of activations: what limits it is the L2 cache, not memory. Between tasks no weights are shared: 64 tasks have
25 MB of them, beside the 116 MB that 128 samples of 197 tokens read and write.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mosa_fast.kernels.device_functions import (
    READ_AGAIN,
    READ_ONCE,
    activate,
    block_of_columns,
    load_tile,
    mask_if,
    target_tile,
)


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
    TRAINED_WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    ALL_COLUMNS: tl.constexpr,
    COLUMN_BLOCKS: tl.constexpr,
    EVEN_TARGETS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ADD_INPUT: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
):
    """One program: BLOCK_ROWS rows of one sample. A sample's programs are neighbours, and share its task's weights.

    A group is a sample. ALL_COLUMNS: every column of out in order, as `block_of_columns` takes ranges; COLUMN_BLOCKS
    blocks. EVEN_TARGETS: no block of columns is cut short. TRAINED_WIDTH: W. ADD_INPUT: add x, which is as wide as out.
    """
    EVEN_WIDTH: tl.constexpr = WIDTH % BLOCK_COLUMNS == 0
    EVEN_RANKS: tl.constexpr = RANKS == BLOCK_RANKS
    FIRST_COLUMNS: tl.constexpr = BLOCK_COLUMNS if BLOCK_COLUMNS < WIDTH else WIDTH
    blocks = tl.cdiv(rows_per_group, BLOCK_ROWS)
    sample = tl.program_id(0) // blocks
    task = tl.load(tasks_ptr + sample).to(tl.int64)

    # Rows past the sample's end read its last row again and are not stored: no masks on the loads.
    rows = (tl.program_id(0) % blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_valid = rows < rows_per_group
    rows = sample.to(tl.int64) * rows_per_group + tl.minimum(rows, rows_per_group - 1)
    ranks = tl.arange(0, BLOCK_RANKS)
    rank_valid = ranks < RANKS
    x_rows = x_ptr + rows[:, None] * WIDTH

    # Pass 1: statistics and projection.
    down_weight_ptr += task * (RANKS * WIDTH)
    projected = tl.zeros([BLOCK_ROWS, BLOCK_RANKS], tl.float32)
    if norm_weight_ptr is not None:
        norm_weight_ptr += task * WIDTH
        norm_bias_ptr += task * WIDTH
        weight_bias = tl.zeros([BLOCK_RANKS], tl.float32)  # W b
        weight_sums = tl.zeros([BLOCK_RANKS], tl.float32)  # row sums of W diag(g)
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
        down_bias = tl.load(down_bias_ptr + task * RANKS + ranks, mask=rank_valid, other=0.0)
        projected += down_bias.to(tl.float32)[None, :]
    hidden = (projected if ACTIVATION == "identity" else activate(projected, ACTIVATION)).to(PRODUCT)

    # Pass 2: to the output's columns. x and skip are read one block ahead, so that memory is busy during a product.
    up_weight_ptr += task * (TRAINED_WIDTH * RANK)
    if up_bias_ptr is not None:
        up_bias_ptr += task * TRAINED_WIDTH
    skip_rows = rows[:, None] * OUT_WIDTH
    start, end, row, first_rank = block_of_columns(0, ALL_COLUMNS, BLOCK_COLUMNS)
    columns = start + tl.arange(0, BLOCK_COLUMNS)
    if ADD_INPUT:
        next_x = load_tile(x_rows + columns[None, :], (columns < end)[None, :], EVEN_TARGETS, READ_ONCE)
    if skip_ptr is not None:
        next_skip = load_tile(
            skip_ptr + skip_rows + columns[None, :], (columns < end)[None, :], EVEN_TARGETS, READ_ONCE
        )
    for index in range(COLUMN_BLOCKS):
        start, end, row, first_rank = block_of_columns(index, ALL_COLUMNS, BLOCK_COLUMNS)
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        column_valid = columns < end
        ahead, ahead_end, _, _ = block_of_columns(index + 1, ALL_COLUMNS, BLOCK_COLUMNS)
        ahead_columns = ahead + tl.arange(0, BLOCK_COLUMNS)
        ahead_valid = (ahead_columns < ahead_end)[None, :]
        if ADD_INPUT:
            x = next_x
            next_x = load_tile(x_rows + ahead_columns[None, :], ahead_valid, False, READ_ONCE)
        if skip_ptr is not None:
            skip = next_skip
            next_skip = load_tile(skip_ptr + skip_rows + ahead_columns[None, :], ahead_valid, False, READ_ONCE)
        weight = target_tile(
            up_weight_ptr,
            None,
            ranks,  # of experts, which nobody asks for where weights have no owners
            1.0,
            row,
            column_valid,
            first_rank,
            ranks,
            RANK,
            BLOCK_COLUMNS,
            EVEN_TARGETS and RANK == BLOCK_RANKS,
        )
        out = tl.dot(hidden, tl.trans(weight.to(PRODUCT)), input_precision=PRECISION)
        if up_bias_ptr is not None:
            bias_valid = mask_if(column_valid, first_rank < RANKS)
            out += tl.load(up_bias_ptr + row + tl.arange(0, BLOCK_COLUMNS), mask=bias_valid, other=0.0).to(tl.float32)
        if ADD_INPUT:
            out += x.to(tl.float32)
        if skip_ptr is not None:
            out += skip.to(tl.float32)
        out_tile = out_ptr + rows[:, None] * OUT_WIDTH + columns[None, :]
        tl.store(out_tile, out.to(out_ptr.dtype.element_ty), mask=row_valid[:, None] & column_valid[None, :])
