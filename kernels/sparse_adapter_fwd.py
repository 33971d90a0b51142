"""Forward of the sparse adapter, in one kernel.

For a row x of a group with experts (d, u), with W = W_down[d], U = W_up[u] and g, b the norm's weight and bias:

    p   = rstd (x - mean) diag(g) W^T                       [r]     `pre`: the projection without its biases
    e   = W b + b_down[d]                                   [r]     one vector a group
    h   = drop(act(p + e))                                  [r]
    out = (x) + (skip) + scale * (h U^T + b_up[u])          [D]

x is read from memory once. That pass makes statistics and projection, since the norm can be applied afterwards: for
any pivot c, with x' = x - c, m' = mean(x') and the row sums w_i = sum_j (W diag(g))_ij,

    rstd = (mean(x'^2) - m'^2 + eps)^(-1/2),      p = rstd (x' (W diag(g))^T - m' w).

The pivot is the mean of the row's first C columns (a block). A subset's mean is within sigma * sqrt((D - C) / C) of the
row's mean, so both subtractions lose at most a factor of D / C of precision however large mean / sigma is; for a row
without structure x' is x - mean but for sigma / sqrt(C), and rounding x' costs what rounding the normed row costs.

Bytes, for M rows of out (T rows of x, T = M, or M / V when forked), s bytes an element:
    read x: T D s, skip: T D s, and x again in the second pass, from the L2 cache: a program meets the same rows
    microseconds later (the rows in flight, programs * BLOCK_ROWS * D * s, must fit there);
    write out: M D s; for backward: `pre` M r s and the statistics 8 T;
    weights: 2 D r s for each program, from the L2 cache, as prepare_weights.py leaves them: masked, rounded and with
    the norm's weight in them. BLOCK_ROWS amortises them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mosa_fast.kernels.device_functions import (
    READ_AGAIN,
    READ_ONCE,
    activate,
    dropout_factor,
    load_tile,
    mask_if,
    slot_of,
)


@triton.jit(do_not_specialize=["rows_per_group", "tokens", "groups", "dropout_threshold"])
def sparse_adapter_fwd_kernel(
    x_ptr,
    skip_ptr,
    experts_ptr,
    scale_tensor_ptr,
    seed_ptr,
    prepared_down_ptr,
    prepared_up_ptr,
    prepared_vectors_ptr,
    prepared_up_bias_ptr,
    out_ptr,
    stats_ptr,
    pre_ptr,
    rows_per_group,
    tokens,
    groups,
    scale,
    dropout_threshold,
    dropout_scale,
    eps,
    WIDTH: tl.constexpr,
    BOTTLENECK: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
    DOWN_EXPERTS: tl.constexpr,
    UP_EXPERTS: tl.constexpr,
    DOWN_SPLIT: tl.constexpr,
    UP_SPLIT: tl.constexpr,
    BY_EXPERT: tl.constexpr,
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ADD_INPUT: tl.constexpr,
    FORK: tl.constexpr,
    FIRST_SAMPLE: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_BOTTLENECK: tl.constexpr,
):
    """One program: BLOCK_ROWS rows of one group. The groups of a row block are neighbours: a fork finds x in L2."""
    EVEN_COLUMNS: tl.constexpr = WIDTH % BLOCK_COLUMNS == 0
    FIRST_COLUMNS: tl.constexpr = BLOCK_COLUMNS if BLOCK_COLUMNS < WIDTH else WIDTH
    block = tl.program_id(0) // groups
    group = tl.program_id(0) % groups
    down_slot = slot_of(experts_ptr, group, 0, DOWN_EXPERTS, DOWN_SPLIT, BY_EXPERT)
    up_slot = slot_of(experts_ptr, group, 1, UP_EXPERTS, UP_SPLIT, BY_EXPERT)

    # Rows past the group's end read its last row again and are not stored: no masks on the loads.
    rows = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_valid = rows < rows_per_group
    rows = tl.minimum(rows, rows_per_group - 1)
    out_rows = group.to(tl.int64) * rows_per_group + rows
    in_rows = rows.to(tl.int64) if FORK else out_rows
    ranks = tl.arange(0, BLOCK_BOTTLENECK)
    rank_valid = ranks < BOTTLENECK
    x_rows = x_ptr + in_rows[:, None] * WIDTH
    down_rows = prepared_down_ptr + down_slot * (BLOCK_BOTTLENECK * PADDED_WIDTH) + ranks[:, None] * PADDED_WIDTH
    up_ranks = prepared_up_ptr + up_slot * (PADDED_WIDTH * BLOCK_BOTTLENECK) + ranks[None, :]
    vectors = prepared_vectors_ptr + down_slot * (2 * BLOCK_BOTTLENECK) + ranks
    up_bias_ptr = prepared_up_bias_ptr + up_slot * PADDED_WIDTH

    # Pass 1: statistics and projection.
    projected = tl.zeros([BLOCK_ROWS, BLOCK_BOTTLENECK], tl.float32)
    if NORM:
        columns = tl.arange(0, BLOCK_COLUMNS)
        first = load_tile(x_rows + columns[None, :], columns[None, :] < WIDTH, EVEN_COLUMNS).to(tl.float32)
        pivot = tl.sum(first, axis=1) / FIRST_COLUMNS
        total = tl.zeros([BLOCK_ROWS], tl.float32)
        squares = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(0, WIDTH, BLOCK_COLUMNS):
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        column_valid = columns < WIDTH
        # Kept in L2 for the second pass, if there is one.
        EVICTION: tl.constexpr = READ_AGAIN if ADD_INPUT else READ_ONCE
        x = load_tile(x_rows + columns[None, :], column_valid[None, :], EVEN_COLUMNS, EVICTION).to(tl.float32)
        weight = tl.load(down_rows + columns[None, :])
        if NORM:
            x -= pivot[:, None]
            if not EVEN_COLUMNS:
                x = tl.where(column_valid[None, :], x, 0.0)
            total += tl.sum(x, axis=1)
            squares += tl.sum(x * x, axis=1)
        projected = tl.dot(x.to(PRODUCT), tl.trans(weight), projected, input_precision=PRECISION)

    if NORM:
        mean = total / WIDTH
        rstd = tl.rsqrt(tl.maximum(squares / WIDTH - mean * mean, 0.0) + eps)
        weight_sums = tl.load(vectors + BLOCK_BOTTLENECK)
        projected = rstd[:, None] * (projected - mean[:, None] * weight_sums[None, :])
    bias = tl.load(vectors)

    if pre_ptr is not None:  # backward will come
        pre_rows = pre_ptr + out_rows[:, None] * BOTTLENECK
        tl.store(pre_rows + ranks[None, :], projected.to(PRODUCT), mask=row_valid[:, None] & rank_valid[None, :])
        if NORM:
            writes = mask_if(row_valid, group == 0) if FORK else row_valid
            tl.store(stats_ptr + in_rows * 2, pivot + mean, mask=writes)
            tl.store(stats_ptr + in_rows * 2 + 1, rstd, mask=writes)

    hidden = activate(projected + bias[None, :], ACTIVATION)
    if seed_ptr is not None:
        hidden *= dropout_factor(
            seed_ptr, group, rows, tokens, dropout_threshold, dropout_scale, FIRST_SAMPLE, BLOCK_BOTTLENECK
        )
    hidden = hidden.to(PRODUCT)

    # Pass 2: back to D columns.
    if scale_tensor_ptr is not None:
        scale = tl.load(scale_tensor_ptr).to(tl.float32)
    # x and skip are read one block ahead, so that memory is busy while the product of this block is computed.
    columns = tl.arange(0, BLOCK_COLUMNS)
    if ADD_INPUT:
        next_x = load_tile(x_rows + columns[None, :], columns[None, :] < WIDTH, EVEN_COLUMNS, READ_ONCE)
    if skip_ptr is not None:
        skip_rows = skip_ptr + in_rows[:, None] * WIDTH
        next_skip = load_tile(skip_rows + columns[None, :], columns[None, :] < WIDTH, EVEN_COLUMNS, READ_ONCE)
    for start in range(0, WIDTH, BLOCK_COLUMNS):
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        column_valid = columns < WIDTH
        ahead = (columns + BLOCK_COLUMNS)[None, :]
        if ADD_INPUT:
            x = next_x
            next_x = load_tile(x_rows + ahead, ahead < WIDTH, False, READ_ONCE)
        if skip_ptr is not None:
            skip = next_skip
            next_skip = load_tile(skip_rows + ahead, ahead < WIDTH, False, READ_ONCE)
        weight = tl.load(up_ranks + columns[:, None] * BLOCK_BOTTLENECK)
        update = tl.dot(hidden, tl.trans(weight), input_precision=PRECISION)
        up_bias = tl.load(up_bias_ptr + columns)
        update = (update + up_bias[None, :]) * scale
        if ADD_INPUT:
            update += x.to(tl.float32)
        if skip_ptr is not None:
            update += skip.to(tl.float32)
        out_tile = out_ptr + out_rows[:, None] * WIDTH + columns[None, :]
        tl.store(out_tile, update.to(out_ptr.dtype.element_ty), mask=row_valid[:, None] & column_valid[None, :])
