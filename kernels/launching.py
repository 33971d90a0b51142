"""How every kernel is launched and every output allocated: one place, so that tests can stand in for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mosa_fast.kernels.tuning import Tile


def launch(kernel: Any, grid: tuple[int, ...], tile: Tile, **arguments: Any) -> None:
    """Launch a Triton kernel with the tile's warps and stages; an empty grid launches nothing."""
    if all(grid):
        kernel[grid](**arguments, **tile.options())


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that a kernel will fill."""
    return torch.empty(shape, dtype=dtype, device=device)
