"""The embedded backbone: a timm VisionTransformer small enough to travel inside the package."""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import Any

import timm
from safetensors.torch import load_file
from timm.models import VisionTransformer

from mosa_fast.backbones.arguments import keep_arguments

NAME = "embedded"  # what `model.name` calls it
IMAGE_SIZE = 32
# Arguments of timm's VisionTransformer.
SHAPE: dict[str, Any] = {
    "img_size": IMAGE_SIZE,
    "patch_size": 4,
    "depth": 6,
    "class_token": False,
    "global_pool": "avg",
}


def create_embedded(num_classes: int, *, pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """A ViT for 32 x 32 RGB images in about [-1, 1]: patch 4, width 192, depth 6, mean pooling (2.7 M weights).

    Args:
        num_classes: outputs of the (always freshly initialised) head.
        pretrained: load the shipped weights, made by `mosa_fast.assets.pretrain` on generated drawings.
        kwargs: further arguments of timm's VisionTransformer.
    """
    model = timm.create_model("vit_tiny_patch16_224", num_classes=num_classes, **SHAPE, **kwargs)
    assert isinstance(model, VisionTransformer)
    keep_arguments(model, {"num_classes": num_classes, **SHAPE, **kwargs})
    # Not the weights that timm has for this architecture.
    settings: Any = model.pretrained_cfg
    settings = {**settings, "tag": NAME, "url": "", "hf_hub_id": None}
    model.pretrained_cfg = model.default_cfg = settings
    if pretrained:
        with as_file(files("mosa_fast") / "assets" / "backbone.safetensors") as path:
            missing, unexpected = model.load_state_dict(load_file(path), strict=False)
        head = [f"head.{name}" for name in model.head.state_dict()]
        if missing != head or unexpected:
            raise RuntimeError(f"the embedded weights do not fit this timm: missing {missing}, unexpected {unexpected}")
    return model
