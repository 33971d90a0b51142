"""Second stages of the weights' and the scale's gradients: sums over the first stage's programs, in a fixed order.

No atomics: equal input gives equal bits. Bytes: the partial sums are read once, 4 bytes an element, and the gradients
written once.
"""

from __future__ import annotations

import triton
import triton.language as tl

PROGRAMS_AT_ONCE = tl.constexpr(32)


@triton.jit(do_not_specialize=["slices", "programs"])
def sum_slices_kernel(
    partial_ptr,
    scale_partial_ptr,
    grad_up_weight_ptr,
    grad_down_weight_ptr,
    grad_norm_weight_ptr,
    grad_norm_bias_ptr,
    grad_scale_tensor_ptr,
    slices,
    programs,
    UP_WEIGHTS: tl.constexpr,
    DOWN_WEIGHTS: tl.constexpr,
    NORM_WEIGHTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Programs for blocks of the weights, and one more for the scale where its gradient is wanted.

    partial: float32 `[S, up + down + 2 norm weights]`, a row for each of S slices. NORM_WEIGHTS is 0, and the norm's
    gradients are None, where there is no norm. scale_partial: one float32 for each of `programs`.
    """
    PARTIAL: tl.constexpr = UP_WEIGHTS + DOWN_WEIGHTS + 2 * NORM_WEIGHTS
    block = tl.program_id(0)
    if block < (PARTIAL + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS:
        offsets = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        valid = offsets < PARTIAL
        sums = tl.zeros([BLOCK_COLUMNS], tl.float32)
        for start in range(0, slices, BLOCK_ROWS):
            index = start + tl.arange(0, BLOCK_ROWS)
            tile = index.to(tl.int64)[:, None] * PARTIAL + offsets[None, :]
            tile_valid = (index < slices)[:, None] & valid[None, :]
            sums += tl.sum(tl.load(partial_ptr + tile, mask=tile_valid, other=0.0), axis=0)
        tl.store(grad_up_weight_ptr + offsets, sums, mask=offsets < UP_WEIGHTS)
        offsets -= UP_WEIGHTS
        tl.store(grad_down_weight_ptr + offsets, sums, mask=(offsets >= 0) & (offsets < DOWN_WEIGHTS))
        if grad_norm_weight_ptr is not None:
            offsets -= DOWN_WEIGHTS
            tl.store(grad_norm_weight_ptr + offsets, sums, mask=(offsets >= 0) & (offsets < NORM_WEIGHTS))
            offsets -= NORM_WEIGHTS
            tl.store(grad_norm_bias_ptr + offsets, sums, mask=(offsets >= 0) & (offsets < NORM_WEIGHTS))
    elif grad_scale_tensor_ptr is not None:
        index = tl.arange(0, PROGRAMS_AT_ONCE)
        total = tl.zeros([PROGRAMS_AT_ONCE], tl.float32)
        for start in range(0, programs, PROGRAMS_AT_ONCE):
            total += tl.load(scale_partial_ptr + start + index, mask=start + index < programs, other=0.0)
        tl.store(grad_scale_tensor_ptr, tl.sum(total, axis=0))
