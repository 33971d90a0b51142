"""The embedded data set: 1,797 handwritten digits of 8 x 8 pixels.

Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository (1998),
https://doi.org/10.24432/C50P49, CC BY 4.0; the copy that scikit-learn ships as `load_digits`.
"""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from mosa_fast.data.parts import Splits
from mosa_fast.data.stratify import stratified_split
from mosa_fast.data.transforms import Statistics

TEST_PER_CLASS = 80
VAL_PER_CLASS = 20
MAX_SHOTS = 74  # what the smallest class has left
MAX_INK = 16
STATISTICS = Statistics((0.5,) * 3, (0.5,) * 3)  # light ink on a dark ground, in [-1, 1]
TEST_SEED = 0  # the test images are the same in every run


def load_digits(shots: int | None, image_size: int, seed: int) -> Splits:
    """The digits, upsampled and scaled to [-1, 1].

    Args:
        shots: training images per class; None: all that are left after validation and test.
        image_size: side of the images in pixels.
        seed: draws training and validation images; the 800 test images never change.

    Raises:
        ValueError: there are not so many images per class.
    """
    if shots is not None and not 1 <= shots <= MAX_SHOTS:
        raise ValueError(f"data.shots must be 1 to {MAX_SHOTS} for digits, got {shots}")
    with (files("mosa_fast") / "assets" / "digits.npz").open("rb") as handle, np.load(handle) as arrays:
        pixels, labels = arrays["images"], arrays["labels"].astype(np.int64)
    ink = torch.from_numpy(pixels).float()[:, None] / MAX_INK
    images = F.interpolate(ink, size=(image_size, image_size), mode="bilinear").expand(-1, 3, -1, -1) * 2 - 1

    test, rest = stratified_split(labels, TEST_PER_CLASS, TEST_SEED)
    val, pool = _subsplit(rest, labels, VAL_PER_CLASS, seed)
    train = pool if shots is None else _subsplit(pool, labels, shots, seed)[0]
    targets = torch.from_numpy(labels)

    def part(indices: list[int]) -> TensorDataset:
        return TensorDataset(images[indices], targets[indices])

    return Splits(part(train), part(val), part(test), labels[train].tolist(), [str(digit) for digit in range(10)])


def _subsplit(indices: list[int], labels: np.ndarray, take: int, seed: int) -> tuple[list[int], list[int]]:
    first, second = stratified_split(labels[indices].tolist(), take, seed)
    return [indices[i] for i in first], [indices[i] for i in second]
