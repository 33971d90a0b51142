"""Launches sparse_lora's Triton kernels; the contract is in `launching.py`, the mathematics in the kernels.

One launch forward; backward one towards the input, and two stages towards the weights. In all, for M rows, s bytes an
element, W of the O columns in targets: M (D + 2 O) s forward and M (2 D + 2 W) s backward, where the least would be
M (2 D + W) s: the second reading of the output's gradient is the price of deterministic weight gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mosa_fast.kernels.reductions import sum_slices_kernel
from mosa_fast.kernels.sparse_lora_bwd_input import sparse_lora_bwd_input_kernel
from mosa_fast.kernels.sparse_lora_bwd_weight import sparse_lora_bwd_weight_kernel
from mosa_fast.kernels.sparse_lora_fwd import sparse_lora_fwd_kernel
from mosa_fast.ops import launching, slots, triton_columns, triton_launching, triton_tiles
from mosa_fast.ops.arguments import SparseLoRACall
from mosa_fast.ops.triton_tiles import SUM_TILE


def forward(call: SparseLoRACall, out: Tensor, saved: Sequence[Tensor]) -> None:
    """Fill the output and the saved tensor."""
    c, out_width, (hidden,) = call, out.shape[-1], map(launching.wanted, saved)
    tile = triton_tiles.choose("forward", c, c.ranks)
    all_columns = triton_columns.all_columns(c, out_width)
    triton_launching.launch(
        sparse_lora_fwd_kernel,
        (launching.blocks(c.rows_per_group, tile.rows) * c.groups,),
        tile,
        _arguments(c)
        | {
            "out_ptr": out,
            "hidden_ptr": hidden,
            "OUT_WIDTH": out_width,
            "ALL_COLUMNS": all_columns,
            "COLUMN_BLOCKS": triton_columns.blocks(all_columns, tile),
            "EVEN_TARGETS": triton_columns.even(all_columns, tile),
        },
    )


def backward(call: SparseLoRACall, grad_out: Tensor, saved: Sequence[Tensor], gradients: dict[str, Tensor]) -> None:
    """Fill the gradients."""
    c, device, (hidden,) = call, grad_out.device, saved
    targets = triton_columns.targets(c)
    arguments = _arguments(c) | triton_launching.gradient_arguments(c, gradients)
    arguments |= {
        "grad_out_ptr": grad_out,
        "hidden_ptr": hidden,
        "grad_hidden_ptr": launching.empty((c.out_rows, c.ranks), c.product_dtype, device),
        "OUT_WIDTH": grad_out.shape[-1],
        "TARGET_COLUMNS": targets,
    }

    tile = triton_tiles.choose("backward_input", c, c.ranks)
    programs = launching.blocks(c.rows_per_group, tile.rows) * (1 if c.fork else c.groups)
    scaled = "scale_tensor" in gradients
    arguments |= {
        "scale_partial_ptr": launching.empty((programs,), torch.float32, device) if scaled else None,
        "TARGET_BLOCKS": triton_columns.blocks(targets, tile),
        "EVEN_TARGETS": triton_columns.even(targets, tile),
    }
    triton_launching.launch(sparse_lora_bwd_input_kernel, (programs,), tile, arguments)
    if "up_weight" not in gradients:
        return

    tile = triton_tiles.choose("backward_weight", c, c.ranks)
    target_blocks = triton_columns.blocks(targets, tile)
    column_blocks = target_blocks + launching.blocks(c.width, tile.columns)
    split = launching.split_tokens(c, tile.rows, max(1, launching.multiprocessors(device) // column_blocks))
    up_weights, down_weights = c.up_weight.numel(), c.down_weight.numel()
    arguments |= {
        "partial_ptr": launching.empty((split.slices, up_weights + down_weights), torch.float32, device),
        **vars(split),
        "programs": programs,
        "ACCUMULATE": split.segments_per_slice > 1,
        "TARGET_BLOCKS": target_blocks,
        "EVEN_TARGETS": triton_columns.even(targets, tile),
        "UP_WEIGHTS": up_weights,
        "DOWN_WEIGHTS": down_weights,
        **dict.fromkeys(("NORM_WEIGHTS", "UP_BIASES", "DOWN_BIASES"), 0),
        **dict.fromkeys(f"grad_{name}_ptr" for name in ("norm_weight", "norm_bias", "up_bias", "down_bias")),
    }
    triton_launching.launch(sparse_lora_bwd_weight_kernel, (split.slices * column_blocks,), tile, arguments)
    blocks = launching.blocks(up_weights + down_weights, SUM_TILE.columns) + scaled
    triton_launching.launch(sum_slices_kernel, (blocks,), SUM_TILE, arguments)


def _arguments(c: SparseLoRACall) -> dict[str, Any]:
    """What the call itself says, by the names of the kernels' parameters."""
    return triton_launching.arguments(c) | {
        "scale": c.scale,
        "RANK": c.rank,
        "RANKS": c.ranks,
        "EXPERTS": c.num_experts,
        "BLOCK_RANKS": slots.padded_rank(c.ranks, "triton"),
    }
