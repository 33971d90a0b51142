"""What a frozen backbone still does by itself in training: it draws random numbers, and BatchNorm counts."""

from __future__ import annotations

from timm.layers import DropPath, PatchDropout, PatchDropoutWithIndices
from timm.models.hiera import Hiera
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd


def draws_random_numbers(module: nn.Module) -> bool:
    """Whether a module draws from torch's random state in its forward pass (adapters do not: they take a seed)."""
    return any(parts_samples(m) or _moves_positions(m) for m in module.modules())


def parts_samples(module: nn.Module) -> bool:
    """Whether a module, its children left out, draws something of its own for every sample."""
    return module.training and drop_rate(module) > 0


def drop_rate(module: nn.Module) -> float:
    """The probability with which a module, its children left out, drops something in training."""
    if isinstance(module, _DropoutNd):
        return module.p
    if isinstance(module, DropPath):
        return module.drop_prob or 0.0
    if isinstance(module, (PatchDropout, PatchDropoutWithIndices)):
        return module.prob
    if isinstance(module, Hiera):
        return module.patch_drop_rate
    return 0.0


def _moves_positions(module: nn.Module) -> bool:
    """Whether rotary positions are shifted or scaled at random, alike for all samples (Sapiens 2)."""
    settings = (getattr(module, f"{name}_coords", None) for name in ("shift", "jitter", "rescale"))
    return module.training and any(setting is not None for setting in settings)


def set_training(model: nn.Module, training: bool = True) -> None:
    """Put a model into training or evaluation mode, but for BatchNorm whose weights are frozen: see hold_statistics."""
    model.train(training)
    hold_statistics(model)


def hold_statistics(model: nn.Module) -> None:
    """Keep BatchNorm with frozen weights in evaluation: it must neither learn its statistics nor use the batch's.

    In training mode it would do both, and the model that is evaluated would not be the one that was trained.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not any(p.requires_grad for p in module.parameters(recurse=False)):
            module.training = False
