"""Launches the CUDA C++ kernels: what the registered operator calls for the backend `cuda`. Needs no Triton.

Saved tensors, gradients and rounding are those of the Triton kernels; the mathematics is in csrc/*.h.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mosa_fast.ops import extension
from mosa_fast.ops.problem import Problem

__all__ = ["Problem", "sparse_adapter_bwd", "sparse_adapter_fwd"]

TILE = 64  # csrc/block.h: rows, columns and ranks of every tile
EMULATED_MULTIPROCESSORS = 4  # where there is no GPU
# In the order of csrc/arguments.h: `Name`, `Activation`, and `Dtype`.
ARRAYS = (
    *("x", "norm_weight", "norm_bias", "down_weight", "down_bias", "up_weight", "up_bias"),
    *("down_init", "down_owner", "up_owner", "experts", "scale_tensor", "seed"),
    *("skip", "out", "stats", "pre", "vectors"),
    *("down_effective", "up_effective", "up_bias_effective"),
    *("grad_out", "grad_x", "grad_skip", "hidden", "grad_pre"),
    *("scale_partial", "partial", "up_sums", "down_sums"),
    *("grad_norm_weight", "grad_norm_bias", "grad_down_weight", "grad_down_bias", "grad_up_weight", "grad_up_bias"),
    "grad_scale",
)
INPUTS = ARRAYS[: ARRAYS.index("skip")]
ACTIVATIONS = ("gelu", "relu", "silu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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
    """How the weight gradients cut the tokens: `pieces` segments of `piece_rows` rows a group, in `slices` slices."""

    pieces: int = 0
    piece_rows: int = 0
    segments_per_slice: int = 0
    slices: int = 0


def sparse_adapter_fwd(problem: Problem, skip: Tensor | None, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the forward; arguments and results are those of the Triton launcher.

    Args:
        problem: everything but the skip.
        skip: the shape of x, or None.
        save: also give what backward needs.

    Returns:
        out: `[M, D]`, the promoted dtype of x and skip.
        stats: float32 `[T, 2]`, mean and 1 / std of every row of x; `[0, 2]` unless saved and normed.
        pre: `[M, r]` in the product dtype, the projection without its biases; `[0, r]` unless saved.
        vectors: float32 `[V, 2, r]`, the down-projection's bias and row sums; `[0, 2, r]` unless saved.
    """
    p, device = problem, problem.x.device
    out_dtype = p.x.dtype if skip is None else torch.promote_types(p.x.dtype, skip.dtype)
    out = empty((p.out_rows, p.width), out_dtype, device)
    stats = empty((p.in_rows if save and p.norm_weight is not None else 0, 2), torch.float32, device)
    pre = empty((p.out_rows if save else 0, p.bottleneck), p.product_dtype, device)
    vectors = empty((p.groups, 2, p.bottleneck), torch.float32, device)
    if not p.out_rows:
        vectors.zero_()  # no block comes to write it
    else:
        buffers: dict[str, Tensor | None] = {"skip": skip, "out": out, "vectors": vectors}
        buffers |= {"stats": stats if stats.numel() else None, "pre": pre if save else None}
        extension.operators().forward(*_arguments(p, buffers | _effective(p), Split(), 0))
    return out, stats, pre, vectors if save else vectors[:0].clone()


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
    """Run the backward; arguments and results are those of the Triton launcher.

    Args:
        problem: the forward's.
        grad_out: contiguous `[M, D]`.
        stats, pre, vectors: what the forward saved.
        need_x: give x's gradient. need_parameters: give those of all weights and biases. need_scale: the scale's.
        skip_dtype: give a forked skip's gradient in this dtype; None: do not (an unforked skip's is grad_out).
    """
    p, device = problem, problem.x.device

    def like(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else empty(tuple(tensor.shape), tensor.dtype, device)

    parameters = ("norm_weight", "norm_bias", "down_weight", "down_bias", "up_weight", "up_bias")
    gradients = Gradients(
        x=like(p.x) if need_x else None,
        skip=None if skip_dtype is None else empty(tuple(p.x.shape), skip_dtype, device),
        scale=like(p.scale_tensor) if need_scale else None,
        **{name: like(getattr(p, name)) for name in parameters if need_parameters},
    )
    if not p.out_rows:
        for gradient in vars(gradients).values():
            if gradient is not None:
                gradient.zero_()
        return gradients

    programs = -(-p.rows_per_group // TILE) * (1 if p.fork else p.groups)
    buffers: dict[str, Tensor | None] = {"grad_out": grad_out, "pre": pre, "vectors": vectors}
    buffers["stats"] = stats if stats.numel() else None
    buffers |= {f"grad_{name}": gradient for name, gradient in vars(gradients).items()}
    for name in ("hidden", "grad_pre"):
        buffers[name] = empty((p.out_rows, p.bottleneck), p.product_dtype, device)
    if need_scale:
        buffers["scale_partial"] = empty((programs,), torch.float32, device)
    split = Split()
    if need_parameters:
        split = split_tokens(p)
        segments, chunks = p.groups * split.pieces, -(-p.bottleneck // TILE)
        length = 2 * p.width * (p.bottleneck + chunks)
        buffers["partial"] = empty((split.slices, length), torch.float32, device)
        buffers["up_sums"] = empty((segments, p.width), torch.float32, device)
        buffers["down_sums"] = empty((segments, p.bottleneck), torch.float32, device)
    extension.operators().backward(*_arguments(p, buffers | _effective(p), split, programs))
    return gradients


def split_tokens(p: Problem) -> Split:
    """Cut the tokens so that the blocks fill the chip twice over (or each group is a piece, if V is large).

    A piece is a whole number of tiles, so that only a group's last tile has rows missing.
    """
    tiles = -(-p.width // TILE) * -(-p.bottleneck // TILE)
    wanted = max(1, 2 * _multiprocessors(p.x.device) // tiles)
    blocks = -(-p.rows_per_group // TILE)
    pieces = min(blocks, max(1, wanted // p.groups))
    piece_rows = -(-blocks // pieces) * TILE
    pieces = -(-p.rows_per_group // piece_rows)
    segments = pieces * p.groups
    segments_per_slice = -(-segments // wanted)
    return Split(pieces, piece_rows, segments_per_slice, -(-segments // segments_per_slice))


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that a kernel will fill; one place, so that tests can poison it."""
    return torch.empty(shape, dtype=dtype, device=device)


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return EMULATED_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _effective(p: Problem) -> dict[str, Tensor | None]:
    """Scratch for the weights that each group computes with, padded to whole tiles (csrc/prepare.h)."""
    width, ranks = -(-p.width // TILE) * TILE, -(-p.bottleneck // TILE) * TILE
    device = p.x.device
    return {
        "down_effective": empty((p.groups, ranks, width), p.product_dtype, device),
        "up_effective": empty((p.groups, width, ranks), p.product_dtype, device),
        "up_bias_effective": empty((p.groups, width), torch.float32, device),
    }


def _arguments(
    p: Problem, buffers: dict[str, Tensor | None], split: Split, programs: int
) -> tuple[list[Tensor | None], list[int], list[float]]:
    """What the extension's operators take; the sizes and numbers in the order of csrc/arguments.h."""
    tensors = [getattr(p, name) if name in INPUTS else buffers.get(name) for name in ARRAYS]
    sizes = [
        *(p.width, p.bottleneck, p.groups, p.rows_per_group, p.tokens, p.down_bias.shape[0], p.up_bias.shape[0]),
        *(ACTIVATIONS.index(p.activation), DTYPES.index(p.product_dtype), int(p.add_input), int(p.fork)),
        *(int(p.seed is not None and p.seed.numel() == 2), p.dropout_threshold),
        *(split.pieces, split.piece_rows, split.segments_per_slice, split.slices, programs),
    ]
    return tensors, sizes, [p.scale, 1.0 / (1.0 - p.dropout), p.eps]
