"""Launches the backward of the sparse adapter: towards the input (rows), then towards the weights (two stages).

In all, for M rows of D elements of s bytes: 5 M D s (y and x twice, dx once) where the design's least is 3 M D s; the
second reading is the price of deterministic weight gradients, whose sums over all tokens do not fit on the chip beside
the row-wise pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from mosa_fast.kernels import launching, tuning
from mosa_fast.kernels.problem import Problem
from mosa_fast.kernels.sparse_adapter_bwd_input import sparse_adapter_bwd_input_kernel
from mosa_fast.kernels.sparse_adapter_bwd_weight import (
    sparse_adapter_bwd_weight_kernel,
    sum_segments_kernel,
    sum_slices_kernel,
)

SUM_TILE = tuning.Tile(rows=16, columns=128)  # stage 2: 16 independent loads in flight for each thread
BIAS_TILE = tuning.Tile(rows=1, columns=32)  # narrow: the tile has a row for every expert, up to 255
INTERPRETER_PROGRAMS = 4  # stands in for the number of multiprocessors where there is no GPU


@dataclass(frozen=True)
class Gradients:
    """Each None where it was not asked for; weights in their own dtypes, x and skip in theirs."""

    x: Tensor | None = None
    skip: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    down_weight: Tensor | None = None
    down_bias: Tensor | None = None
    up_weight: Tensor | None = None
    up_bias: Tensor | None = None
    scale: Tensor | None = None


@dataclass(frozen=True)
class Split:
    """How stage 1 cuts the tokens: `pieces` segments of `piece_rows` rows in each group, in `slices` slices."""

    pieces: int
    piece_rows: int
    segments_per_slice: int
    slices: int


def sparse_adapter_bwd(
    problem: Problem,
    grad_out: Tensor,
    stats: Tensor,
    pre: Tensor,
    vectors: Tensor,
    *,
    need_x: bool,
    skip_dtype: torch.dtype | None,
    need_parameters: bool,
    need_scale: bool,
) -> Gradients:
    """Run the backward.

    Args:
        problem: the forward's.
        grad_out: contiguous `[M, D]`.
        stats, pre, vectors: what the forward saved.
        need_x: give x's gradient. need_parameters: give those of all weights and biases. need_scale: the scale's.
        skip_dtype: give a forked skip's gradient in this dtype; None: do not (an unforked skip's is grad_out).
    """
    p = problem
    device = p.x.device

    def like(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else launching.empty(tuple(tensor.shape), tensor.dtype, device)

    parameters = ("norm_weight", "norm_bias", "down_weight", "down_bias", "up_weight", "up_bias")
    gradients = Gradients(
        x=like(p.x) if need_x else None,
        skip=None if skip_dtype is None else launching.empty(tuple(p.x.shape), skip_dtype, device),
        scale=like(p.scale_tensor) if need_scale else None,
        **{name: like(getattr(p, name)) for name in parameters if need_parameters},
    )
    if not p.out_rows:
        for gradient in vars(gradients).values():
            if gradient is not None:
                gradient.zero_()
        return gradients

    hidden = launching.empty((p.out_rows, p.bottleneck), p.product_dtype, device)
    grad_pre = launching.empty((p.out_rows, p.bottleneck), p.product_dtype, device)
    scale_partial = _input_gradients(p, grad_out, stats, pre, vectors, hidden, grad_pre, gradients)
    if need_parameters or need_scale:
        _parameter_gradients(p, grad_out, stats, hidden, grad_pre, scale_partial, gradients)
    return gradients


def _input_gradients(
    p: Problem,
    grad_out: Tensor,
    stats: Tensor,
    pre: Tensor,
    vectors: Tensor,
    hidden: Tensor,
    grad_pre: Tensor,
    gradients: Gradients,
) -> Tensor | None:
    """Fill x's and a forked skip's gradients, `hidden` and `grad_pre`; return the programs' sums for the scale."""

    def programs(tile: tuning.Tile) -> int:
        return triton.cdiv(p.rows_per_group, tile.rows) * (1 if p.fork else p.groups)

    def partial(tile: tuning.Tile) -> Tensor | None:
        return None if gradients.scale is None else launching.empty((programs(tile),), torch.float32, p.x.device)

    def run(tile: tuning.Tile, scale_partial: Tensor | None = None) -> None:
        launching.launch(
            sparse_adapter_bwd_input_kernel,
            (programs(tile),),
            tile,
            **p.arguments(),
            grad_ptr=grad_out,
            stats_ptr=stats if stats.numel() else None,
            pre_ptr=pre,
            vectors_ptr=vectors,
            grad_x_ptr=gradients.x,
            grad_skip_ptr=gradients.skip,
            hidden_ptr=hidden,
            grad_pre_ptr=grad_pre,
            scale_partial_ptr=scale_partial,
            ADD_INPUT=p.add_input,
            BLOCK_ROWS=tile.rows,
            BLOCK_COLUMNS=tile.columns,
            BLOCK_BOTTLENECK=p.block_bottleneck,
        )

    tile = tuning.choose("backward_input", p, run)
    scale_partial = partial(tile)
    run(tile, scale_partial)
    return scale_partial


def _parameter_gradients(
    p: Problem,
    grad_out: Tensor,
    stats: Tensor,
    hidden: Tensor,
    grad_pre: Tensor,
    scale_partial: Tensor | None,
    gradients: Gradients,
) -> None:
    """Fill the gradients of weights, biases and scale."""
    device = p.x.device
    arguments = p.arguments()
    width = {"WIDTH": p.width, "BOTTLENECK": p.bottleneck}

    def run(tile: tuning.Tile) -> tuple[Split, Tensor, Tensor, Tensor]:
        split = split_tokens(p, tile)
        segments = p.groups * split.pieces
        partial = launching.empty((split.slices, 2 * p.width * p.bottleneck + 2 * p.width), torch.float32, device)
        up_sums = launching.empty((segments, p.width), torch.float32, device)
        down_sums = launching.empty((segments, p.bottleneck), torch.float32, device)
        wanted = set(sparse_adapter_bwd_weight_kernel.arg_names)
        launching.launch(
            sparse_adapter_bwd_weight_kernel,
            (split.slices * triton.cdiv(p.width, tile.columns),),
            tile,
            **{name: value for name, value in arguments.items() if name in wanted},
            grad_ptr=grad_out,
            hidden_ptr=hidden,
            grad_pre_ptr=grad_pre,
            stats_ptr=stats if stats.numel() else None,
            norm_bias_ptr=p.norm_bias,
            partial_ptr=partial,
            up_sums_ptr=up_sums,
            down_sums_ptr=down_sums,
            pieces=split.pieces,
            piece_rows=split.piece_rows,
            segments_per_slice=split.segments_per_slice,
            ACCUMULATE=split.segments_per_slice > 1,
            BLOCK_ROWS=tile.rows,
            BLOCK_COLUMNS=tile.columns,
            BLOCK_BOTTLENECK=p.block_bottleneck,
        )
        return split, partial, up_sums, down_sums

    split, partial, up_sums, down_sums = run(tuning.choose("backward_weight", p, run))
    launching.launch(
        sum_slices_kernel,
        (triton.cdiv(partial.shape[1], SUM_TILE.columns),),
        SUM_TILE,
        partial_ptr=partial,
        grad_up_ptr=gradients.up_weight,
        grad_down_ptr=gradients.down_weight,
        grad_norm_weight_ptr=gradients.norm_weight,
        grad_norm_bias_ptr=gradients.norm_bias,
        slices=split.slices,
        BLOCK_SLICES=SUM_TILE.rows,
        BLOCK_COLUMNS=SUM_TILE.columns,
        **width,
    )
    blocks = triton.cdiv(p.width, BIAS_TILE.columns) + triton.cdiv(p.bottleneck, BIAS_TILE.columns)
    launching.launch(
        sum_segments_kernel,
        (blocks + (gradients.scale is not None),),
        BIAS_TILE,
        up_sums_ptr=up_sums,
        down_sums_ptr=down_sums,
        experts_ptr=p.experts,
        scale_ptr=p.scale_tensor,
        scale_partial_ptr=scale_partial,
        grad_up_bias_ptr=gradients.up_bias,
        grad_down_bias_ptr=gradients.down_bias,
        grad_scale_ptr=gradients.scale,
        segments=p.groups * split.pieces,
        pieces=split.pieces,
        programs=0 if scale_partial is None else scale_partial.numel(),
        scale=p.scale,
        DOWN_EXPERTS=p.down_bias.shape[0],
        UP_EXPERTS=p.up_bias.shape[0],
        UP_SPLIT=p.up_owner is not None,
        DOWN_SPLIT=p.down_owner is not None,
        BLOCK_COLUMNS=BIAS_TILE.columns,
        **width,
    )


def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side, at one a multiprocessor."""
    if device.type != "cuda":
        return INTERPRETER_PROGRAMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def split_tokens(p: Problem, tile: tuning.Tile) -> Split:
    """Cut the tokens so that slices times column blocks fill the chip once (or each group is a piece, if V is large).

    A piece is a whole number of row blocks, so that only a group's last block has rows missing.
    """
    wanted = max(1, multiprocessors(p.x.device) // triton.cdiv(p.width, tile.columns))
    blocks = triton.cdiv(p.rows_per_group, tile.rows)
    pieces = min(blocks, max(1, wanted // p.groups))
    piece_rows = triton.cdiv(blocks, pieces) * tile.rows
    pieces = triton.cdiv(p.rows_per_group, piece_rows)
    segments = pieces * p.groups
    segments_per_slice = triton.cdiv(segments, wanted)
    return Split(pieces, piece_rows, segments_per_slice, triton.cdiv(segments, segments_per_slice))
