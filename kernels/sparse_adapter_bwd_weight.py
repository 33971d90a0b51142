"""Backward of the sparse adapter towards its weights: a reduction over all tokens, in two deterministic stages.

With h, t and y from sparse_adapter_bwd_input.py, x^ = (x - mean) rstd (x itself without a norm), and Q = t^T x^:

    dU = scale * [owned by u] * (y^T h)                     [D, r]
    dW = [owned by d] * (Q diag(g) + (sum t) b^T)           [r, D]  since t^T (x^ g + b) = t^T n
    dg = column sums of W_down[d] * Q                       [D]     since dn / g = t W
    db = (sum t) W_down[d]                                  [D]
    db_up[u] = scale * sum y,   db_down[d] = sum t          [D], [r]

so the norm's gradients too come from Q, and x and y are read once. [owned] is 1 where the expert owns the weight (1 / E
everywhere for merged), 0 elsewhere: the zeros are written by the kernel. sum y is y^T 1, a product as that with h, and
so of a y that is rounded as for it: read into registers besides, y would have its place in the pipeline refilled too
soon. sum t comes from the kernel towards the input, as sums over its blocks of rows.

x in bfloat16, in which the products are, is multiplied as it lies in memory, so that no load passes through registers
and all are asynchronous copies: with t' = rstd t and c = sum of t' mean over the rows, both from the kernel towards the
input,

    Q = t'^T x - c 1^T

which is exact but for float32 sums: t' is the rounded one in both terms, and products of 16-bit numbers are exact in
float32. Over n rows the terms that cancel are about sqrt(n) |t'| |mean|, what is left about sqrt(n) |t'| / rstd: the
relative error is at most about n / 16 times 2^-23 |mean| rstd (tensor cores add 16 rows at a time and may cut off where
they should round), that is 2^-9, one rounding to bfloat16, at n = 2,304 and a mean of 100 standard deviations. x in
float32 would be rounded first: there x^ is made in float32, then rounded, and multiplied with t.

Stage 1: the tokens are cut into segments, each inside one group; a program owns some consecutive segments and a block
of columns, keeps y^T h and Q for one segment in registers, and adds what its group owns to its own slice of `partial`,
so memory does not grow with V. Stage 2 sums the slices in a fixed order (reductions.py). No atomics: equal input gives
equal bits.

Bytes, for M rows, s bytes an element, S slices: read y: M D s, x: M D s, h and t: 2 M r s (again from the L2 cache by
every column block), sums over blocks of B rows: 8 r M / B; write and read `partial`:
2 * S * (2 D r + 2 D + E (D + r)) * 4. S is chosen so that one wave of programs fills the chip: S * D / BLOCK_COLUMNS
programs, that is about 16 * multiprocessors * BLOCK_COLUMNS * r bytes of partial sums however many tokens there are
(9 MB written and read on 132 multiprocessors at r = 64, BLOCK_COLUMNS = 64).
"""

from __future__ import annotations

import triton
import triton.language as tl

from mosa_fast.kernels.device_functions import load_tile, mask_if, ownership, weight_tile
from mosa_fast.kernels.reductions import sum_rows

FEWEST_COLUMNS = tl.constexpr(16)  # of a product
BLOCKS_AT_ONCE = tl.constexpr(16)  # of sums over blocks of rows


@triton.jit
def _add_bias(
    bias_pointers, sums, valid, later, group_expert, stride,
    EXPERTS: tl.constexpr, SPLIT: tl.constexpr, ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Add what each expert owns of a bias's gradient to its row of a slice, stored first and added to later."""
    for expert in range(EXPERTS):
        owned = sums
        if SPLIT:
            owned = sums * ownership(tl.full((1,), expert, tl.int32), group_expert, 1.0 / EXPERTS)
        if ACCUMULATE:
            owned += tl.load(bias_pointers, mask=mask_if(valid, later), other=0.0)
        tl.store(bias_pointers, owned, mask=valid)
        bias_pointers += stride


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
    rank_sums_ptr,
    partial_ptr,
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
    DOWN_SPLIT: tl.constexpr,
    UP_SPLIT: tl.constexpr,
    SUMMED_ROWS: tl.constexpr,
    FORK: tl.constexpr,
    RAW_INPUT: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_BOTTLENECK: tl.constexpr,
):
    """One program: one slice and BLOCK_COLUMNS columns, BLOCK_ROWS tokens at a time.

    Segment i is piece i % pieces, of piece_rows rows, of group i // pieces. ACCUMULATE: a slice may have several.
    rank_sums: float32 `[B, 2, r]`, sums over each block of SUMMED_ROWS rows of a group (a piece is a whole number of
    them), of t and of t' mean. RAW_INPUT: grad_pre is t', and x is multiplied as it is.
    partial: float32 `[S, 2 D r + 2 D + E (D + r)]`: dU, dW, with a norm dg and db, then db_up and db_down.
    """
    COLUMN_BLOCKS: tl.constexpr = triton.cdiv(WIDTH, BLOCK_COLUMNS)
    EVEN_COLUMNS: tl.constexpr = WIDTH % BLOCK_COLUMNS == 0
    EVEN_WEIGHTS: tl.constexpr = EVEN_COLUMNS and BOTTLENECK == BLOCK_BOTTLENECK
    # An x that is normalised in registers meets barriers, by which Triton takes all warps to be done with y. A product
    # of wgmma (64 columns and more) may still run then, and the next y's copies overwrite what it reads. With a reader
    # of y after those barriers, copies get a barrier of their own. Elsewhere products take fewer registers before.
    SUMS_LAST: tl.constexpr = norm_weight_ptr is not None and not RAW_INPUT and BLOCK_COLUMNS >= 64
    NORM_WEIGHTS: tl.constexpr = 2 * WIDTH if norm_weight_ptr is not None else 0
    BIASES: tl.constexpr = UP_EXPERTS * WIDTH + DOWN_EXPERTS * BOTTLENECK
    PARTIAL: tl.constexpr = 2 * WIDTH * BOTTLENECK + NORM_WEIGHTS + BIASES
    slice_index = tl.program_id(0) // COLUMN_BLOCKS
    column_block = tl.program_id(0) % COLUMN_BLOCKS
    if scale_tensor_ptr is not None:
        scale = tl.load(scale_tensor_ptr).to(tl.float32)
    up_partial = partial_ptr + slice_index.to(tl.int64) * PARTIAL
    down_partial = up_partial + WIDTH * BOTTLENECK
    norm_partial = up_partial + 2 * WIDTH * BOTTLENECK
    up_bias_partial = norm_partial + NORM_WEIGHTS
    down_bias_partial = up_bias_partial + UP_EXPERTS * WIDTH
    blocks_per_group = tl.cdiv(rows_per_group, SUMMED_ROWS)

    first = slice_index * segments_per_slice
    segments_here = tl.minimum(segments_per_slice, groups * pieces - first) if ACCUMULATE else 1
    for index in range(segments_here):
        segment = first + index
        # Zero, but the compiler takes it for a new number in every segment. Else it would make all tiles' addresses
        # before the loop, and keep them in registers that the products need.
        zero = segment // (groups * pieces)
        columns = (column_block + zero) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        column_valid = columns < WIDTH
        ranks = tl.arange(0, BLOCK_BOTTLENECK)
        rank_valid = ranks < BOTTLENECK
        up_offsets = columns[:, None] * BOTTLENECK + ranks[None, :]
        up_valid = column_valid[:, None] & rank_valid[None, :]
        down_offsets = (ranks + zero)[:, None] * WIDTH + columns[None, :]
        down_valid = rank_valid[:, None] & column_valid[None, :]
        group = segment // pieces
        start_row = (segment % pieces) * piece_rows
        end_row = tl.minimum(start_row + piece_rows, rows_per_group)
        out_start = group.to(tl.int64) * rows_per_group
        in_start = out_start * 0 if FORK else out_start

        down_expert = tl.load(experts_ptr + 2 * group)
        up_expert = tl.load(experts_ptr + 2 * group + 1)

        up = tl.zeros([BLOCK_COLUMNS, BLOCK_BOTTLENECK], tl.float32)  # y^T h
        down = tl.zeros([BLOCK_COLUMNS, BLOCK_BOTTLENECK], tl.float32)  # Q^T
        sums = tl.zeros([BLOCK_COLUMNS, FEWEST_COLUMNS], tl.float32)  # y^T 1 in every column
        ones = tl.full([BLOCK_ROWS, FEWEST_COLUMNS], 1.0, PRODUCT)
        for block_row in range(start_row, end_row, BLOCK_ROWS):
            rows = block_row + tl.arange(0, BLOCK_ROWS)
            row_valid = rows < end_row
            # Rows past the end are zero in y, h and t; of x they repeat the last row, for t to cancel.
            inside = tl.minimum(rows, end_row - 1)
            in_rows = in_start + inside
            grad_tile = grad_out_ptr + (out_start + inside)[:, None] * WIDTH + columns[None, :]
            grad = tl.load(grad_tile, mask=row_valid[:, None] & column_valid[None, :], other=0.0)
            x_tile = x_ptr + in_rows[:, None] * WIDTH + columns[None, :]
            x = load_tile(x_tile, column_valid[None, :], EVEN_COLUMNS)
            if norm_weight_ptr is not None and not RAW_INPUT:
                mean = tl.load(stats_ptr + in_rows * 2)
                rstd = tl.load(stats_ptr + in_rows * 2 + 1)
                x = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
            rank_tile = (out_start + rows)[:, None] * BOTTLENECK + ranks[None, :]
            rank_tile_valid = row_valid[:, None] & rank_valid[None, :]
            hidden = tl.load(hidden_ptr + rank_tile, mask=rank_tile_valid, other=0.0)
            grad_pre = tl.load(grad_pre_ptr + rank_tile, mask=rank_tile_valid, other=0.0)
            grad = tl.trans(grad.to(PRODUCT))
            up = tl.dot(grad, hidden, up, input_precision=PRECISION)
            if not SUMS_LAST:
                sums = tl.dot(grad, ones, sums, input_precision=PRECISION)
            down = tl.dot(tl.trans(x.to(PRODUCT)), grad_pre, down, input_precision=PRECISION)
            if SUMS_LAST:
                sums = tl.dot(grad, ones, sums, input_precision=PRECISION)

        first_block = group * blocks_per_group + start_row // SUMMED_ROWS
        last_block = group * blocks_per_group + tl.cdiv(end_row, SUMMED_ROWS)
        grad_sums = tl.sum(tl.where(tl.arange(0, FEWEST_COLUMNS)[None, :] == 0, sums, 0.0), axis=1)
        grad_bias = sum_rows(
            rank_sums_ptr, first_block, last_block, ranks, rank_valid, 2 * BOTTLENECK, BLOCKS_AT_ONCE
        )  # sum t

        # What this segment's group owns of its products goes to the slice: stored first, added to later.
        later = index > 0
        if ACCUMULATE:
            tl.debug_barrier()  # what another thread stored for the segment before is read below
        _add_bias(
            up_bias_partial + columns, grad_sums * scale, column_valid, later,
            up_expert, WIDTH, UP_EXPERTS, UP_SPLIT, ACCUMULATE,
        )  # fmt: skip
        _add_bias(
            down_bias_partial + ranks, grad_bias, mask_if(rank_valid, column_block == 0), later,
            down_expert, BOTTLENECK, DOWN_EXPERTS, DOWN_SPLIT, ACCUMULATE,
        )  # fmt: skip
        up *= scale
        if up_owner_ptr is not None:
            owner = load_tile(up_owner_ptr + up_offsets, up_valid, EVEN_WEIGHTS)
            up *= ownership(owner, up_expert, 1.0 / UP_EXPERTS)
        if ACCUMULATE:
            up += tl.load(up_partial + up_offsets, mask=mask_if(up_valid, later), other=0.0)
        tl.store(up_partial + up_offsets, up, mask=up_valid)

        product = tl.trans(down)  # Q
        if RAW_INPUT:
            mean_sums = sum_rows(
                rank_sums_ptr + BOTTLENECK, first_block, last_block, ranks, rank_valid, 2 * BOTTLENECK, BLOCKS_AT_ONCE
            )
            product -= mean_sums[:, None]
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
