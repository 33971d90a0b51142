"""Making a backbone with its pretrained weights and a fresh head."""

from __future__ import annotations

import math
from typing import Any

import timm
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import nn

from mosa_fast.backbones import embedded
from mosa_fast.backbones.adapt import classifiers
from mosa_fast.config import ModelConfig

PUBLISHED_PRIOR = 0.01  # the published head starts at this probability for every class


def create_backbone(config: ModelConfig, num_classes: int, image_size: int | None = None) -> VisionTransformer:
    """A timm VisionTransformer as a run's model section describes it, on the CPU in float32.

    Args:
        config: the model section.
        num_classes: outputs of the head.
        image_size: side of the images; None: the model's own. Position embeddings are resampled.

    Raises:
        ValueError: timm has no such model, or it is not a VisionTransformer.
    """
    kwargs: dict[str, Any] = {"proj_drop_rate": config.backbone_dropout, "pos_drop_rate": config.backbone_dropout}
    kwargs["drop_path_rate"] = config.drop_path
    if config.name == embedded.NAME:
        if image_size not in (None, embedded.IMAGE_SIZE):
            raise ValueError(f"the embedded backbone takes images of {embedded.IMAGE_SIZE} pixels, not {image_size}")
        model: nn.Module = embedded.create_embedded(num_classes, pretrained=config.pretrained, **kwargs)
    else:
        if not timm.is_model(config.name):
            near = ", ".join(timm.list_models(f"*{config.name.split('_')[0]}*")[:5])
            raise ValueError(f"timm has no model {config.name!r}" + (f"; it has {near}, ..." if near else ""))
        if image_size is not None:
            kwargs["img_size"] = image_size
        model = timm.create_model(config.name, pretrained=config.pretrained, num_classes=num_classes, **kwargs)
        if not isinstance(model, VisionTransformer):
            raise ValueError(f"model.name must be a timm VisionTransformer, {config.name} is a {type(model).__name__}")
    assert isinstance(model, VisionTransformer)
    for module in model.blocks.modules():
        if isinstance(module, Attention):
            module.proj_drop.p = 0.0  # the published backbones drop on the embeddings and in the MLPs only
    if config.head_init == "published":
        for head in classifiers(model):
            if isinstance(head, nn.Linear):
                nn.init.kaiming_normal_(head.weight, mode="fan_out")
                nn.init.constant_(head.bias, -math.log((1 - PUBLISHED_PRIOR) / PUBLISHED_PRIOR))
    return model


def input_size(config: ModelConfig) -> int:
    """Side in pixels of the images that a backbone was made for."""
    if config.name == embedded.NAME:
        return embedded.IMAGE_SIZE
    settings = timm.get_pretrained_cfg(config.name)
    return settings.input_size[-1] if settings is not None else 224
