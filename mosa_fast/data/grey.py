"""What the data sets of small grey images have in common: pixels in memory, so many images of each class."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from mosa_fast.data.stratify import stratified_split


def as_images(ink: Tensor, image_size: int) -> Tensor:
    """Grey values `[N, h, w]` in [0, 1] to images `[N, 3, image_size, image_size]` in [-1, 1], bilinear."""
    images = F.interpolate(ink[:, None], size=(image_size, image_size), mode="bilinear")
    return (images * 2 - 1).expand(-1, 3, -1, -1)


def take_per_class(indices: Sequence[int], labels: Sequence[int], count: int, seed: int) -> tuple[list[int], list[int]]:
    """So many of the indices for each class, and the others; `labels` are those of the whole data set.

    Raises:
        ValueError: a class has fewer.
    """
    first, second = stratified_split([labels[index] for index in indices], count, seed)
    return [indices[i] for i in first], [indices[i] for i in second]
