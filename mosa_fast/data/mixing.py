"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899): training on two images at once.

An image is mixed with another one of the training images, whatever the batch, so that the mixture is a function of
(seed, epoch, image) like everything else that is random about it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mosa_fast.config import DataConfig

Item = tuple[Tensor, int]


@dataclass(frozen=True)
class Mixing:
    """How images are mixed.

    Attributes:
        classes: number of classes.
        mixup, cutmix: both parameters of the Beta distribution that the first image's part is drawn from; 0: never.
            With both, each is taken for half of the images.
    """

    classes: int
    mixup: float
    cutmix: float

    @classmethod
    def of(cls, config: DataConfig, classes: int) -> Mixing | None:
        """What a configuration asks for; None: nothing."""
        return cls(classes, config.mixup, config.cutmix) if config.mixup or config.cutmix else None

    def mix(self, first: Item, second: Item, dice: np.random.Generator) -> tuple[Tensor, Tensor]:
        """An image `[3, H, W]` of two, and what part of it is of which class, `[classes]`, float32."""
        (image, label), (other, other_label) = first, second
        cuts = self.cutmix > 0 and (self.mixup == 0 or dice.random() < 0.5)
        alpha = self.cutmix if cuts else self.mixup
        part = float(dice.beta(alpha, alpha))
        if cuts:
            rows, columns = _box(image.shape[-2:], 1 - part, dice)
            image = image.clone()
            image[..., rows, columns] = other[..., rows, columns]
            part = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / image[0].numel()
        else:
            image = part * image + (1 - part) * other
        target = torch.zeros(self.classes)
        target[label] += part
        target[other_label] += 1 - part
        return image, target


def _box(size: torch.Size, area: float, dice: np.random.Generator) -> tuple[slice, slice]:
    """A box of a part of the area, of the image's proportions, around any point, as far as it is in the image."""
    sides = []
    for length in size:
        half, centre = length * math.sqrt(area) / 2, int(dice.integers(length))
        sides.append(slice(max(0, round(centre - half)), min(length, round(centre + half))))
    return sides[0], sides[1]
