"""How prepared weights are laid out: which of them a group of samples computes with, and how they are padded.

The formulas are in kernels/prepare_weights.py; `prepare_weights.py` here is the operator.
"""

from __future__ import annotations

from typing import NamedTuple

PADDED_TO = 64  # columns of D: every tile of the kernels that read prepared weights divides it
SMALLEST_DOT = 16  # the least a tile dimension may be in a tensor-core product


class Slots(NamedTuple):
    """How many weights of each projection are prepared, and for whom.

    by_expert: for every expert, for merged and for ids out of range, since there are more groups than these; else for
    every group. A dense projection has one in any case.
    """

    by_expert: bool
    down: int
    up: int


def slots_of(groups: int, down_experts: int, up_experts: int, down_split: bool, up_split: bool) -> Slots:
    """The slots for a number of groups, and each projection's number of experts and whether it is split."""
    by_expert = groups > max(down_experts, up_experts) + 2
    down, up = (experts + 2 if by_expert else groups for experts in (down_experts, up_experts))
    return Slots(by_expert, down if down_split else 1, up if up_split else 1)


def padded_width(width: int) -> int:
    """D', the columns of prepared weights."""
    return -(-width // PADDED_TO) * PADDED_TO


def padded_rank(rank: int, backend: str) -> int:
    """R', ranks as a backend's tiles have them: a power of two for Triton, whole tiles of csrc/arguments.h for cuda."""
    if backend == "cuda":
        return -(-rank // PADDED_TO) * PADDED_TO
    return max(SMALLEST_DOT, 1 << (rank - 1).bit_length())
