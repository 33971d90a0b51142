"""The model of a run: which weights are trained, by method."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mosa_fast.adapters.model import adapt, adapters
from mosa_fast.adapters.vision_transformer import AdaptedVisionTransformer
from mosa_fast.backbones.create import check_adaptable, create_backbone
from mosa_fast.backbones.heads import classifiers
from mosa_fast.config import TrainConfig
from mosa_fast.methods import METHODS


def check_model(config: TrainConfig) -> None:
    """Raise ValueError for a method that the backbone does not allow, before anything is read or downloaded."""
    if METHODS[config.method].has_adapters:
        check_adaptable(config.model)


def build_model(config: TrainConfig, num_classes: int) -> Any:
    """Backbone, head and, where the method has them, adapters; what is not trained is frozen.

    Returns:
        A timm model, or an adapted one.
    """
    check_model(config)
    method = METHODS[config.method]
    torch.manual_seed(config.seed)  # the head's initial weights
    backbone = replace(config.model, pretrained=config.model.pretrained and method.pretrained)
    model: Any = create_backbone(backbone, num_classes, config.data.image_size)
    trained = [p for p in method.trained(model, classifiers(model)) if p.requires_grad]
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


def count_trained(model: nn.Module) -> dict[str, int]:
    """Trained weights: of the head, and of all else; of adapters, those that remain after merging."""
    layers = list(adapters(model)) if isinstance(model, AdaptedVisionTransformer) else []
    inside = {id(p) for layer in layers for p in layer.parameters()}
    heads = {id(p) for head in classifiers(model) for p in head.parameters()}  # type: ignore[arg-type]
    trained = [p for p in model.parameters() if p.requires_grad]
    body = sum(p.numel() for p in trained if id(p) not in inside | heads)
    return {
        "trained_weights": body + sum(layer.merged_parameters for layer in layers),
        "head_weights": sum(p.numel() for p in trained if id(p) in heads),
    }
