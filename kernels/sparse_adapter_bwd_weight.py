"""Backward of the sparse adapter towards its weights: a reduction over all tokens, in two deterministic stages.

With h, t and y from sparse_adapter_bwd_input.py, x^ = (x - mean) rstd (x itself without a norm), and Q = t^T x^:

    dU = scale * [owned by u] * (y^T h)                     [D, r]
    dW = [owned by d] * (Q diag(g) + (sum t) b^T)           [r, D]  since t^T (x^ g + b) = t^T n
    dg = column sums of W_down[d] * Q                       [D]     since dn / g = t W
    db = (sum t) W_down[d]                                  [D]
    db_up[u] = scale * sum y,   db_down[d] = sum t          [D], [r]

so the norm's gradients too come from Q, and x and y are read once. [owned] is 1 where the expert owns the weight (1 / E
everywhere for merged), 0 elsewhere: the zeros are written by the kernel.

Stage 1: the tokens are cut into segments, each inside one group; a program owns some consecutive segments and a block
of columns, keeps y^T h and Q for one segment in registers, and adds what its group owns to its own slice of `partial`,
so memory does not grow with V. Stage 2 sums the slices in a fixed order (reductions.py), and for the biases the sums of
y and t of the segments. No atomics: equal input gives equal bits.

Bytes, for M rows, s bytes an element, S slices: read y: M D s, x: M D s, h and t: 2 M r s (again from the L2 cache by
every column block); write and read `partial`: 2 * S * (2 D r + 2 D) * 4. S is chosen so that one wave of programs
fills the chip: S * D / BLOCK_COLUMNS programs, that is about 16 * multiprocessors * BLOCK_COLUMNS * r bytes of partial
sums however many tokens there are (17 MB written and read on 132 multiprocessors at r = 64, BLOCK_COLUMNS = 128).
"""

from __future__ import annotations

import triton
import triton.language as tl

from mosa_fast.kernels.device_functions import load_tile, mask_if, ownership, weight_tile


@triton.jit(do_not_specialize=["rows_per_group", "groups", "pieces", "piece_rows", "segments_per_slice"])
def sparse_adapter_bwd_weight_kernel(
    grad_out_ptr,
    x_ptr,
    hidden_ptr,
    grad_pre_ptr,
    stats_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    down_weight_ptr,
    down_init_ptr,
    down_owner_ptr,
    up_owner_ptr,
    experts_ptr,
    scale_tensor_ptr,
    partial_ptr,
    up_sums_ptr,
    down_sums_ptr,
    rows_per_group,
    groups,
    pieces,
    piece_rows,
    segments_per_slice,
    scale,
    WIDTH: tl.constexpr,
    BOTTLENECK: tl.constexpr,
    DOWN_EXPERTS: tl.constexpr,
    UP_EXPERTS: tl.constexpr,
    FORK: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_BOTTLENECK: tl.constexpr,
):
    """One program: one slice and BLOCK_COLUMNS columns, BLOCK_ROWS tokens at a time.

    Segment i is piece i % pieces, of piece_rows rows, of group i // pieces. ACCUMULATE: a slice may have several.
    partial: float32 `[S, 2 D r + 2 D]`: dU, dW, and with a norm dg, db. up_sums: float32 `[segments, D]`, sum y.
    down_sums: float32 `[segments, r]`, sum t.
    """
    COLUMN_BLOCKS: tl.constexpr = triton.cdiv(WIDTH, BLOCK_COLUMNS)
    EVEN_COLUMNS: tl.constexpr = WIDTH % BLOCK_COLUMNS == 0
    EVEN_WEIGHTS: tl.constexpr = EVEN_COLUMNS and BOTTLENECK == BLOCK_BOTTLENECK
    PARTIAL: tl.constexpr = 2 * WIDTH * BOTTLENECK + (2 * WIDTH if norm_weight_ptr is not None else 0)
    slice_index = tl.program_id(0) // COLUMN_BLOCKS
    column_block = tl.program_id(0) % COLUMN_BLOCKS
    columns = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    column_valid = columns < WIDTH
    ranks = tl.arange(0, BLOCK_BOTTLENECK)
    rank_valid = ranks < BOTTLENECK
    if scale_tensor_ptr is not None:
        scale = tl.load(scale_tensor_ptr).to(tl.float32)
    up_offsets = columns[:, None] * BOTTLENECK + ranks[None, :]
    up_valid = column_valid[:, None] & rank_valid[None, :]
    down_offsets = ranks[:, None] * WIDTH + columns[None, :]
    down_valid = rank_valid[:, None] & column_valid[None, :]
    up_partial = partial_ptr + slice_index.to(tl.int64) * PARTIAL
    down_partial = up_partial + WIDTH * BOTTLENECK
    norm_partial = up_partial + 2 * WIDTH * BOTTLENECK

    first = slice_index * segments_per_slice
    for index in range(tl.minimum(segments_per_slice, groups * pieces - first)):
        segment = first + index
        group = segment // pieces
        start_row = (segment % pieces) * piece_rows
        end_row = tl.minimum(start_row + piece_rows, rows_per_group)
        out_start = group.to(tl.int64) * rows_per_group
        in_start = out_start * 0 if FORK else out_start

        up = tl.zeros([BLOCK_COLUMNS, BLOCK_BOTTLENECK], tl.float32)  # y^T h
        down = tl.zeros([BLOCK_COLUMNS, BLOCK_BOTTLENECK], tl.float32)  # Q^T
        # Summed over rows only once a segment: element by element in the loop, across threads after it.
        up_sums = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        down_sums = tl.zeros([BLOCK_ROWS, BLOCK_BOTTLENECK], tl.float32)
        for block_row in range(start_row, end_row, BLOCK_ROWS):
            rows = block_row + tl.arange(0, BLOCK_ROWS)
            row_valid = rows < end_row
            # Rows past the end are zero in y, h and t; of x they repeat a row that is there, for h and t to cancel.
            tile_valid = row_valid[:, None] & column_valid[None, :]
            out_rows = out_start + rows
            in_rows = in_start + tl.minimum(rows, end_row - 1)
            grad = tl.load(grad_out_ptr + out_rows[:, None] * WIDTH + columns[None, :], mask=tile_valid, other=0.0)
            x_tile = x_ptr + in_rows[:, None] * WIDTH + columns[None, :]
            x = load_tile(x_tile, column_valid[None, :], EVEN_COLUMNS)
            if norm_weight_ptr is not None:
                mean = tl.load(stats_ptr + in_rows * 2)
                rstd = tl.load(stats_ptr + in_rows * 2 + 1)
                x = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
            rank_tile = out_rows[:, None] * BOTTLENECK + ranks[None, :]
            rank_tile_valid = row_valid[:, None] & rank_valid[None, :]
            hidden = tl.load(hidden_ptr + rank_tile, mask=rank_tile_valid, other=0.0)
            grad_pre = tl.load(grad_pre_ptr + rank_tile, mask=rank_tile_valid, other=0.0)
            up = tl.dot(tl.trans(grad.to(PRODUCT)), hidden, up, input_precision=PRECISION)
            down = tl.dot(tl.trans(x.to(PRODUCT)), grad_pre, down, input_precision=PRECISION)
            up_sums += grad.to(tl.float32)
            down_sums += grad_pre.to(tl.float32)

        grad_bias = tl.sum(down_sums, axis=0)  # sum t
        segment_row = segment.to(tl.int64)
        tl.store(up_sums_ptr + segment_row * WIDTH + columns, tl.sum(up_sums, axis=0), mask=column_valid)
        tl.store(
            down_sums_ptr + segment_row * BOTTLENECK + ranks, grad_bias, mask=mask_if(rank_valid, column_block == 0)
        )

        # What this segment's group owns of its products goes to the slice: stored first, added to later.
        later = index > 0
        if ACCUMULATE:
            tl.debug_barrier()  # what another thread stored for the segment before is read below
        up *= scale
        if up_owner_ptr is not None:
            owner = load_tile(up_owner_ptr + up_offsets, up_valid, EVEN_WEIGHTS)
            up *= ownership(owner, tl.load(experts_ptr + 2 * group + 1), 1.0 / UP_EXPERTS)
        if ACCUMULATE:
            up += tl.load(up_partial + up_offsets, mask=mask_if(up_valid, later), other=0.0)
        tl.store(up_partial + up_offsets, up, mask=up_valid)

        product = tl.trans(down)  # Q
        down_expert = tl.load(experts_ptr + 2 * group)
        if norm_weight_ptr is not None:
            norm_weight = tl.load(norm_weight_ptr + columns, mask=column_valid, other=0.0).to(tl.float32)
            norm_bias = tl.load(norm_bias_ptr + columns, mask=column_valid, other=0.0).to(tl.float32)
            weight = weight_tile(
                down_weight_ptr,
                down_init_ptr,
                down_owner_ptr,
                down_offsets,
                down_valid,
                down_expert,
                1.0 / DOWN_EXPERTS,
                EVEN_WEIGHTS,
            )
            grad_norm_weight = tl.sum(weight * product, axis=0)
            grad_norm_bias = tl.sum(weight * grad_bias[:, None], axis=0)
            if ACCUMULATE:
                norm_valid = mask_if(column_valid, later)
                grad_norm_weight += tl.load(norm_partial + columns, mask=norm_valid, other=0.0)
                grad_norm_bias += tl.load(norm_partial + WIDTH + columns, mask=norm_valid, other=0.0)
            tl.store(norm_partial + columns, grad_norm_weight, mask=column_valid)
            tl.store(norm_partial + WIDTH + columns, grad_norm_bias, mask=column_valid)
            product = product * norm_weight[None, :] + grad_bias[:, None] * norm_bias[None, :]
        if down_owner_ptr is not None:
            owner = load_tile(down_owner_ptr + down_offsets, down_valid, EVEN_WEIGHTS)
            product *= ownership(owner, down_expert, 1.0 / DOWN_EXPERTS)
        if ACCUMULATE:
            product += tl.load(down_partial + down_offsets, mask=mask_if(down_valid, later), other=0.0)
        tl.store(down_partial + down_offsets, product, mask=down_valid)


@triton.jit
def _bias_rows(
    sums_ptr, expert_ids_ptr, grad_bias_ptr, block, segments, pieces, scale,
    COLUMNS: tl.constexpr, EXPERTS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradient `[E, COLUMNS]` of a bias, for a block of columns, from the segments' sums."""
    EXPERTS_PADDED: tl.constexpr = triton.next_power_of_2(EXPERTS)
    columns = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    experts = tl.arange(0, EXPERTS_PADDED)
    total = tl.zeros([EXPERTS_PADDED, BLOCK_COLUMNS], tl.float32)
    for segment in range(segments):
        sums = tl.load(sums_ptr + columns, mask=columns < COLUMNS, other=0.0)
        sums_ptr += COLUMNS
        if SPLIT:
            owned = ownership(experts, tl.load(expert_ids_ptr + 2 * (segment // pieces)), 1.0 / EXPERTS)
            total += owned[:, None] * sums[None, :]
        else:
            total += sums[None, :]
    tile = experts[:, None] * COLUMNS + columns[None, :]
    tl.store(grad_bias_ptr + tile, total * scale, mask=(experts < EXPERTS)[:, None] & (columns < COLUMNS)[None, :])


@triton.jit(do_not_specialize=["segments", "pieces"])
def sum_segments_kernel(
    up_sums_ptr,
    down_sums_ptr,
    experts_ptr,
    scale_tensor_ptr,
    grad_up_bias_ptr,
    grad_down_bias_ptr,
    segments,
    pieces,
    scale,
    WIDTH: tl.constexpr,
    BOTTLENECK: tl.constexpr,
    DOWN_EXPERTS: tl.constexpr,
    UP_EXPERTS: tl.constexpr,
    UP_SPLIT: tl.constexpr,
    DOWN_SPLIT: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Stage 2 of the biases: programs for blocks of D, then of r.

    grad_up_bias: `[E, D]`, grad_down_bias: `[E, r]`. Reads segments * (D + r) * 4 bytes.
    """
    UP_BLOCKS: tl.constexpr = triton.cdiv(WIDTH, BLOCK_COLUMNS)
    block = tl.program_id(0)
    if scale_tensor_ptr is not None:
        scale = tl.load(scale_tensor_ptr).to(tl.float32)
    if block < UP_BLOCKS:
        _bias_rows(
            up_sums_ptr, experts_ptr + 1, grad_up_bias_ptr, block, segments, pieces, scale,
            WIDTH, UP_EXPERTS, UP_SPLIT, BLOCK_COLUMNS,
        )  # fmt: skip
    else:
        _bias_rows(
            down_sums_ptr, experts_ptr, grad_down_bias_ptr, block - UP_BLOCKS, segments, pieces, 1.0,
            BOTTLENECK, DOWN_EXPERTS, DOWN_SPLIT, BLOCK_COLUMNS,
        )  # fmt: skip
