"""From image files to tensors (docs/data.md, Image folders)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torchvision.transforms import InterpolationMode, v2

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RESIZE_RATIO = 8 / 7  # 256 for 224, 438 for 384, 512 for 448


class Statistics(NamedTuple):
    """Mean and standard deviation of the channels, of pixels in [0, 1]."""

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


IMAGENET = Statistics()


class Transforms(NamedTuple):
    """What training and evaluation do to an image."""

    train: v2.Compose
    evaluate: v2.Compose


def image_transform(image_size: int, *, train: bool, statistics: Statistics = IMAGENET) -> v2.Compose:
    """Image to float32 `[3, image_size, image_size]`, normalised.

    Resize the shorter side to 8/7 of the size (bilinear), then a random crop and flip in training, the centre in
    evaluation.
    """
    crop = [v2.RandomCrop(image_size), v2.RandomHorizontalFlip()] if train else [v2.CenterCrop(image_size)]
    return _compose([v2.Resize(int(image_size * RESIZE_RATIO), InterpolationMode.BILINEAR), *crop], statistics)


def squash_transform(image_size: int, statistics: Statistics = IMAGENET) -> v2.Compose:
    """Image to float32 `[3, image_size, image_size]`: both sides resized (bilinear), no augmentation (VTAB-1k)."""
    return _compose([v2.Resize((image_size, image_size), InterpolationMode.BILINEAR)], statistics)


def _compose(geometry: list[torch.nn.Module], statistics: Statistics) -> v2.Compose:
    tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*map(list, statistics))]
    return v2.Compose([v2.RGB(), *geometry, *tensor])
