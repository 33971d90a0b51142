"""Launches the sparse adapter's CUDA C++ kernels; the contract is in `launching.py`, the mathematics in csrc/*.h.

Saved tensors, gradients and rounding are those of the Triton kernels. Needs no Triton.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mosa_fast.ops import extension, launching
from mosa_fast.ops.call import SparseAdapterCall

TILE = 64  # csrc/block.h: rows, columns and ranks of every tile
ACTIVATIONS = ("gelu", "relu", "silu")  # csrc/numerics.h: `Activation`
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # csrc/arguments.h: `Dtype`
NO_SPLIT = launching.Split(0, 0, 0, 0, 0)


def forward(call: SparseAdapterCall, out: Tensor, saved: Sequence[Tensor]) -> None:
    """Fill the output and the saved tensors."""
    c, (stats, pre, vectors) = call, map(launching.wanted, saved)
    if vectors is None:  # the kernels go through it in any case
        vectors = launching.empty((c.groups, 2, c.bottleneck), torch.float32, out.device)
    arrays = _arrays(c) | {"out": out, "stats": stats, "pre": pre, "vectors": vectors}
    extension.run("forward", arrays, _sizes(c, NO_SPLIT, 0), _numbers(c))


def backward(call: SparseAdapterCall, grad_out: Tensor, saved: Sequence[Tensor], gradients: dict[str, Tensor]) -> None:
    """Fill the gradients."""
    c, device = call, grad_out.device
    stats, pre, vectors = map(launching.wanted, saved)
    arrays = _arrays(c) | {f"grad_{name}": gradient for name, gradient in gradients.items()}
    arrays |= {"grad_out": grad_out, "stats": stats, "pre": pre, "vectors": vectors}
    for name in ("hidden", "grad_pre"):
        arrays[name] = launching.empty((c.out_rows, c.bottleneck), c.product_dtype, device)
    programs, split = _tiles(c.rows_per_group) * (1 if c.fork else c.groups), NO_SPLIT
    if "scale_tensor" in gradients:
        arrays["scale_partial"] = launching.empty((programs,), torch.float32, device)
    if "up_weight" in gradients:
        # Blocks that fill the chip twice over.
        blocks = _tiles(c.width) * _tiles(c.bottleneck)
        split = launching.split_tokens(c, TILE, max(1, 2 * launching.multiprocessors(device) // blocks))
        length = 2 * c.width * (c.bottleneck + _tiles(c.bottleneck))
        arrays["partial"] = launching.empty((split.slices, length), torch.float32, device)
        arrays["up_sums"] = launching.empty((split.segments, c.width), torch.float32, device)
        arrays["down_sums"] = launching.empty((split.segments, c.bottleneck), torch.float32, device)
    extension.run("backward", arrays, _sizes(c, split, programs), _numbers(c))


def _arrays(c: SparseAdapterCall) -> dict[str, Tensor | None]:
    """The call's tensors, and scratch for the weights that each group computes with, padded to whole tiles."""
    width, ranks, device = _tiles(c.width) * TILE, _tiles(c.bottleneck) * TILE, c.x.device
    return c.tensors() | {
        "down_effective": launching.empty((c.groups, ranks, width), c.product_dtype, device),
        "up_effective": launching.empty((c.groups, width, ranks), c.product_dtype, device),
        "up_bias_effective": launching.empty((c.groups, width), torch.float32, device),
    }


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
        "programs": programs,
        **vars(split),
    }


def _numbers(c: SparseAdapterCall) -> dict[str, float]:
    return {"scale": c.scale, "keep_scale": c.dropout_scale, "eps": c.eps}


def _tiles(size: int) -> int:
    return -(-size // TILE)
