"""Images in memory: decoded once, shared by all processes that load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset

from mosa_fast.data.image_file import UNREADABLE, image_size, read_image
from mosa_fast.data.images import ImageFiles

DECODE_THREADS = 16  # Pillow decodes without holding Python's lock


def cache_decoded(*datasets: Dataset[Any]) -> None:
    """Let data sets of image files read from memory, in place; all their files are decoded now.

    Data sets that are in memory already are left alone.

    Raises:
        ValueError: a file cannot be read.
    """
    for dataset in datasets:
        indices: Sequence[int] = range(len(dataset))  # type: ignore[arg-type]
        while isinstance(dataset, Subset):
            indices = [dataset.indices[index] for index in indices]
            dataset = dataset.dataset
        if isinstance(dataset, ImageFiles) and not isinstance(dataset.loader, DecodedImages):
            keys = dict.fromkeys(dataset.samples[index][0] for index in indices)
            dataset.loader = DecodedImages(list(keys), dataset.loader)


class DecodedImages:
    """A reader of images, path or index to RGB image, that holds them decoded in one shared tensor."""

    def __init__(self, keys: list[Any], loader: Callable[[Any], Image.Image]) -> None:
        self._loader = loader
        with ThreadPoolExecutor(DECODE_THREADS) as pool:
            sizes = list(pool.map(self._size, keys))
            ends = np.cumsum([0] + [3 * width * height for width, height in sizes]).tolist()
            # One tensor, because each shared tensor costs an open file.
            self.pixels = torch.empty(ends[-1], dtype=torch.uint8).share_memory_()
            self.where = {key: (ends[i], ends[i + 1], *sizes[i]) for i, key in enumerate(keys)}
            list(pool.map(self._fill, keys))
        del self._loader  # what it read from need not be kept

    def __call__(self, key: Any) -> Image.Image:
        """The image of a path or index."""
        first, last, width, height = self.where[key]
        return Image.fromarray(self.pixels[first:last].view(height, width, 3).numpy())

    def _size(self, key: Any) -> tuple[int, int]:
        # The header of a file is enough; others are decoded twice, which costs less than holding all of them twice.
        return self._read(key, image_size) if self._loader is read_image else self._read(key, self._loader).size

    def _fill(self, key: Any) -> None:
        first, last, *_ = self.where[key]
        self.pixels[first:last] = torch.from_numpy(np.array(self._read(key, self._loader))).flatten()

    def _read(self, key: Any, read: Any) -> Any:
        try:
            return read(key)
        except UNREADABLE as error:
            raise ValueError(f"{key} cannot be read ({type(error).__name__}: {error})") from None
