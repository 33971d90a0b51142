"""Launches the sparse adapter's Triton kernels; the contract is in `launching.py`, the mathematics in the kernels.

The backward goes towards the input (rows), then towards the weights (two stages). In all, for M rows of D elements of s
bytes: 5 M D s (grad_out and x twice, x's gradient once) where the design's least is 3 M D s; the second reading is the
price of deterministic weight gradients, whose sums over all tokens do not fit on the chip beside the row-wise pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mosa_fast.kernels.reductions import sum_slices_kernel
from mosa_fast.kernels.sparse_adapter_bwd_input import sparse_adapter_bwd_input_kernel
from mosa_fast.kernels.sparse_adapter_bwd_weight import sparse_adapter_bwd_weight_kernel
from mosa_fast.kernels.sparse_adapter_fwd import sparse_adapter_fwd_kernel
from mosa_fast.ops import launching, slots, triton_launching, triton_tiles
from mosa_fast.ops.arguments import SparseAdapterCall
from mosa_fast.ops.triton_tiles import SUM_TILE

# Of x that the weight gradients multiply as it lies in memory: not float16, whose range t / std may leave.
RAW_DTYPES = (torch.bfloat16,)


def forward(call: SparseAdapterCall, out: Tensor, saved: Sequence[Tensor]) -> None:
    """Fill the output and the saved tensors."""
    c, (stats, pre) = call, map(launching.wanted, saved)
    tile = triton_tiles.choose("forward", c, c.bottleneck)
    programs = launching.blocks(c.rows_per_group, tile.rows) * c.groups
    arguments = _arguments(c)
    arguments |= {"out_ptr": out, "stats_ptr": stats, "pre_ptr": pre}
    triton_launching.launch(sparse_adapter_fwd_kernel, (programs,), tile, arguments)


def backward(call: SparseAdapterCall, grad_out: Tensor, saved: Sequence[Tensor], gradients: dict[str, Tensor]) -> None:
    """Fill the gradients."""
    c, device = call, grad_out.device
    stats, pre = map(launching.wanted, saved)
    arguments = _arguments(c)
    arguments |= triton_launching.gradient_arguments(c, gradients)
    arguments |= {
        "grad_out_ptr": grad_out,
        "stats_ptr": stats,
        "pre_ptr": pre,
        "rank_sums_ptr": None,
        "RAW_INPUT": c.norm_weight is not None and c.x.dtype == c.product_dtype and c.x.dtype in RAW_DTYPES,
        "hidden_ptr": launching.empty((c.out_rows, c.bottleneck), c.product_dtype, device),
        "grad_pre_ptr": launching.empty((c.out_rows, c.bottleneck), c.product_dtype, device),
    }

    input_tile = triton_tiles.choose("backward_input", c, c.bottleneck)
    row_blocks = launching.blocks(c.rows_per_group, input_tile.rows)
    programs = row_blocks * (1 if c.fork else c.groups)
    scaled, weights_wanted = "scale_tensor" in gradients, "up_weight" in gradients
    if weights_wanted:
        arguments["rank_sums_ptr"] = launching.empty((row_blocks * c.groups, 2, c.bottleneck), torch.float32, device)
    arguments["scale_partial_ptr"] = launching.empty((programs,), torch.float32, device) if scaled else None
    triton_launching.launch(sparse_adapter_bwd_input_kernel, (programs,), input_tile, arguments)
    if not weights_wanted:
        return

    tile = triton_tiles.choose("backward_weight", c, c.bottleneck)
    column_blocks = launching.blocks(c.width, tile.columns)
    most_slices = max(1, launching.multiprocessors(device) // column_blocks)
    split = launching.split_tokens(c, max(tile.rows, input_tile.rows), most_slices)
    weights, norm_weights = c.width * c.bottleneck, 0 if c.norm_weight is None else c.width
    up_biases, down_biases = c.up_bias.numel(), c.down_bias.numel()
    length = 2 * weights + 2 * norm_weights + up_biases + down_biases
    grad_skip = gradients.get("skip")
    if grad_skip is not None and not c.fork and grad_skip.dtype == c.product_dtype:
        arguments["grad_out_ptr"] = grad_skip  # the same numbers as the products see them, in fewer bytes
    arguments |= {
        "partial_ptr": launching.empty((split.slices, length), torch.float32, device),
        **vars(split),
        "programs": programs,
        "ACCUMULATE": split.segments_per_slice > 1,
        "SUMMED_ROWS": input_tile.rows,
        "UP_WEIGHTS": weights,
        "DOWN_WEIGHTS": weights,
        "NORM_WEIGHTS": norm_weights,
        "UP_BIASES": up_biases,
        "DOWN_BIASES": down_biases,
    }
    blocks = split.slices * column_blocks
    triton_launching.launch(sparse_adapter_bwd_weight_kernel, (blocks,), tile, arguments)
    blocks = launching.blocks(length, SUM_TILE.columns) + scaled
    triton_launching.launch(sum_slices_kernel, (blocks,), SUM_TILE, arguments)


def _arguments(c: SparseAdapterCall) -> dict[str, Any]:
    """What the call itself says, by the names of the kernels' parameters."""
    named = triton_launching.arguments(c)
    named |= {
        "tokens": c.tokens,
        "scale": c.scale,
        "dropout_threshold": c.dropout_threshold,
        "dropout_scale": c.dropout_scale,
        "eps": c.eps,
        "BOTTLENECK": c.bottleneck,
        "BLOCK_BOTTLENECK": slots.padded_rank(c.bottleneck, "triton"),
        "DOWN_EXPERTS": c.down_bias.shape[0],
        "UP_EXPERTS": c.up_bias.shape[0],
        "DOWN_SPLIT": c.down_owner is not None,
        "UP_SPLIT": c.up_owner is not None,
        "PADDED_WIDTH": slots.padded_width(c.width),
        "BY_EXPERT": c.slots.by_expert,
        "NORM": c.norm_weight is not None,
        "ACTIVATION": c.activation,
        "ADD_INPUT": c.add_input,
        "FIRST_SAMPLE": c.seed is not None and c.seed.numel() == 2,
    }
    return named
