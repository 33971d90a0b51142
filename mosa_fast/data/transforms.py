"""From image files to tensors (docs/data.md, Images)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torchvision.transforms import InterpolationMode, v2

from mosa_fast.config import DataConfig
from mosa_fast.data.preprocessing import Preprocessing

AUGMENTATIONS = {
    "randaugment": v2.RandAugment,
    "autoaugment": v2.AutoAugment,
    "trivial": v2.TrivialAugmentWide,
    "augmix": v2.AugMix,
}


class Transforms(NamedTuple):
    """What training and evaluation do to an image."""

    train: v2.Compose
    evaluate: v2.Compose


def evaluation_transform(preprocessing: Preprocessing) -> v2.Compose:
    """PIL image to float32 `[3, image_size, image_size]`."""
    return _compose(preprocessing, [v2.CenterCrop(preprocessing.image_size)])


def train_transform(preprocessing: Preprocessing, config: DataConfig) -> v2.Compose:
    """The same for training: a random crop, and a flip; nothing random where evaluation cuts nothing off.

    What `crop_scale`, `augment` and `random_erasing` of the data section change is off by default. All of it draws
    from torch, never from Python or numpy.
    """
    size = preprocessing.image_size
    augment = [] if config.augment == "none" else [AUGMENTATIONS[config.augment]()]
    erase = [v2.RandomErasing(config.random_erasing)] if config.random_erasing else []
    changes = [v2.RandomHorizontalFlip(), *augment]
    if config.crop_scale is not None:
        crop = v2.RandomResizedCrop(size, (config.crop_scale, 1.0), interpolation=_interpolation(preprocessing))
        return v2.Compose([v2.RGB(), crop, *changes, *_tensor(preprocessing), *erase])
    return v2.Compose([*_compose(preprocessing, [v2.RandomCrop(size), *changes]).transforms, *erase])


def _compose(preprocessing: Preprocessing, crop: list[torch.nn.Module]) -> v2.Compose:
    size, interpolation = preprocessing.image_size, _interpolation(preprocessing)
    if preprocessing.resize is None:
        geometry: list[torch.nn.Module] = [v2.Resize((size, size), interpolation)]
    else:
        geometry = [v2.Resize(preprocessing.resize, interpolation), *crop]
    return v2.Compose([v2.RGB(), *geometry, *_tensor(preprocessing)])


def _interpolation(preprocessing: Preprocessing) -> InterpolationMode:
    return InterpolationMode(preprocessing.interpolation)


def _tensor(preprocessing: Preprocessing) -> list[torch.nn.Module]:
    normalise = v2.Normalize(list(preprocessing.mean), list(preprocessing.std))
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), normalise]
