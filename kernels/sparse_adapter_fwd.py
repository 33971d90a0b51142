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
    weights: 4 D r a projection, D r more where it is split and 4 D r where it has W0, for each program, from the L2
    cache: BLOCK_ROWS amortises them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mosa_fast.kernels.device_functions import (
    READ_AGAIN,
    READ_ONCE,
    activate,
    bias_vector,
    dropout_factor,
    load_tile,
    mask_if,
    weight_tile,
)


@triton.jit(do_not_specialize=["rows_per_group", "tokens", "groups", "dropout_threshold"])
def sparse_adapter_fwd_kernel(
    x_ptr,
    skip_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    down_weight_ptr,
    down_bias_ptr,
    up_weight_ptr,
    up_bias_ptr,
    down_init_ptr,
    down_owner_ptr,
    up_owner_ptr,
    experts_ptr,
    scale_tensor_ptr,
    seed_ptr,
    out_ptr,
    stats_ptr,
    pre_ptr,
    vectors_ptr,
    rows_per_group,
    tokens,
    groups,
    scale,
    dropout_threshold,
    dropout_scale,
    eps,
    WIDTH: tl.constexpr,
    BOTTLENECK: tl.constexpr,
    DOWN_EXPERTS: tl.constexpr,
    UP_EXPERTS: tl.constexpr,
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
    EVEN_WEIGHTS: tl.constexpr = EVEN_COLUMNS and BOTTLENECK == BLOCK_BOTTLENECK
    FIRST_COLUMNS: tl.constexpr = BLOCK_COLUMNS if BLOCK_COLUMNS < WIDTH else WIDTH
    block = tl.program_id(0) // groups
    group = tl.program_id(0) % groups
    down_expert = tl.load(experts_ptr + 2 * group)
    up_expert = tl.load(experts_ptr + 2 * group + 1)

    # Rows past the group's end read its last row again and are not stored: no masks on the loads.
    rows = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_valid = rows < rows_per_group
    rows = tl.minimum(rows, rows_per_group - 1)
    out_rows = group.to(tl.int64) * rows_per_group + rows
    in_rows = rows.to(tl.int64) if FORK else out_rows
    ranks = tl.arange(0, BLOCK_BOTTLENECK)
    rank_valid = ranks < BOTTLENECK
    x_rows = x_ptr + in_rows[:, None] * WIDTH

    # Pass 1: statistics and projection.
    projected = tl.zeros([BLOCK_ROWS, BLOCK_BOTTLENECK], tl.float32)
    weight_bias = tl.zeros([BLOCK_BOTTLENECK], tl.float32)  # W b
    weight_sums = tl.zeros([BLOCK_BOTTLENECK], tl.float32)  # w
    if norm_weight_ptr is not None:
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
        weight = weight_tile(
            down_weight_ptr,
            down_init_ptr,
            down_owner_ptr,
            ranks[:, None] * WIDTH + columns[None, :],
            rank_valid[:, None] & column_valid[None, :],
            down_expert,
            1.0 / DOWN_EXPERTS,
            EVEN_WEIGHTS,
        )
        if norm_weight_ptr is not None:
            x -= pivot[:, None]
            if not EVEN_COLUMNS:
                x = tl.where(column_valid[None, :], x, 0.0)
            total += tl.sum(x, axis=1)
            squares += tl.sum(x * x, axis=1)
            norm_bias = load_tile(norm_bias_ptr + columns, column_valid, EVEN_COLUMNS).to(tl.float32)
            norm_weight = load_tile(norm_weight_ptr + columns, column_valid, EVEN_COLUMNS).to(tl.float32)
            weight_bias += tl.sum(weight * norm_bias[None, :], axis=1)
            # Rounded as the product rounds it, so that the mean cancels exactly.
            weight = (weight * norm_weight[None, :]).to(PRODUCT)
            weight_sums += tl.sum(weight.to(tl.float32), axis=1)
        projected = tl.dot(x.to(PRODUCT), tl.trans(weight.to(PRODUCT)), projected, input_precision=PRECISION)

    if norm_weight_ptr is not None:
        mean = total / WIDTH
        rstd = tl.rsqrt(tl.maximum(squares / WIDTH - mean * mean, 0.0) + eps)
        projected = rstd[:, None] * (projected - mean[:, None] * weight_sums[None, :])
    bias = weight_bias + bias_vector(
        down_bias_ptr,
        ranks,
        rank_valid,
        BOTTLENECK,
        down_expert,
        1.0 / DOWN_EXPERTS,
        DOWN_EXPERTS,
        down_owner_ptr is not None,
    )

    if pre_ptr is not None:  # backward will come
        pre_rows = pre_ptr + out_rows[:, None] * BOTTLENECK
        tl.store(pre_rows + ranks[None, :], projected.to(PRODUCT), mask=row_valid[:, None] & rank_valid[None, :])
        first_block = mask_if(rank_valid, block == 0)
        tl.store(vectors_ptr + group * 2 * BOTTLENECK + ranks, bias, mask=first_block)
        tl.store(vectors_ptr + (group * 2 + 1) * BOTTLENECK + ranks, weight_sums, mask=first_block)
        if norm_weight_ptr is not None:
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
        weight = weight_tile(
            up_weight_ptr,
            None,
            up_owner_ptr,
            columns[:, None] * BOTTLENECK + ranks[None, :],
            column_valid[:, None] & rank_valid[None, :],
            up_expert,
            1.0 / UP_EXPERTS,
            EVEN_WEIGHTS,
        )
        update = tl.dot(hidden, tl.trans(weight.to(PRODUCT)), input_precision=PRECISION)
        up_bias = bias_vector(
            up_bias_ptr,
            columns,
            column_valid,
            WIDTH,
            up_expert,
            1.0 / UP_EXPERTS,
            UP_EXPERTS,
            up_owner_ptr is not None,
        )
        update = (update + up_bias[None, :]) * scale
        if ADD_INPUT:
            update += x.to(tl.float32)
        if skip_ptr is not None:
            update += skip.to(tl.float32)
        out_tile = out_ptr + out_rows[:, None] * WIDTH + columns[None, :]
        tl.store(out_tile, update.to(out_ptr.dtype.element_ty), mask=row_valid[:, None] & column_valid[None, :])
