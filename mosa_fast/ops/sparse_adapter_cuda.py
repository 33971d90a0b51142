"""Launches the sparse adapter's CUDA C++ kernels; the contract is in `launching.py`, the mathematics in csrc/*.h.

Saved tensors, gradients and rounding are those of the Triton kernels. Needs no Triton.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mosa_fast.ops import extension, launching
from mosa_fast.ops.arguments import SparseAdapterCall

TILE = 64  # csrc/block.h: rows, columns and ranks of every tile
ACTIVATIONS = ("gelu", "relu", "silu")  # csrc/numerics.h: `Activation`
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # csrc/arguments.h: `Dtype`
NO_SPLIT = launching.Split(0, 0, 0, 0, 0)


def forward(call: SparseAdapterCall, out: Tensor, saved: Sequence[Tensor]) -> None:
    """Fill the output and the saved tensors."""
    c, (stats, pre) = call, map(launching.wanted, saved)
    arrays = c.tensors() | {"out": out, "stats": stats, "pre": pre}
    extension.run("forward", arrays, _sizes(c, NO_SPLIT, 0), _numbers(c))


def backward(call: SparseAdapterCall, grad_out: Tensor, saved: Sequence[Tensor], gradients: dict[str, Tensor]) -> None:
    """Fill the gradients."""
    c, device = call, grad_out.device
    stats, pre = map(launching.wanted, saved)
    arrays = c.tensors() | {f"grad_{name}": gradient for name, gradient in gradients.items()}
    arrays |= {"grad_out": grad_out, "stats": stats, "pre": pre}
    for name in ("hidden", "grad_pre"):
        arrays[name] = launching.empty((c.out_rows, c.bottleneck), c.product_dtype, device)
    programs, split = launching.blocks(c.rows_per_group, TILE) * (1 if c.fork else c.groups), NO_SPLIT
    if "scale_tensor" in gradients:
        arrays["scale_partial"] = launching.empty((programs,), torch.float32, device)
    if "up_weight" in gradients:
        # Blocks that fill the chip twice over.
        blocks = launching.blocks(c.width, TILE) * launching.blocks(c.bottleneck, TILE)
        split = launching.split_tokens(c, TILE, max(1, 2 * launching.multiprocessors(device) // blocks))
        length = 2 * c.width * (c.bottleneck + launching.blocks(c.bottleneck, TILE))
        arrays["partial"] = launching.empty((split.slices, length), torch.float32, device)
        arrays["up_sums"] = launching.empty((split.segments, c.width), torch.float32, device)
        arrays["down_sums"] = launching.empty((split.segments, c.bottleneck), torch.float32, device)
    extension.run("backward", arrays, _sizes(c, split, programs), _numbers(c))


def _sizes(c: SparseAdapterCall, split: launching.Split, programs: int) -> dict[str, int]:
    return {
        "width": c.width,
        "bottleneck": c.bottleneck,
        "groups": c.groups,
        "rows_per_group": c.rows_per_group,
        "tokens": c.tokens,
        "down_experts": c.down_bias.shape[0],
        "up_experts": c.up_bias.shape[0],
        "activation": ACTIVATIONS.index(c.activation),
        "product_dtype": DTYPES.index(c.product_dtype),
        "add_input": int(c.add_input),
        "fork": int(c.fork),
        "first_sample": int(c.seed is not None and c.seed.numel() == 2),
        "dropout_threshold": c.dropout_threshold,
        "by_expert": int(c.slots.by_expert),
        "down_slots": c.slots.down,
        "up_slots": c.slots.up,
        "programs": programs,
        **vars(split),
    }


def _numbers(c: SparseAdapterCall) -> dict[str, float]:
    return {"scale": c.scale, "keep_scale": c.dropout_scale, "eps": c.eps}
