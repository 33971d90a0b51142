"""Data sets of image files and of image arrays, with one interface for training and for the data check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from mosa_fast.data.image_file import read_image

Transform = Callable[[Image.Image], Tensor]


class ImageFiles(Dataset[tuple[Any, int]]):
    """Images that are decoded when they are asked for; the attributes are those of torchvision's DatasetFolder.

    Attributes:
        samples: (path, label) of every image; for images that another data set holds, (its index there, label).
        targets: the labels alone.
        transform: from the RGB image to the tensor `[3, H, W]`.
        loader: reads a path, or an index, into an RGB image.
    """

    def __init__(
        self,
        samples: Sequence[tuple[Any, int]],
        transform: Transform,
        loader: Callable[[Any], Image.Image] = read_image,
    ) -> None:
        self.samples = list(samples)
        self.targets = [label for _, label in self.samples]
        self.transform = transform
        self.loader = loader

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        key, label = self.samples[index]
        return self.transform(self.loader(key)), label

    def name(self, index: int) -> str:
        """The file of an image, or its number where it has none."""
        key, _ = self.samples[index]
        return key if isinstance(key, str) else f"image {key}"


class ImageArrays(Dataset[tuple[Any, int]]):
    """Images in memory.

    Attributes:
        data: uint8 `[N, H, W, 3]`.
        targets: the labels.
        transform: from the RGB image to the tensor `[3, H, W]`.
    """

    def __init__(self, data: np.ndarray, targets: Sequence[int], transform: Transform) -> None:
        self.data = data
        self.targets = list(targets)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        # transforms get an image of their own: an operation in place must not reach the array
        return self.transform(Image.fromarray(self.data[index])), self.targets[index]
