"""Backward of sparse low-rank pairs towards the linear's input and output, row by row.

With the notation of sparse_lora_fwd.py and g = dL/d(out), for each target i

    a_i = B_i[u_i]^T g[cols_i]                              [r]     unscaled gradient of h_i
    t_i = scale * a_i                                       [r]     gradient of h_i
    dx  = sum_i A_i[d_i]^T t_i                              [D]
    dy  = g                                                 [O]     nothing to compute, but for a fork

and the scale's gradient is sum(h . a). Written besides: t, in the product dtype, for the weight gradients; it is R
wide. A fork sums the groups' dx and dy in the same program; g is then read once more for dy.

Bytes, for M rows, s bytes an element: read g in the targets' columns: M W s, and h: M R s where the scale has a
gradient; write dx: M D s and t: M R s. Weights as in the forward.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mosa_fast.kernels.device_functions import (
    READ_AGAIN,
    block_of_columns,
    load_tile,
    target_experts,
    target_tile,
    weight_tile,
)


@triton.jit(do_not_specialize=["rows_per_group", "groups"])
def sparse_lora_bwd_input_kernel(
    grad_out_ptr,
    down_weight_ptr,
    up_weight_ptr,
    down_init_ptr,
    down_owner_ptr,
    up_owner_ptr,
    experts_ptr,
    scale_tensor_ptr,
    hidden_ptr,
    grad_x_ptr,
    grad_y_ptr,
    grad_hidden_ptr,
    scale_partial_ptr,
    rows_per_group,
    groups,
    scale,
    WIDTH: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    EXPERTS: tl.constexpr,
    TARGET_COLUMNS: tl.constexpr,
    TARGET_BLOCKS: tl.constexpr,
    EVEN_TARGETS: tl.constexpr,
    FORK: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
):
    """One program: BLOCK_ROWS rows of x, with all the groups that read them (one, unless forked).

    TARGET_COLUMNS: the targets' columns, as `block_of_columns` takes ranges; TARGET_BLOCKS blocks. grad_y_ptr: only for
    a fork, where y's gradient is a sum. scale_partial_ptr: float32, one number a program.
    """
    EVEN_WIDTH: tl.constexpr = WIDTH % BLOCK_COLUMNS == 0
    if FORK:
        block = tl.program_id(0)
        first_group = block * 0
        groups_here = groups
    else:
        block = tl.program_id(0) // groups
        first_group = tl.program_id(0) % groups
        groups_here = 1
    rows = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_valid = rows < rows_per_group
    rows = tl.minimum(rows, rows_per_group - 1)
    in_rows = rows.to(tl.int64) if FORK else first_group.to(tl.int64) * rows_per_group + rows
    ranks = tl.arange(0, BLOCK_RANKS)
    rank_valid = ranks < RANKS
    rank_tile_valid = row_valid[:, None] & rank_valid[None, :]
    if scale_tensor_ptr is not None:
        scale = tl.load(scale_tensor_ptr).to(tl.float32)

    scale_rows = tl.zeros([BLOCK_ROWS], tl.float32)
    grad_hidden_tile = tl.zeros([BLOCK_ROWS, BLOCK_RANKS], PRODUCT)
    for index in range(groups_here):
        group = first_group + index
        out_rows = group.to(tl.int64) * rows_per_group + rows
        grad_rows = grad_out_ptr + out_rows[:, None] * OUT_WIDTH
        up_experts = target_experts(experts_ptr, 1, group, groups, ranks, RANK, RANKS)
        grad_hidden = tl.zeros([BLOCK_ROWS, BLOCK_RANKS], tl.float32)  # a
        for column_block in range(TARGET_BLOCKS):
            start, end, row, first_rank = block_of_columns(column_block, TARGET_COLUMNS, BLOCK_COLUMNS)
            columns = start + tl.arange(0, BLOCK_COLUMNS)
            column_valid = columns < end
            grad = load_tile(grad_rows + columns[None, :], column_valid[None, :], EVEN_TARGETS, READ_AGAIN)
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
            grad_hidden = tl.dot(grad.to(PRODUCT), weight.to(PRODUCT), grad_hidden, input_precision=PRECISION)
        tile = out_rows[:, None] * RANKS + ranks[None, :]
        if scale_partial_ptr is not None:
            hidden = tl.load(hidden_ptr + tile, mask=rank_tile_valid, other=0.0).to(tl.float32)
            scale_rows += tl.sum(hidden * grad_hidden, axis=1)
        grad_hidden_tile = (scale * grad_hidden).to(PRODUCT)
        tl.store(grad_hidden_ptr + tile, grad_hidden_tile, mask=rank_tile_valid)
    if scale_partial_ptr is not None:
        tl.store(scale_partial_ptr + tl.program_id(0), tl.sum(scale_rows, axis=0))

    if grad_x_ptr is not None:
        if FORK:
            tl.debug_barrier()  # the groups' t, written above, are read again below by other threads
        for start in range(0, WIDTH, BLOCK_COLUMNS):
            columns = start + tl.arange(0, BLOCK_COLUMNS)
            column_valid = columns < WIDTH
            grad_x = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
            for index in range(groups_here):
                group = first_group + index
                if FORK:
                    out_rows = group.to(tl.int64) * rows_per_group + rows
                    tile = out_rows[:, None] * RANKS + ranks[None, :]
                    grad_hidden_tile = tl.load(grad_hidden_ptr + tile, mask=rank_valid[None, :], other=0.0)
                weight = weight_tile(
                    down_weight_ptr,
                    down_init_ptr,
                    down_owner_ptr,
                    ranks[:, None] * WIDTH + columns[None, :],
                    rank_valid[:, None] & column_valid[None, :],
                    target_experts(experts_ptr, 0, group, groups, ranks, RANK, RANKS)[:, None],
                    1.0 / EXPERTS,
                    EVEN_WIDTH and RANKS == BLOCK_RANKS,
                )
                grad_x = tl.dot(grad_hidden_tile, weight.to(PRODUCT), grad_x, input_precision=PRECISION)
            grad_x_tile = grad_x_ptr + in_rows[:, None] * WIDTH + columns[None, :]
            valid = row_valid[:, None] & column_valid[None, :]
            tl.store(grad_x_tile, grad_x.to(grad_x_ptr.dtype.element_ty), mask=valid)

    if grad_y_ptr is not None:
        for start in range(0, OUT_WIDTH, BLOCK_COLUMNS):
            columns = start + tl.arange(0, BLOCK_COLUMNS)
            column_valid = columns < OUT_WIDTH
            grad_y = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
            for index in range(groups_here):
                out_rows = (first_group + index).to(tl.int64) * rows_per_group + rows
                grad_tile = grad_out_ptr + out_rows[:, None] * OUT_WIDTH + columns[None, :]
                grad_y += load_tile(grad_tile, column_valid[None, :], OUT_WIDTH % BLOCK_COLUMNS == 0).to(tl.float32)
            grad_y_tile = grad_y_ptr + in_rows[:, None] * OUT_WIDTH + columns[None, :]
            valid = row_valid[:, None] & column_valid[None, :]
            tl.store(grad_y_tile, grad_y.to(grad_y_ptr.dtype.element_ty), mask=valid)
