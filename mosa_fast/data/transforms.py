"""From image files to tensors (docs/data.md, Images)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torchvision.transforms import InterpolationMode, v2

from mosa_fast.data.preprocessing import Preprocessing


class Transforms(NamedTuple):
    """What training and evaluation do to an image."""

    train: v2.Compose
    evaluate: v2.Compose


def evaluation_transform(preprocessing: Preprocessing) -> v2.Compose:
    """PIL image to float32 `[3, image_size, image_size]`."""
    return _compose(preprocessing, [v2.CenterCrop(preprocessing.image_size)])


def train_transform(preprocessing: Preprocessing) -> v2.Compose:
    """The same for training: a random crop, and a flip; no augmentation where evaluation cuts nothing off."""
    return _compose(preprocessing, [v2.RandomCrop(preprocessing.image_size), v2.RandomHorizontalFlip()])


def _compose(preprocessing: Preprocessing, crop: list[torch.nn.Module]) -> v2.Compose:
    size, interpolation = preprocessing.image_size, InterpolationMode(preprocessing.interpolation)
    if preprocessing.resize is None:
        geometry: list[torch.nn.Module] = [v2.Resize((size, size), interpolation)]
    else:
        geometry = [v2.Resize(preprocessing.resize, interpolation), *crop]
    normalise = v2.Normalize(list(preprocessing.mean), list(preprocessing.std))
    return v2.Compose([v2.RGB(), *geometry, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), normalise])
