"""Backward of the sparse adapter towards its input, row by row.

With the notation of sparse_adapter_fwd.py, y = dL/d(out), x^ = (x - mean) rstd, and k the dropout factor of h:

    a  = y U                                                [r]     unscaled gradient of h
    t  = scale * a * k * act'(p + e)                        [r]     gradient of p, and of e
    dn = t W diag(g)                                        [D]     gradient of x^
    dx = rstd (dn - mean(dn) - x^ mean(dn * x^)) + (y if x is added)

The two means of the norm's backward need no pass over D, since dn lies in the span of W diag(g)'s rows:

    mean(dn)      = t . w / D        (w: row sums of W diag(g), prepared)
    mean(dn * x^) = t . p / D        (x^ (W diag(g))^T = p)

so x is read once, when dx is written. Likewise the scale's gradient, sum(y * (h U^T + b_up)) = sum(h . a + y . b_up).
A fork sums the groups' dx in the same program; y is then read V times.

Written besides, for the weight gradients (sparse_adapter_bwd_weight.py): h (after dropout) and t, r wide, in the
product dtype; and of this program's rows of each group the sums of t and of t' mean. Where x is normalised and in
bfloat16, as the products are, t' = rstd t is written in place of t, to be multiplied with x as it lies in memory.
The skip's gradient is y: autograd hands it on as it is, unless the skip has another dtype than the output (a branch in
half precision beside timm's float32 residual stream), or groups are to be summed. Then it is written here, where y is
in hand, and the weight gradients read this narrower y if it has the products' dtype.

Bytes, for M rows, s bytes an element, B rows a program: read y: M D s (again from the L2 cache in the second pass,
and once more where the scale is trained), x: M D s, p: M r s; write dx: M D s, the skip's gradient where it is wanted,
h and t: 2 M r s, sums: 8 r M / B.
Weights as in the forward, and the same ones: each layer's are kept for its backward.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mosa_fast.kernels.device_functions import (
    READ_AGAIN,
    activate,
    activation_derivative,
    dropout_factor,
    load_tile,
    slot_of,
)


@triton.jit
def backward_hidden(
    grad_out_ptr,
    up_ranks,
    up_bias_ptr,
    bias,
    seed_ptr,
    pre_ptr,
    mean,
    rstd,
    hidden_ptr,
    grad_pre_ptr,
    rank_sums_ptr,
    group,
    rows,
    row_valid,
    out_rows,
    scale,
    tokens,
    dropout_threshold,
    dropout_scale,
    SCALE_GRAD: tl.constexpr,
    RAW_INPUT: tl.constexpr,
    WIDTH: tl.constexpr,
    BOTTLENECK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FIRST_SAMPLE: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_BOTTLENECK: tl.constexpr,
):
    """For one group's rows write h, t and t's sums; each row's part of the scale's gradient is returned with t.

    up_ranks: pointers `[1, BLOCK_BOTTLENECK]` to the first row of the group's prepared up-weights. bias: e.
    mean, rstd: of the rows of x, None without a norm.
    rank_sums_ptr: where the sums of t, and after them those of t' mean, go; None: nowhere.

    Returns:
        t in float32, t (or t') as written, p in float32, parts of the scale's gradient.
    """
    EVEN_COLUMNS: tl.constexpr = WIDTH % BLOCK_COLUMNS == 0
    ranks = tl.arange(0, BLOCK_BOTTLENECK)
    rank_valid = ranks < BOTTLENECK
    tile = out_rows[:, None] * BOTTLENECK + ranks[None, :]
    tile_valid = row_valid[:, None] & rank_valid[None, :]
    pre = tl.load(pre_ptr + tile, mask=tile_valid, other=0.0)  # on its way while y is multiplied
    grad_rows = grad_out_ptr + out_rows[:, None] * WIDTH
    scale_rows = tl.zeros([BLOCK_ROWS], tl.float32)
    if SCALE_GRAD:
        # In a loop of its own: if the product's y were read into registers as well, Triton would have it overwritten
        # while tensor cores still read it.
        for start in range(0, WIDTH, BLOCK_COLUMNS):
            columns = start + tl.arange(0, BLOCK_COLUMNS)
            grad = load_tile(grad_rows + columns[None, :], (columns < WIDTH)[None, :], EVEN_COLUMNS, READ_AGAIN)
            up_bias = tl.load(up_bias_ptr + columns)
            scale_rows += tl.sum(grad.to(tl.float32) * up_bias[None, :], axis=1)
    grad_hidden = tl.zeros([BLOCK_ROWS, BLOCK_BOTTLENECK], tl.float32)  # a
    for start in range(0, WIDTH, BLOCK_COLUMNS):
        columns = start + tl.arange(0, BLOCK_COLUMNS)
        column_valid = columns < WIDTH
        # Kept in L2 for the second pass.
        grad = load_tile(grad_rows + columns[None, :], column_valid[None, :], EVEN_COLUMNS, READ_AGAIN)
        weight = tl.load(up_ranks + columns[:, None] * BLOCK_BOTTLENECK)
        grad_hidden = tl.dot(grad.to(PRODUCT), weight, grad_hidden, input_precision=PRECISION)

    pre = pre.to(tl.float32)
    z = pre + bias[None, :]
    hidden = activate(z, ACTIVATION)
    slope = activation_derivative(z, ACTIVATION)
    if seed_ptr is not None:
        keep = dropout_factor(
            seed_ptr, group, rows, tokens, dropout_threshold, dropout_scale, FIRST_SAMPLE, BLOCK_BOTTLENECK
        )
        hidden *= keep
        slope *= keep
    if SCALE_GRAD:
        scale_rows = tl.where(row_valid, scale_rows + tl.sum(hidden * grad_hidden, axis=1), 0.0)
    grad_pre = scale * grad_hidden * slope
    tl.store(hidden_ptr + tile, hidden.to(PRODUCT), mask=tile_valid)
    written = (grad_pre * rstd[:, None] if RAW_INPUT else grad_pre).to(PRODUCT)
    tl.store(grad_pre_ptr + tile, written, mask=tile_valid)
    if rank_sums_ptr is not None:
        grad_pre_sums = tl.sum(tl.where(row_valid[:, None], grad_pre, 0.0), axis=0)
        tl.store(rank_sums_ptr + ranks, grad_pre_sums, mask=rank_valid)
        if RAW_INPUT:  # of t' as it was rounded: so much of the mean is in the product with x
            mean_sums = tl.sum(written.to(tl.float32) * tl.where(row_valid, mean, 0.0)[:, None], axis=0)
            tl.store(rank_sums_ptr + BOTTLENECK + ranks, mean_sums, mask=rank_valid)
    return grad_pre, written, pre, scale_rows


@triton.jit(do_not_specialize=["rows_per_group", "tokens", "groups", "dropout_threshold"])
def sparse_adapter_bwd_input_kernel(
    grad_out_ptr,
    x_ptr,
    experts_ptr,
    scale_tensor_ptr,
    seed_ptr,
    prepared_down_ptr,
    prepared_up_ptr,
    prepared_vectors_ptr,
    prepared_up_bias_ptr,
    stats_ptr,
    pre_ptr,
    grad_x_ptr,
    grad_skip_ptr,
    hidden_ptr,
    grad_pre_ptr,
    scale_partial_ptr,
    rank_sums_ptr,
    rows_per_group,
    tokens,
    groups,
    scale,
    dropout_threshold,
    dropout_scale,
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
    RAW_INPUT: tl.constexpr,
    FIRST_SAMPLE: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_BOTTLENECK: tl.constexpr,
):
    """One program: BLOCK_ROWS rows of x, with all the groups that read them (one, unless forked).

    grad_skip_ptr, grad_x_ptr: None where they are not to be written. scale_partial_ptr: float32, one number a program.
    rank_sums: float32 `[B, 2, r]`, for each of B blocks of rows, group after group, the sums of t and of t' mean; None
    where no weight needs a gradient. RAW_INPUT: t' is written in place of t.
    """
    EVEN_COLUMNS: tl.constexpr = WIDTH % BLOCK_COLUMNS == 0
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
    ranks = tl.arange(0, BLOCK_BOTTLENECK)
    rank_valid = ranks < BOTTLENECK
    if scale_tensor_ptr is not None:
        scale = tl.load(scale_tensor_ptr).to(tl.float32)
    mean = tl.load(stats_ptr + in_rows * 2) if NORM else None
    rstd = tl.load(stats_ptr + in_rows * 2 + 1) if NORM else None

    grad_mean = tl.zeros([BLOCK_ROWS], tl.float32)  # mean(dn)
    grad_product_mean = tl.zeros([BLOCK_ROWS], tl.float32)  # mean(dn * x^)
    scale_rows = tl.zeros([BLOCK_ROWS], tl.float32)
    grad_pre_tile = tl.zeros([BLOCK_ROWS, BLOCK_BOTTLENECK], PRODUCT)
    blocks = tl.cdiv(rows_per_group, BLOCK_ROWS)
    for index in range(groups_here):
        group = first_group + index
        up_slot = slot_of(experts_ptr, group, 1, UP_EXPERTS, UP_SPLIT, BY_EXPERT)
        down_slot = slot_of(experts_ptr, group, 0, DOWN_EXPERTS, DOWN_SPLIT, BY_EXPERT)
        vectors = prepared_vectors_ptr + down_slot * (2 * BLOCK_BOTTLENECK) + ranks
        if rank_sums_ptr is not None:
            block_rank_sums = rank_sums_ptr + (group * blocks + block).to(tl.int64) * (2 * BOTTLENECK)
        else:
            block_rank_sums = None
        if NORM:
            weight_sums = tl.load(vectors + BLOCK_BOTTLENECK)
        grad_pre, grad_pre_tile, pre, scale_part = backward_hidden(
            grad_out_ptr,
            prepared_up_ptr + up_slot * (PADDED_WIDTH * BLOCK_BOTTLENECK) + ranks[None, :],
            prepared_up_bias_ptr + up_slot * PADDED_WIDTH,
            tl.load(vectors),
            seed_ptr,
            pre_ptr,
            mean,
            rstd,
            hidden_ptr,
            grad_pre_ptr,
            block_rank_sums,
            group,
            rows,
            row_valid,
            group.to(tl.int64) * rows_per_group + rows,
            scale,
            tokens,
            dropout_threshold,
            dropout_scale,
            scale_partial_ptr is not None,
            RAW_INPUT,
            WIDTH,
            BOTTLENECK,
            ACTIVATION,
            FIRST_SAMPLE,
            PRODUCT,
            PRECISION,
            BLOCK_ROWS,
            BLOCK_COLUMNS,
            BLOCK_BOTTLENECK,
        )
        scale_rows += scale_part
        if NORM:
            grad_mean += tl.sum(grad_pre * weight_sums[None, :], axis=1) / WIDTH
            grad_product_mean += tl.sum(grad_pre * pre, axis=1) / WIDTH
    if scale_partial_ptr is not None:
        tl.store(scale_partial_ptr + tl.program_id(0), tl.sum(scale_rows, axis=0))

    if grad_x_ptr is not None or grad_skip_ptr is not None:
        if NORM:
            grad_mean *= rstd
            grad_product_mean *= rstd * rstd
        if FORK:
            tl.debug_barrier()  # the groups' t, written above, are read again below by other threads
        # What one group alone reads is read one block ahead, so that memory is busy during this block's product.
        NEED_X: tl.constexpr = NORM and grad_x_ptr is not None
        NEED_DIRECT: tl.constexpr = ADD_INPUT or grad_skip_ptr is not None
        x_rows = x_ptr + in_rows[:, None] * WIDTH
        columns = tl.arange(0, BLOCK_COLUMNS)
        if NEED_X:
            next_x = load_tile(x_rows + columns[None, :], columns[None, :] < WIDTH, EVEN_COLUMNS)
        if NEED_DIRECT and not FORK:
            grad_rows = grad_out_ptr + in_rows[:, None] * WIDTH
            next_grad = load_tile(grad_rows + columns[None, :], columns[None, :] < WIDTH, EVEN_COLUMNS)
        for start in range(0, WIDTH, BLOCK_COLUMNS):
            columns = start + tl.arange(0, BLOCK_COLUMNS)
            column_valid = columns < WIDTH
            ahead = (columns + BLOCK_COLUMNS)[None, :]
            tile = in_rows[:, None] * WIDTH + columns[None, :]
            tile_valid = row_valid[:, None] & column_valid[None, :]
            if NEED_X:
                x = next_x
                next_x = load_tile(x_rows + ahead, ahead < WIDTH, False)
            if NEED_DIRECT:
                if FORK:
                    direct = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)  # sum of y over the groups
                else:
                    direct = next_grad
                    next_grad = load_tile(grad_rows + ahead, ahead < WIDTH, False)
            grad_normed = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)  # dn
            for index in range(groups_here):
                group = first_group + index
                if FORK:
                    out_rows = group.to(tl.int64) * rows_per_group + rows
                    if NEED_DIRECT:
                        grad_tile = grad_out_ptr + out_rows[:, None] * WIDTH + columns[None, :]
                        direct += load_tile(grad_tile, column_valid[None, :], EVEN_COLUMNS).to(tl.float32)
                    grad_pre_rows = grad_pre_ptr + out_rows[:, None] * BOTTLENECK + ranks[None, :]
                    grad_pre_tile = tl.load(grad_pre_rows, mask=rank_valid[None, :], other=0.0)
                if grad_x_ptr is not None:
                    down_slot = slot_of(experts_ptr, group, 0, DOWN_EXPERTS, DOWN_SPLIT, BY_EXPERT)
                    down_tile = prepared_down_ptr + down_slot * (BLOCK_BOTTLENECK * PADDED_WIDTH)
                    weight = tl.load(down_tile + ranks[:, None] * PADDED_WIDTH + columns[None, :])
                    grad_normed = tl.dot(grad_pre_tile, weight, grad_normed, input_precision=PRECISION)
            if grad_skip_ptr is not None:
                tl.store(grad_skip_ptr + tile, direct.to(grad_skip_ptr.dtype.element_ty), mask=tile_valid)
            if grad_x_ptr is not None:
                grad_x = grad_normed
                if NORM:
                    if not RAW_INPUT:  # else t' has it
                        grad_x *= rstd[:, None]
                    centred = x.to(tl.float32) - mean[:, None]
                    grad_x = grad_x - grad_mean[:, None] - centred * grad_product_mean[:, None]
                if ADD_INPUT:
                    grad_x += direct.to(tl.float32)
                tl.store(grad_x_ptr + tile, grad_x.to(grad_x_ptr.dtype.element_ty), mask=tile_valid)
