"""What the launchers of Triton's and of CUDA C++'s kernels share: memory, and how tokens are cut for weight gradients.

The launchers of an operator are one module for each backend, `OPERATOR_BACKEND.py`, with

    forward(call, out, saved)                       fill `out` and `saved`
    backward(call, grad_out, saved, gradients)      fill `gradients`, by argument

where the operator's own file allocates what is to be filled, and says what `saved` holds. All tensors are contiguous;
a saved tensor without elements is not wanted (forward) or was not wanted (backward). There is at least one row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mosa_fast.ops.call import Call

CPU_MULTIPROCESSORS = 4  # stands in where there is no GPU: small, so that small tests have several slices


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that a kernel will fill: this place and the next, so that tests can poison it."""
    return torch.empty(shape, dtype=dtype, device=device)


def empty_like(tensor: Tensor) -> Tensor:
    """`empty` of a contiguous tensor's shape, dtype and device, in half the time."""
    return torch.empty_like(tensor)


def blocks(length: int, size: int) -> int:
    """How many blocks of a size cover a length: what triton.cdiv says, in a twentieth of its time."""
    return -(-length // size)


def wanted(saved: Tensor) -> Tensor | None:
    """A saved tensor as kernels take it: None where it is not wanted."""
    return saved if saved.numel() else None


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side, at one a multiprocessor."""
    if device.type != "cuda":
        return CPU_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@dataclass(frozen=True)
class Split:
    """How the weight gradients' first stage cuts the tokens.

    Each group into `pieces` segments of `piece_rows` rows (the last may have fewer): `segments` in all, of which
    `segments_per_slice` consecutive ones are summed by one program, into one of `slices` slices of memory.
    """

    pieces: int
    piece_rows: int
    segments: int
    segments_per_slice: int
    slices: int


def split_tokens(call: Call, block_rows: int, most_slices: int) -> Split:
    """Cut the tokens into about `most_slices` slices, never more (each group is a piece, if V is large).

    A piece is a whole number of blocks of `block_rows` rows, so that only a group's last block has rows missing.
    """
    rows, groups = call.rows_per_group, call.groups
    row_blocks = blocks(rows, block_rows)
    pieces = min(row_blocks, max(1, most_slices // groups))
    piece_rows = blocks(row_blocks, pieces) * block_rows
    pieces = blocks(rows, piece_rows)
    segments = pieces * groups
    segments_per_slice = blocks(segments, most_slices)
    return Split(pieces, piece_rows, segments, segments_per_slice, blocks(segments, segments_per_slice))
