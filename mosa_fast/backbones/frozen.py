"""What a frozen backbone still does by itself in training."""

from __future__ import annotations

from timm.layers import DropPath, PatchDropout
from torch import nn


def draws_random_numbers(module: nn.Module) -> bool:
    """Whether a module draws from torch's random state in its forward pass (adapters do not: they take a seed)."""
    for m in module.modules():
        if isinstance(m, nn.Dropout):
            rate = m.p
        elif isinstance(m, DropPath):
            rate = m.drop_prob or 0.0
        elif isinstance(m, PatchDropout):
            rate = m.prob
        else:
            continue
        if m.training and rate > 0:
            return True
    return False
