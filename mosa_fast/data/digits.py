"""The embedded data set: 1,797 handwritten digits of 8 x 8 pixels.

Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository (1998),
https://doi.org/10.24432/C50P49, CC BY 4.0; the copy that scikit-learn ships as `load_digits`.
"""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import torch
from torch.utils.data import TensorDataset

from mosa_fast.config import DataConfig
from mosa_fast.data.grey import as_images, take_per_class
from mosa_fast.data.parts import Splits, Wanted
from mosa_fast.data.stratify import stratified_split

CLASSES = 10
TEST_PER_CLASS = 80
VAL_PER_CLASS = 20
MAX_SHOTS = 74  # what the smallest class has left
MAX_INK = 16
TEST_SEED = 0  # the test images are the same in every run


def load_digits(config: DataConfig, wanted: Wanted) -> Splits:
    """The digits, upsampled and scaled to [-1, 1].

    Args:
        config: the data section: `shots` training images per class (None: all that validation and test leave).
        wanted: its seed draws training and validation images; the 800 test images never change.

    Raises:
        ValueError: there are not so many images per class.
    """
    shots, image_size, seed = config.shots, wanted.image_size, wanted.seed
    if shots is not None and not 1 <= shots <= MAX_SHOTS:
        raise ValueError(f"data.shots must be 1 to {MAX_SHOTS} for digits, got {shots}")
    with (files("mosa_fast") / "assets" / "digits.npz").open("rb") as handle, np.load(handle) as arrays:
        pixels, labels = arrays["images"], arrays["labels"].astype(np.int64)
    images = as_images(torch.from_numpy(pixels).float() / MAX_INK, image_size)

    test, rest = stratified_split(labels, TEST_PER_CLASS, TEST_SEED)
    val, pool = take_per_class(rest, labels, VAL_PER_CLASS, seed)
    train = pool if shots is None else take_per_class(pool, labels, shots, seed)[0]
    targets = torch.from_numpy(labels)

    def part(indices: list[int]) -> TensorDataset:
        return TensorDataset(images[indices], targets[indices])

    return Splits(part(train), part(val), part(test), labels[train].tolist(), [str(digit) for digit in range(CLASSES)])
