"""Launches adapter_bank's Triton kernel; the mathematics, and the bytes, are there."""

from __future__ import annotations

import triton
from torch import Tensor

from mosa_fast.kernels.adapter_bank_fwd import adapter_bank_fwd_kernel
from mosa_fast.ops import triton_launching, triton_tiles
from mosa_fast.ops.call import AdapterBankCall


def forward(call: AdapterBankCall, out: Tensor) -> None:
    """Fill the output."""
    c = call
    tile = triton_tiles.choose("forward", c, c.bottleneck)
    arguments = triton_launching.arguments(c) | {
        "out_ptr": out,
        "eps": c.eps,
        "OUT_WIDTH": c.out_width,
        "BOTTLENECK": c.bottleneck,
        "BLOCK_BOTTLENECK": triton_tiles.padded_rank(c.bottleneck),
        "ACTIVATION": c.activation,
        "ADD_INPUT": c.add_input,
    }
    programs = triton.cdiv(c.tokens, tile.rows) * c.groups
    triton_launching.launch(adapter_bank_fwd_kernel, (programs,), tile, arguments)
