"""Which pretrained backbone a timm model is, and making the same one again."""

from __future__ import annotations

import json
from typing import Any

import timm
from torch import nn

from mosa_fast.backbones import embedded
from mosa_fast.backbones.arguments import keep_arguments


def name_of(model: nn.Module) -> str | None:
    """As timm.create_model takes it, "vit_base_patch16_224.augreg_in21k"; None where timm did not make the model.

    It says what the model was made as, not whether its pretrained weights were loaded.
    """
    settings = getattr(model, "pretrained_cfg", None) or {}
    name, tag = settings.get("architecture"), settings.get("tag")
    if tag == embedded.NAME:
        return embedded.NAME
    return f"{name}.{tag}" if name and tag else name or None


def arguments_of(model: nn.Module) -> dict[str, Any] | None:
    """What else the model was made with by timm.create_model, without the number of classes.

    None: it is not known (timm 1.0.20 keeps nothing, `keep_arguments` does), or JSON could not hold it.
    """
    kept = getattr(model, "_model_args", None)
    if kept is None:
        return None
    arguments = {name: value for name, value in kept.items() if name != "num_classes"}
    if name_of(model) == embedded.NAME:
        arguments = {name: value for name, value in arguments.items() if name not in embedded.SHAPE}
    try:
        return json.loads(json.dumps(arguments))
    except TypeError:
        return None


def make_again(name: str, arguments: dict[str, Any], num_classes: int) -> nn.Module:
    """The backbone of that name with its pretrained weights, and a fresh head.

    Raises:
        ValueError: there is no such model, or its weights cannot be downloaded.
    """
    if name == embedded.NAME:
        return embedded.create_embedded(num_classes, pretrained=True, **arguments)
    try:
        model = timm.create_model(name, pretrained=True, num_classes=num_classes, **arguments)
    except Exception as error:  # the hub's clients raise errors of many kinds, and not all of them are public
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"timm cannot make {name} with pretrained weights ({reason}): give the backbone") from None
    keep_arguments(model, arguments | {"num_classes": num_classes})
    return model
