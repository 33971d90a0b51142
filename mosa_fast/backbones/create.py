"""Making a backbone with its pretrained weights and a fresh head."""

from __future__ import annotations

import difflib
import math
import re
from typing import Any

import timm
from torch import nn

from mosa_fast.backbones import embedded
from mosa_fast.backbones.arguments import keep_arguments
from mosa_fast.backbones.checkpoints import load_checkpoint
from mosa_fast.backbones.heads import classifiers
from mosa_fast.config import ModelConfig

PUBLISHED_PRIOR = 0.01  # the published head starts at this probability for every class


def create_backbone(config: ModelConfig, num_classes: int, image_size: int | None = None) -> nn.Module:
    """A timm model as a run's model section describes it, in float32.

    It is made on torch's default device. Any model of timm's can be probed or fine-tuned; which of them take adapters
    is for mosa_fast.adapters to say.

    Args:
        config: the model section.
        num_classes: outputs of the head.
        image_size: side of the images; None: the model's own. Position embeddings are resampled.

    Raises:
        ValueError: timm has no such model, it lacks what an option asks for, its weights cannot be downloaded, or the
            checkpoint file does not fit it.
    """
    from_timm = config.pretrained and config.checkpoint is None
    # By timm's name: value, and the option it comes from. A model that lacks an option's argument refuses it; one
    # without position embeddings has nothing to drop there, and takes images of any size.
    rates = {
        "proj_drop_rate": (config.backbone_dropout, "model.backbone_dropout"),
        "drop_path_rate": (config.drop_path, "model.drop_path"),
    }
    arguments: dict[str, Any] = {name: value for name, (value, _) in rates.items()}
    arguments["pos_drop_rate"] = config.backbone_dropout
    model: Any
    if config.name == embedded.NAME:
        if image_size not in (None, embedded.IMAGE_SIZE):
            raise ValueError(f"the embedded backbone takes images of {embedded.IMAGE_SIZE} pixels, not {image_size}")
        model = embedded.create_embedded(num_classes, pretrained=from_timm, **arguments)
    else:
        family(config.name)
        if image_size is not None:
            arguments["img_size"] = image_size
        while True:
            try:
                model = _create(config.name, pretrained=from_timm, num_classes=num_classes, **arguments)
                break
            except TypeError as error:
                unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
                if unknown is None or unknown[1] not in arguments:
                    raise
                value, option = rates.get(unknown[1], (0.0, ""))
                if value:
                    raise ValueError(f"{option} must be 0 for {config.name}, which has no such thing in timm") from None
                del arguments[unknown[1]]
    keep_arguments(model, arguments | {"num_classes": num_classes})
    if config.pretrained and config.checkpoint is not None:
        load_checkpoint(model, config.checkpoint, config.checkpoint_md5)
    for module in model.modules():
        if hasattr(module, "attn_drop") and isinstance(getattr(module, "proj_drop", None), nn.Dropout):
            module.proj_drop.p = 0.0  # the published backbones drop on the embeddings and in the MLPs only
    if config.head_init == "published":
        for head in classifiers(model):
            if isinstance(head, nn.Linear):
                nn.init.kaiming_normal_(head.weight, mode="fan_out")
                nn.init.constant_(head.bias, -math.log((1 - PUBLISHED_PRIOR) / PUBLISHED_PRIOR))
    return model


def _create(name: str, *, pretrained: bool, **arguments: Any) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=pretrained, **arguments)
    except Exception as error:
        if not pretrained or isinstance(error, TypeError):
            raise
        # The hub's clients raise errors of many kinds, and not all of them are public.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"no pretrained weights of {name} ({reason}): give a local file with --model.checkpoint, or start from "
            f"random weights with --model.pretrained false"
        ) from None


def family(name: str) -> str:
    """Timm's module that a model comes from, as "vision_transformer".

    Raises:
        ValueError: timm has no such model, or not with these weights.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name.split(".")[0], timm.list_models())
        raise ValueError(f"timm has no model {name!r}" + (f"; it has {', '.join(near)}" if near else ""))
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError:
        tags = ", ".join(timm.list_pretrained(f"{name.split('.')[0]}.*")) or "none"
        raise ValueError(f"timm has no weights {name!r}; it has {tags}") from None
    return timm.model_entrypoint(name).__module__.rpartition(".")[2]


def input_size(config: ModelConfig) -> int:
    """Side in pixels of the images that a backbone was made for."""
    if config.name == embedded.NAME:
        return embedded.IMAGE_SIZE
    family(config.name)
    settings = timm.get_pretrained_cfg(config.name)
    return settings.input_size[-1] if settings is not None else 224


def channel_statistics(config: ModelConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the channels that a backbone was pretrained with, of pixels in [0, 1]."""
    if config.name == embedded.NAME:
        return (0.5,) * 3, (0.5,) * 3
    family(config.name)
    settings = timm.get_pretrained_cfg(config.name)
    if settings is None:
        raise ValueError(f"timm does not know the normalisation of {config.name}: use data.normalisation imagenet")
    return tuple(settings.mean), tuple(settings.std)
