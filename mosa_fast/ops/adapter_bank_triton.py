"""Launches adapter_bank's Triton kernel; the mathematics, and the bytes, are there."""

from __future__ import annotations

from torch import Tensor

from mosa_fast.kernels.adapter_bank_fwd import adapter_bank_fwd_kernel
from mosa_fast.ops import launching, slots, triton_columns, triton_launching, triton_tiles
from mosa_fast.ops.arguments import AdapterBankCall, SparseLoRACall
from mosa_fast.ops.reference import IDENTITY


def forward(call: AdapterBankCall, out: Tensor) -> None:
    """Fill the output."""
    c = call
    # Low-rank pairs need as few registers as sparse_lora's.
    pairs = c.activation == IDENTITY and c.norm_weight is None
    tile = triton_tiles.choose("forward", c, c.ranks, SparseLoRACall.NAME if pairs else None)
    all_columns = triton_columns.all_columns(c, c.out_width)
    arguments = triton_launching.arguments(c) | {
        "out_ptr": out,
        "eps": c.eps,
        "OUT_WIDTH": c.out_width,
        "TRAINED_WIDTH": c.up_weight.shape[1],
        "RANK": c.rank,
        "RANKS": c.ranks,
        "BLOCK_RANKS": slots.padded_rank(c.ranks, "triton"),
        "ALL_COLUMNS": all_columns,
        "COLUMN_BLOCKS": triton_columns.blocks(all_columns, tile),
        "EVEN_TARGETS": triton_columns.even(all_columns, tile),
        "ACTIVATION": c.activation,
        "ADD_INPUT": c.add_input,
    }
    programs = launching.blocks(c.tokens, tile.rows) * c.groups
    triton_launching.launch(adapter_bank_fwd_kernel, (programs,), tile, arguments)
