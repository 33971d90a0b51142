"""Forward of sparse low-rank pairs on a linear, in one kernel for all its targets.

For a row x of a group, the linear's output y, and targets i = 1..T with experts (d_i, u_i), A = W_down, B = W_up:

    h_i        = A_i[d_i] x                                 [r]     `hidden`, all targets' side by side: R = T r
    out[cols_i] = y[cols_i] + scale * B_i[u_i] h_i          [O]     y where no target's columns are

Bytes, for M rows of out (T rows of x, T = M, or M / V when forked), s bytes an element: read x: T D s and y: T O s;
write out: M O s, and for backward M R s. Weights: 4 (D R + W r) for each program, W the targets' columns, as much again
in quarters where split, and 4 D R where the down-projection has W0, from the L2 cache: BLOCK_ROWS amortises them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mosa_fast.kernels.device_functions import (
    READ_ONCE,
    block_of_columns,
    load_tile,
    target_experts,
    target_tile,
    weight_tile,
)


@triton.jit(do_not_specialize=["rows_per_group", "groups"])
def sparse_lora_fwd_kernel(
    x_ptr,
    y_ptr,
    down_weight_ptr,
    up_weight_ptr,
    down_init_ptr,
    down_owner_ptr,
    up_owner_ptr,
    experts_ptr,
    scale_tensor_ptr,
    out_ptr,
    hidden_ptr,
    rows_per_group,
    groups,
    scale,
    WIDTH: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    EXPERTS: tl.constexpr,
    ALL_COLUMNS: tl.constexpr,
    COLUMN_BLOCKS: tl.constexpr,
    EVEN_TARGETS: tl.constexpr,
    FORK: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
):
    """One program: BLOCK_ROWS rows of one group. The groups of a row block are neighbours: a fork finds x in L2.

    ALL_COLUMNS: every column of y in order, as `block_of_columns` takes ranges; COLUMN_BLOCKS blocks. EVEN_TARGETS: no
    block of columns is cut short.
    """
    EVEN_WIDTH: tl.constexpr = WIDTH % BLOCK_COLUMNS == 0
    block = tl.program_id(0) // groups
    group = tl.program_id(0) % groups
    # Rows past the group's end read its last row again and are not stored: no masks on the loads.
    rows = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_valid = rows < rows_per_group
    rows = tl.minimum(rows, rows_per_group - 1)
    out_rows = group.to(tl.int64) * rows_per_group + rows
    in_rows = rows.to(tl.int64) if FORK else out_rows
    ranks = tl.arange(0, BLOCK_RANKS)
    rank_valid = ranks < RANKS

    # Pass 1: down to the ranks of all targets.
    x_rows = x_ptr + in_rows[:, None] * WIDTH
    down_experts = target_experts(experts_ptr, 0, group, groups, ranks, RANK, RANKS)
    hidden = tl.zeros([BLOCK_ROWS, BLOCK_RANKS], tl.float32)
    for start in range(0, WIDTH, BLOCK_COLUMNS):
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        column_valid = columns < WIDTH
        x = load_tile(x_rows + columns[None, :], column_valid[None, :], EVEN_WIDTH, READ_ONCE)
        weight = weight_tile(
            down_weight_ptr,
            down_init_ptr,
            down_owner_ptr,
            ranks[:, None] * WIDTH + columns[None, :],
            rank_valid[:, None] & column_valid[None, :],
            down_experts[:, None],
            1.0 / EXPERTS,
            EVEN_WIDTH and RANKS == BLOCK_RANKS,
        )
        hidden = tl.dot(x.to(PRODUCT), tl.trans(weight.to(PRODUCT)), hidden, input_precision=PRECISION)
    hidden = hidden.to(PRODUCT)
    if hidden_ptr is not None:  # backward will come
        hidden_tile = hidden_ptr + out_rows[:, None] * RANKS + ranks[None, :]
        tl.store(hidden_tile, hidden, mask=row_valid[:, None] & rank_valid[None, :])

    # Pass 2: up to the columns. y is read one block ahead, so that memory is busy during this block's product.
    if scale_tensor_ptr is not None:
        scale = tl.load(scale_tensor_ptr).to(tl.float32)
    up_experts = target_experts(experts_ptr, 1, group, groups, ranks, RANK, RANKS)
    y_rows = y_ptr + in_rows[:, None] * OUT_WIDTH
    start, end, row, first_rank = block_of_columns(block * 0, ALL_COLUMNS, BLOCK_COLUMNS)
    columns = start + tl.arange(0, BLOCK_COLUMNS)
    next_y = load_tile(y_rows + columns[None, :], (columns < end)[None, :], EVEN_TARGETS, READ_ONCE)
    for index in range(COLUMN_BLOCKS):
        start, end, row, first_rank = block_of_columns(index, ALL_COLUMNS, BLOCK_COLUMNS)
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        column_valid = columns < end
        ahead, ahead_end, _, _ = block_of_columns(index + 1, ALL_COLUMNS, BLOCK_COLUMNS)
        ahead_columns = ahead + tl.arange(0, BLOCK_COLUMNS)
        y = next_y
        next_y = load_tile(y_rows + ahead_columns[None, :], (ahead_columns < ahead_end)[None, :], False, READ_ONCE)
        weight = target_tile(
            up_weight_ptr,
            up_owner_ptr,
            up_experts,
            1.0 / EXPERTS,
            row,
            column_valid,
            first_rank,
            ranks,
            RANK,
            BLOCK_COLUMNS,
            EVEN_TARGETS and RANK == BLOCK_RANKS,
        )
        update = tl.dot(hidden, tl.trans(weight.to(PRODUCT)), input_precision=PRECISION)
        out = y.to(tl.float32) + scale * update
        out_tile = out_ptr + out_rows[:, None] * OUT_WIDTH + columns[None, :]
        tl.store(out_tile, out.to(out_ptr.dtype.element_ty), mask=row_valid[:, None] & column_valid[None, :])
