"""What a frozen backbone still does by itself in training: drawing random numbers, and what it may not do."""

from __future__ import annotations

from timm.layers import DropPath, PatchDropout
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def set_training(model: nn.Module, training: bool) -> None:
    """Put a model in training or evaluation mode; BatchNorm layers whose weights are frozen stay in evaluation mode.

    They would normalise by the batch and update their statistics: a backbone that learns without being trained.
    """
    model.train(training)
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not any(p.requires_grad for p in module.parameters()):
            module.eval()


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
