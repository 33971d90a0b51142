"""The model of a run: which weights are trained, by method."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mosa_fast.adapters.model import adapt
from mosa_fast.adapters.seams import check_adaptable
from mosa_fast.adapters.summary import summary
from mosa_fast.backbones import embedded
from mosa_fast.backbones.create import create_backbone, family, input_size
from mosa_fast.backbones.heads import classifiers
from mosa_fast.config import TrainConfig
from mosa_fast.methods import METHODS


def check_model(config: TrainConfig) -> None:
    """Raise ValueError for a method that the backbone does not allow, before anything is read or downloaded."""
    if METHODS[config.method].has_adapters and config.model.name != embedded.NAME:
        family(config.model.name)
        check_adaptable(config.model.name)


def build_backbone(config: TrainConfig, num_classes: int) -> Any:
    """The timm model of a run, with its pretrained weights where the method begins with them, and a fresh head."""
    torch.manual_seed(config.seed)  # the head's initial weights
    section = replace(config.model, pretrained=config.model.pretrained and METHODS[config.method].pretrained)
    model: Any = create_backbone(section, num_classes, config.data.image_size)
    if config.data.image_size not in (None, input_size(config.model)):
        _check_image_size(model, config)
    return model


def build_model(config: TrainConfig, num_classes: int) -> Any:
    """Backbone, head and, where the method has them, adapters; what is not trained is frozen.

    Returns:
        A timm model, or an adapted one.
    """
    check_model(config)
    method = METHODS[config.method]
    model = build_backbone(config, num_classes)
    trained = [p for p in method.trained(model, classifiers(model), config.partial_blocks) if p.requires_grad]
    if method.adapters is None:
        model.requires_grad_(False)
    else:
        model = adapt(model, replace(config.adapter, **method.adapters))
    for parameter in trained:
        parameter.requires_grad_(True)
    if config.grad_checkpointing:
        try:
            model.set_grad_checkpointing(True)
        except (AssertionError, AttributeError):
            raise ValueError(f"grad_checkpointing: {config.model.name} has no such thing in timm") from None
    return model


@torch.no_grad()
def _check_image_size(model: nn.Module, config: TrainConfig) -> None:
    """Raise ValueError unless a timm model takes images of the run's size; only a forward pass tells."""
    size = config.data.image_size
    assert size is not None
    parameter = next(model.parameters())
    if parameter.is_meta:  # there is nothing to compute with
        return
    try:
        model.eval()(parameter.new_zeros(1, 3, size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{config.model.name} cannot take images of {size} pixels: {reason}") from None
    model.train()


def count_trained(model: nn.Module) -> dict[str, int]:
    """Trained weights: of the head, and of all else; of adapters, those that remain after merging."""
    counts = summary(model)
    return {
        "trained_weights": counts["adapters"].merged + counts["backbone"].trained,
        "head_weights": counts["head"].trained,
    }
