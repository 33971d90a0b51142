"""Backward of sparse low-rank pairs towards their weights: a reduction over all tokens, in two deterministic stages.

With h, t and g from sparse_lora_bwd_input.py, for each target i

    dB_i = scale * [owned by u_i] * (g[cols_i]^T h_i)       [W, r]
    dA_i = [owned by d_i] * (t_i^T x)                       [R, D]

[owned] is 1 where the expert owns the weight (1 / E everywhere for merged), 0 elsewhere: the zeros are written by the
kernel.

Stage 1: the tokens are cut into segments, each inside one group; a program owns some consecutive segments and a block
of the targets' columns (dB) or of D (dA), keeps the product for one segment in registers, and adds what its group owns
to its own slice of `partial`, so memory does not grow with V. Stage 2 sums the slices in a fixed order (reductions.py).

Bytes, for M rows, s bytes an element, S slices: read g in the targets' columns: M W s, x: M D s, h and t: M R s each
(again from the L2 cache by every column block); write and read `partial`: 2 * S * (W r + R D) * 4.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mosa_fast.kernels.device_functions import block_of_columns, load_tile, mask_if, ownership, target_experts


@triton.jit
def product_over_rows(
    left_ptr,
    right_ptr,
    left_start,
    right_start,
    start_row,
    end_row,
    columns,
    column_valid,
    ranks,
    rank_valid,
    LEFT_WIDTH: tl.constexpr,
    RANKS: tl.constexpr,
    EVEN: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
):
    """left^T right over the rows of a segment, float32 `[BLOCK_COLUMNS, BLOCK_RANKS]`.

    left: `[., LEFT_WIDTH]`, whose row 0 of the group is row left_start; right: `[., RANKS]`, likewise.
    """
    product = tl.zeros([BLOCK_COLUMNS, BLOCK_RANKS], tl.float32)
    for block_row in range(start_row, end_row, BLOCK_ROWS):
        rows = block_row + tl.arange(0, BLOCK_ROWS)
        # Rows past the end are zero on the right; on the left they repeat a row that is there, for those to cancel.
        left_rows = left_start + tl.minimum(rows, end_row - 1)
        left = load_tile(left_ptr + left_rows[:, None] * LEFT_WIDTH + columns[None, :], column_valid[None, :], EVEN)
        right_tile = right_ptr + (right_start + rows)[:, None] * RANKS + ranks[None, :]
        right = tl.load(right_tile, mask=(rows < end_row)[:, None] & rank_valid[None, :], other=0.0)
        product = tl.dot(tl.trans(left.to(PRODUCT)), right, product, input_precision=PRECISION)
    return product


@triton.jit(do_not_specialize=["rows_per_group", "groups", "pieces", "piece_rows", "segments", "segments_per_slice"])
def sparse_lora_bwd_weight_kernel(
    grad_out_ptr,
    x_ptr,
    hidden_ptr,
    grad_hidden_ptr,
    down_owner_ptr,
    up_owner_ptr,
    experts_ptr,
    scale_tensor_ptr,
    partial_ptr,
    rows_per_group,
    groups,
    pieces,
    piece_rows,
    segments,
    segments_per_slice,
    scale,
    WIDTH: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    EXPERTS: tl.constexpr,
    UP_WEIGHTS: tl.constexpr,
    DOWN_WEIGHTS: tl.constexpr,
    TARGET_COLUMNS: tl.constexpr,
    TARGET_BLOCKS: tl.constexpr,
    EVEN_TARGETS: tl.constexpr,
    FORK: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
):
    """One program: one slice and BLOCK_COLUMNS columns of the targets (dB), or of D (dA).

    TARGET_COLUMNS: the targets' columns, as `block_of_columns` takes ranges; TARGET_BLOCKS blocks, then those of D.
    Segment i is piece i % pieces, of piece_rows rows, of group i // pieces. ACCUMULATE: a slice may have several.
    partial: float32 `[S, W r + R D]`, dB and dA.
    """
    DOWN_BLOCKS: tl.constexpr = triton.cdiv(WIDTH, BLOCK_COLUMNS)
    EVEN_WIDTH: tl.constexpr = WIDTH % BLOCK_COLUMNS == 0
    slice_index = tl.program_id(0) // (TARGET_BLOCKS + DOWN_BLOCKS)
    column_block = tl.program_id(0) % (TARGET_BLOCKS + DOWN_BLOCKS)
    ranks = tl.arange(0, BLOCK_RANKS)
    rank_valid = ranks < RANKS
    if scale_tensor_ptr is not None:
        scale = tl.load(scale_tensor_ptr).to(tl.float32)
    up_partial = partial_ptr + slice_index.to(tl.int64) * (UP_WEIGHTS + DOWN_WEIGHTS)
    down_partial = up_partial + UP_WEIGHTS

    first = slice_index * segments_per_slice
    for index in range(tl.minimum(segments_per_slice, segments - first)):
        segment = first + index
        group = segment // pieces
        start_row = (segment % pieces) * piece_rows
        end_row = tl.minimum(start_row + piece_rows, rows_per_group)
        out_start = group.to(tl.int64) * rows_per_group
        in_start = out_start * 0 if FORK else out_start
        if ACCUMULATE:
            tl.debug_barrier()  # what another thread stored for the segment before is read below
        # What this segment's group owns of its product goes to the slice: stored first, added to later.
        later = index > 0
        if column_block < TARGET_BLOCKS:
            start, end, row, first_rank = block_of_columns(column_block, TARGET_COLUMNS, BLOCK_COLUMNS)
            columns = start + tl.arange(0, BLOCK_COLUMNS)
            up = product_over_rows(
                grad_out_ptr,
                hidden_ptr,
                out_start,
                out_start,
                start_row,
                end_row,
                columns,
                columns < end,
                ranks,
                rank_valid,
                OUT_WIDTH,
                RANKS,
                EVEN_TARGETS,
                PRODUCT,
                PRECISION,
                BLOCK_ROWS,
                BLOCK_COLUMNS,
                BLOCK_RANKS,
            )
            own = ranks - first_rank
            up_valid = (columns < end)[:, None] & ((own >= 0) & (own < RANK))[None, :]
            up_offsets = (row + tl.arange(0, BLOCK_COLUMNS))[:, None] * RANK + own[None, :]
            up *= scale
            if up_owner_ptr is not None:
                up_owner = tl.load(up_owner_ptr + up_offsets, mask=up_valid, other=0)
                up_experts = target_experts(experts_ptr, 1, group, groups, ranks, RANK, RANKS)
                up *= ownership(up_owner, up_experts[None, :], 1.0 / EXPERTS)
            if ACCUMULATE:
                up += tl.load(up_partial + up_offsets, mask=mask_if(up_valid, later), other=0.0)
            tl.store(up_partial + up_offsets, up, mask=up_valid)
        else:
            columns = (column_block - TARGET_BLOCKS) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
            column_valid = columns < WIDTH
            down = product_over_rows(
                x_ptr,
                grad_hidden_ptr,
                in_start,
                out_start,
                start_row,
                end_row,
                columns,
                column_valid,
                ranks,
                rank_valid,
                WIDTH,
                RANKS,
                EVEN_WIDTH,
                PRODUCT,
                PRECISION,
                BLOCK_ROWS,
                BLOCK_COLUMNS,
                BLOCK_RANKS,
            )
            down = tl.trans(down)
            down_valid = rank_valid[:, None] & column_valid[None, :]
            down_offsets = ranks[:, None] * WIDTH + columns[None, :]
            if down_owner_ptr is not None:
                down_owner = load_tile(down_owner_ptr + down_offsets, down_valid, EVEN_WIDTH and RANKS == BLOCK_RANKS)
                down_experts = target_experts(experts_ptr, 0, group, groups, ranks, RANK, RANKS)
                down *= ownership(down_owner, down_experts[:, None], 1.0 / EXPERTS)
            if ACCUMULATE:
                down += tl.load(down_partial + down_offsets, mask=mask_if(down_valid, later), other=0.0)
            tl.store(down_partial + down_offsets, down, mask=down_valid)
