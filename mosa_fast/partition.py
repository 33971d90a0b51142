"""Owner maps: which expert owns which weight (docs/method.md, Owner maps; paper, section 3.2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mosa_fast.config import check_experts


def owner_map(shape: tuple[int, ...], experts: int, generator: torch.Generator | None = None) -> Tensor:
    """Split the elements of a weight among experts, uniformly at random.

    A random permutation is dealt out in turn, so every element has exactly one owner and the sizes of the parts
    differ by at most one.

    Args:
        shape: shape of the weight.
        experts: number of experts E, 1 to 255.
        generator: CPU generator that fixes the map; torch's global one when None.

    Returns:
        uint8 tensor of `shape` on the CPU, values 0 to E - 1.

    Raises:
        ValueError: `experts` is out of range.
    """
    check_experts(experts)
    size = math.prod(shape)
    owners = torch.empty(size, dtype=torch.uint8)
    owners[torch.randperm(size, generator=generator)] = (torch.arange(size) % experts).to(torch.uint8)
    return owners.view(shape)


def check_owner_map(owners: Tensor, experts: int, name: str) -> None:
    """Check the values of an owner map that comes from outside, such as a file.

    Raises:
        ValueError: it is not uint8, or holds an id of `experts` or above.
    """
    if owners.dtype != torch.uint8:
        raise ValueError(f"{name} must be uint8, got {owners.dtype}")
    if owners.numel() and int(owners.max()) >= experts:
        raise ValueError(f"{name} names expert {int(owners.max())}, but there are only {experts} (0 to {experts - 1})")
