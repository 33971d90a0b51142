"""Classification heads of timm models."""

from __future__ import annotations

from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn


def classifiers(model: VisionTransformer | SwinTransformer) -> tuple[nn.Module, ...]:
    """The classification heads of a timm model (a distilled one has two)."""
    heads = model.get_classifier()
    return tuple(heads) if isinstance(heads, tuple) else (heads,)
