"""The model of a run: which weights are trained, by method."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mosa_fast.adapters.model import AdaptedModel, adapt, adapters
from mosa_fast.backbones.create import check_adaptable, create_backbone
from mosa_fast.backbones.heads import classifiers
from mosa_fast.config import TrainConfig


def build_model(config: TrainConfig, num_classes: int) -> Any:
    """Backbone, head and, for the method "mosa", adapters; what is not trained is frozen."""
    if config.method == "mosa":
        check_adaptable(config.model)
    torch.manual_seed(config.seed)  # the head's initial weights
    backbone = config.model if config.method != "scratch" else replace(config.model, pretrained=False)
    model = create_backbone(backbone, num_classes, config.data.image_size)
    if config.method == "mosa":
        return adapt(model, config.adapter)
    if config.method == "linear":
        model.requires_grad_(False)
        for head in classifiers(model):
            head.requires_grad_(True)
    return model


def forward(
    model: nn.Module, images: Tensor, views: int, seed: Tensor | None, block_outputs: list[Tensor] | None = None
) -> Tensor:
    """Logits `[V * B, classes]`; the seed is for adapted models, others have one deterministic view."""
    if isinstance(model, AdaptedModel):
        return model(images, views=views, seed=seed, block_outputs=block_outputs)
    return model(images)


def count_trained(model: nn.Module) -> dict[str, int]:
    """Trained weights: of the adapter after merging (without the head), and of the head."""
    heads = {id(p) for head in classifiers(model) for p in head.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    body = sum(p.numel() for p in trained if id(p) not in heads)
    if isinstance(model, AdaptedModel):
        body = sum(adapter.merged_parameters for adapter in adapters(model))
    return {"trained_weights": body, "head_weights": sum(p.numel() for p in trained if id(p) in heads)}
