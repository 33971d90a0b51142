"""What every family of data sets gives to the training loop: images to train on, to select with and to test on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset, Subset, TensorDataset

PARTS = ("train", "val", "test")


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
