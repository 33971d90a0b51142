"""From image files to tensors (docs/data.md, Images)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torchvision.transforms import InterpolationMode, v2

from mosa_fast.config import DataConfig

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


AUGMENTATIONS = {
    "randaugment": v2.RandAugment,
    "autoaugment": v2.AutoAugment,
    "trivial": v2.TrivialAugmentWide,
    "augmix": v2.AugMix,
}


def image_transform(image_size: int, statistics: Statistics = IMAGENET) -> v2.Compose:
    """Image to float32 `[3, image_size, image_size]`, normalised, for evaluation.

    The shorter side is resized to 8/7 of the size (bilinear), then the centre is cropped.
    """
    return _compose([_resize(image_size), v2.CenterCrop(image_size)], statistics)


def training_transform(config: DataConfig, image_size: int, statistics: Statistics = IMAGENET) -> v2.Compose:
    """Image to float32 `[3, image_size, image_size]`, normalised, for training.

    Resized as for evaluation, then a random crop and flip; what `crop_scale`, `augment` and `random_erasing` of the
    data section change is off by default. All of it draws from torch, never from Python or numpy.
    """
    crop: list[torch.nn.Module] = [_resize(image_size), v2.RandomCrop(image_size)]
    if config.crop_scale is not None:
        crop = [v2.RandomResizedCrop(image_size, (config.crop_scale, 1.0))]
    augment = [] if config.augment == "none" else [AUGMENTATIONS[config.augment]()]
    erase = [v2.RandomErasing(config.random_erasing)] if config.random_erasing else []
    return _compose([*crop, v2.RandomHorizontalFlip(), *augment], statistics, erase)


def squash_transform(image_size: int, statistics: Statistics = IMAGENET) -> v2.Compose:
    """Image to float32 `[3, image_size, image_size]`: both sides resized (bilinear), no augmentation (VTAB-1k)."""
    return _compose([v2.Resize((image_size, image_size), InterpolationMode.BILINEAR)], statistics)


def _resize(image_size: int) -> torch.nn.Module:
    return v2.Resize(int(image_size * RESIZE_RATIO), InterpolationMode.BILINEAR)


def _compose(
    geometry: Sequence[torch.nn.Module], statistics: Statistics, last: Sequence[torch.nn.Module] = ()
) -> v2.Compose:
    tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*map(list, statistics))]
    return v2.Compose([v2.RGB(), *geometry, *tensor, *last])
