"""What a family of data sets is asked for, and what it gives: images to train on, to select with and to test on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset, Subset, TensorDataset

from mosa_fast.data.transforms import Transforms

PARTS = ("train", "val", "test")


@dataclass(frozen=True)
class Wanted:
    """What a family is asked for, beside the data section of the run.

    Attributes:
        root: folder of the data set; meaningless for a family that needs none.
        image_size: side of the images in pixels.
        transforms: of the family's image files in training and evaluation.
        seed: of every random split.
        strict: refuse missing images and labels out of range.
    """

    root: Path
    image_size: int
    transforms: Transforms
    seed: int
    strict: bool = True


@dataclass
class Splits:
    """The three parts of a data set, each giving (image `[3, H, W]` float32, label int).

    Attributes:
        train, val, test: data sets; selection looks at val only, test is opened once, at the end. val is None where
            the validation images are trained on (data.mode final): there is nothing to select with, so that the last
            epoch is the one to report.
        train_labels: labels of the training images, in order.
        classes: names of the classes, by label.
    """

    train: Dataset[Any]
    val: Dataset[Any] | None
    test: Dataset[Any]
    train_labels: list[int]
    classes: list[str]

    def parts(self) -> Iterator[tuple[str, Dataset[Any]]]:
        """Name and data set of the parts that there are."""
        return ((name, getattr(self, name)) for name in PARTS if getattr(self, name) is not None)


def labels_of(dataset: Any) -> list[int]:
    """The labels of a data set, in order, without reading an image."""
    if isinstance(dataset, Subset):
        labels = labels_of(dataset.dataset)
        return [labels[index] for index in dataset.indices]
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[1].tolist()
    return list(dataset.targets)
