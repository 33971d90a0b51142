"""AdamW (or SGD) with decay groups, and a schedule of warm-up and cosine per step."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR

BETAS = (0.9, 0.999)
EPS = 1e-6  # docs/data.md, Training recipes
MOMENTUM = 0.9  # of SGD; docs/data.md, Training recipes: linear probe


def make_optimizer(
    model: nn.Module, lr: float, weight_decay: float, optimizer: str = "adamw", *, graphed: bool = False
) -> torch.optim.Optimizer:
    """Fused AdamW or SGD over everything trained; biases are not decayed. A weight decay of 0 means just that.

    Args:
        model: its trained parameters are taken.
        lr: peak learning rate.
        weight_decay: of everything but biases.
        optimizer: "adamw" or "sgd".
        graphed: AdamW only: keep the learning rate in a tensor on the parameters' device, where a CUDA graph can read
            it.
    """
    decayed: list[nn.Parameter] = []
    biases: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (biases if name.endswith("bias") else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": biases, "weight_decay": 0.0}]
    if optimizer == "sgd":
        return SGD(groups, lr=lr, momentum=MOMENTUM, fused=True)
    adamw = AdamW(groups, lr=lr, betas=BETAS, eps=EPS, fused=True, capturable=graphed)
    keep_rates = _rates_for_graphs if graphed else _rates_for_steps
    keep_rates(adamw)
    # A checkpoint has a tensor on the CPU, whose value of then a graph would repeat for ever, or it has none: a resumed
    # run may have changed whether it captures graphs.
    adamw.register_load_state_dict_post_hook(keep_rates)
    return adamw


def _rates_for_graphs(optimizer: torch.optim.Optimizer) -> None:
    """Keep learning rates where a graph reads them anew."""
    device = next(p.device for group in optimizer.param_groups for p in group["params"])
    for group in optimizer.param_groups:
        lr = float(group["lr"])
        # The schedule multiplies initial_lr: as a number, so that setting a rate does not wait for the device.
        group.setdefault("initial_lr", lr)
        group |= {"lr": torch.full((), lr, device=device), "capturable": True}


def _rates_for_steps(optimizer: torch.optim.Optimizer) -> None:
    """Keep learning rates as numbers."""
    for group in optimizer.param_groups:
        group |= {"lr": float(group["lr"]), "capturable": False}


def make_schedule(optimizer: torch.optim.Optimizer, steps: int, warmup_steps: int) -> LambdaLR:
    """Linear warm-up from the first step (never at zero), then cosine to zero at `steps`."""

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return LambdaLR(optimizer, factor)
