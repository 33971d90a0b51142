"""A model for tests."""

import timm
import torch
from timm.models.vision_transformer import VisionTransformer


def make_tiny_vit(num_classes: int = 5, **kwargs) -> VisionTransformer:
    """A ViT of 3 blocks, width 24, for 8 x 8 images, with random weights."""
    torch.manual_seed(0)
    settings = {"img_size": 8, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=num_classes, **settings | kwargs)
