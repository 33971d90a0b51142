"""What a pass through an adapted model goes through, and what is drawn for it, before it begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mosa_fast.adapters.block import AdaptedBlock
from mosa_fast.adapters.placements import repeat_batch
from mosa_fast.adapters.seams import AFTER_BLOCKS
from mosa_fast.nn.mixture import FIXED
from mosa_fast.routing import Routing, as_seed, draw

CHECKPOINTED = (
    "gradient checkpointing is switched on in the backbone, where it would recompute without the experts of the pass: "
    "call set_grad_checkpointing on the adapted model instead"
)


def blocks_and_others(backbone: nn.Module) -> tuple[list[AdaptedBlock], list[nn.Module]]:
    """The adapted blocks in a timm model, and the modules outside of them that run before the last one.

    Raises:
        RuntimeError: gradient checkpointing is switched on outside of the adapted blocks.
    """
    blocks: list[AdaptedBlock] = []
    others: list[nn.Module] = []

    def walk(module: nn.Module, left_out: tuple[str, ...] = ()) -> None:
        for name, child in module.named_children():
            if isinstance(child, AdaptedBlock):
                blocks.append(child)
            elif name not in left_out:
                others.append(child)
                walk(child)

    walk(backbone, AFTER_BLOCKS)
    if any(map(checkpoints_by_itself, (backbone, *others))):
        raise RuntimeError(CHECKPOINTED)
    return blocks, others


def all_disabled(blocks: list[AdaptedBlock]) -> bool:
    """Whether the frozen backbone's own answer is wanted."""
    return all(block.disabled for block in blocks)


def draw_routing(blocks: list[AdaptedBlock], views: int, experts: Tensor | None, seed: Tensor | int | None) -> Routing:
    """Experts of every adapter and view, and the adapters' seeds.

    Args:
        blocks: all that have adapters, in order.
        views, experts, seed: what the model was called with.

    Raises:
        ValueError: experts is no tensor of this shape.
    """
    layers = sum(block.draws for block in blocks)
    first = blocks[0].adapters()[0]
    key = as_seed(seed, first.down.weight.device)
    if experts is None and first.config.routing == "random":
        return draw(key, layers, views, first.config.experts)
    if experts is None:
        experts = torch.full((layers, views, 2), FIXED, dtype=torch.int32, device=key.device)
    if not isinstance(experts, Tensor) or experts.ndim != 3 or experts.shape[0] != layers or experts.shape[2] != 2:
        found = list(experts.shape) if isinstance(experts, Tensor) else type(experts).__name__
        raise ValueError(f"experts must be int32 [{layers}, V, 2], got {found}")
    return Routing(experts, draw(key, layers, 1, first.config.experts).seeds)


def repeated(value: Any, views: int) -> Any:
    """Every tensor of what a timm model takes or gives, repeated for the views: alone, in a dictionary or a list."""
    if isinstance(value, Mapping):
        return {key: repeated(item, views) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(repeated(item, views) for item in value)
    return repeat_batch(value, views)


def checkpoints_by_itself(module: nn.Module) -> bool:
    """Whether timm's gradient checkpointing is switched on in a module."""
    return bool(module.__dict__.get("grad_checkpointing", False))
