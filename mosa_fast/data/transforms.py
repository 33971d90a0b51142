"""From image files to tensors (RECIPES: Images)."""

from __future__ import annotations

import torch
from torchvision.transforms import InterpolationMode, v2

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RESIZE_RATIO = 8 / 7  # 256 for 224, 438 for 384, 512 for 448


def image_transform(image_size: int, *, train: bool) -> v2.Compose:
    """PIL image to float32 `[3, image_size, image_size]`, ImageNet-normalised.

    Resize the shorter side to 8/7 of the size (bilinear), then a random crop and flip in training, the centre in
    evaluation.
    """
    crop = [v2.RandomCrop(image_size), v2.RandomHorizontalFlip()] if train else [v2.CenterCrop(image_size)]
    return v2.Compose(
        [
            v2.RGB(),
            v2.Resize(int(image_size * RESIZE_RATIO), interpolation=InterpolationMode.BILINEAR),
            *crop,
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
