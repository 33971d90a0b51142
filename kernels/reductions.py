"""Second stage of the gradients of weights, biases and scale: sums over the first stage's programs, in a fixed order.

No atomics: equal input gives equal bits. Bytes: the partial sums are read once, 4 bytes an element, and the gradients
written once. One launch a layer.
"""

from __future__ import annotations

import triton
import triton.language as tl

PROGRAMS_AT_ONCE = tl.constexpr(32)


@triton.jit
def sum_rows(sums_ptr, first, last, columns, valid, STRIDE: tl.constexpr, AT_ONCE: tl.constexpr):
    """The sum of rows first to last - 1 of float32 `[., STRIDE]`, at some columns; AT_ONCE rows are read at a time."""
    total = tl.zeros([columns.shape[0]], tl.float32)
    for start in range(first, last, AT_ONCE):
        rows = start + tl.arange(0, AT_ONCE)
        tile = rows.to(tl.int64)[:, None] * STRIDE + columns[None, :]
        tile_valid = (rows < last)[:, None] & valid[None, :]
        total += tl.sum(tl.load(sums_ptr + tile, mask=tile_valid, other=0.0), axis=0)
    return total


@triton.jit
def _store_part(part_ptr, sums, offsets, LENGTH: tl.constexpr):
    """Store those sums whose offsets lie in a part of this length; return their offsets from the part's end."""
    if part_ptr is not None:
        tl.store(part_ptr + offsets, sums, mask=(offsets >= 0) & (offsets < LENGTH))
    return offsets - LENGTH


@triton.jit(do_not_specialize=["slices", "programs"])
def sum_slices_kernel(
    partial_ptr,
    scale_partial_ptr,
    grad_up_weight_ptr,
    grad_down_weight_ptr,
    grad_norm_weight_ptr,
    grad_norm_bias_ptr,
    grad_up_bias_ptr,
    grad_down_bias_ptr,
    grad_scale_tensor_ptr,
    slices,
    programs,
    UP_WEIGHTS: tl.constexpr,
    DOWN_WEIGHTS: tl.constexpr,
    NORM_WEIGHTS: tl.constexpr,
    UP_BIASES: tl.constexpr,
    DOWN_BIASES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Programs for blocks of the weights, and one more for the scale where its gradient is wanted.

    partial: float32 `[S, up + down + 2 norm weights + up + down biases]`, a row for each of S slices. A part that the
    operator does not have has no elements, and its gradients are None. scale_partial: one float32 for each of
    `programs`.
    """
    PARTIAL: tl.constexpr = UP_WEIGHTS + DOWN_WEIGHTS + 2 * NORM_WEIGHTS + UP_BIASES + DOWN_BIASES
    block = tl.program_id(0)
    if block < (PARTIAL + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS:
        offsets = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        sums = sum_rows(partial_ptr, 0, slices, offsets, offsets < PARTIAL, PARTIAL, BLOCK_ROWS)
        offsets = _store_part(grad_up_weight_ptr, sums, offsets, UP_WEIGHTS)
        offsets = _store_part(grad_down_weight_ptr, sums, offsets, DOWN_WEIGHTS)
        offsets = _store_part(grad_norm_weight_ptr, sums, offsets, NORM_WEIGHTS)
        offsets = _store_part(grad_norm_bias_ptr, sums, offsets, NORM_WEIGHTS)
        offsets = _store_part(grad_up_bias_ptr, sums, offsets, UP_BIASES)
        _store_part(grad_down_bias_ptr, sums, offsets, DOWN_BIASES)
    elif grad_scale_tensor_ptr is not None:
        index = tl.arange(0, PROGRAMS_AT_ONCE)
        total = tl.zeros([PROGRAMS_AT_ONCE], tl.float32)
        for start in range(0, programs, PROGRAMS_AT_ONCE):
            total += tl.load(scale_partial_ptr + start + index, mask=start + index < programs, other=0.0)
        tl.store(grad_scale_tensor_ptr, tl.sum(total, axis=0))
