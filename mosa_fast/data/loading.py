"""From data sets to batches: order, random transforms, workers, unreadable images.

The order of the images is a pure function of (seed, epoch), the random transforms of an image one of (seed, epoch,
image): neither the number of workers or processes, nor a resumption in the middle of an epoch changes them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate

from mosa_fast.data.image_file import UNREADABLE
from mosa_fast.data.images import ImageFiles
from mosa_fast.data.memory import DECODE_THREADS
from mosa_fast.data.mixing import Mixing
from mosa_fast.data.parts import Splits
from mosa_fast.data.step_sampler import StepSampler, StepSlice

MIXING = 1  # what tells the draws of mixtures from those of an image's own transforms
PREFETCH = 4  # batches that each worker loads ahead


@dataclass(frozen=True)
class Batch:
    """One process's part of a step, or of an evaluation.

    Attributes:
        images: float32 `[B, 3, H, W]`.
        labels: int64 `[B]`, or of mixed images float32 `[B, classes]`: their parts of each class.
        first: place of the first image in the step's batch, over all processes.
        count: images that count: B, or 0 where this process has none and stands in with another's.
        total: images of the step, over all processes.
    """

    images: Tensor
    labels: Tensor
    first: int
    count: int
    total: int

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on a device; a copy from pinned memory is not waited for."""
        images, labels = (tensor.to(device, non_blocking=True) for tensor in (self.images, self.labels))
        return replace(self, images=images, labels=labels)

    def pin_memory(self) -> Batch:
        """The batch with its tensors in pinned memory; torch's loader calls it."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())


def train_loader(
    dataset: Dataset[Any],
    batch_size: int,
    seed: int,
    *,
    mixing: Mixing | None = None,
    workers: int = 0,
    pin: bool = False,
    rank: int = 0,
    world: int = 1,
) -> DataLoader[Any]:
    """Shuffled batches of one rank; its `batch_sampler` is a StepSampler.

    Args:
        dataset: gives (image, label).
        batch_size: of a step, over all ranks.
        seed: of order, transforms and mixing.
        mixing: of images with others of the data set.
        workers: processes that load.
        pin: put batches into pinned memory, from where a GPU copies without waiting.
        rank, world: this process, and how many there are.
    """
    sampler = StepSampler(len(dataset), batch_size, seed, rank, world)  # type: ignore[arg-type]
    return _loader(SeededDataset(dataset, seed, mixing), sampler, workers, pin, keep_workers=True)


def evaluation_loader(
    dataset: Dataset[Any], batch_size: int, *, workers: int = 0, pin: bool = False, rank: int = 0, world: int = 1
) -> DataLoader[Any]:
    """Every `world`-th image from `rank` on, in order: each image is seen by exactly one rank."""
    mine = range(rank, len(dataset), world)  # type: ignore[arg-type]
    slices = []
    for start in range(0, len(mine), batch_size):
        indices = list(mine[start : start + batch_size])
        slices.append(StepSlice(0, indices, 0, len(indices), len(indices)))
    return _loader(SeededDataset(dataset, 0), slices, workers, pin, keep_workers=False)


def batches(loader: DataLoader[Any]) -> Iterator[Batch]:
    """The loader's batches.

    Raises:
        ValueError: an image cannot be read; the message names it.
    """
    for batch in loader:
        if isinstance(batch, Unreadable):
            raise ValueError(
                f"{batch.name} cannot be read ({batch.reason}); loader.corrupt=skip leaves such images out"
            )
        yield batch


@dataclass
class Unreadable:
    """Stands in for an image that could not be read, so that the main process can name it."""

    name: str
    reason: str


class SeededDataset(Dataset[Any]):
    """The items of a step; whatever their transforms draw from torch is a function of (seed, epoch, index)."""

    def __init__(self, dataset: Dataset[Any], seed: int, mixing: Mixing | None = None) -> None:
        self.dataset, self.seed, self.mixing = dataset, seed, mixing
        self.draws = not isinstance(dataset, TensorDataset)

    def __getitems__(self, part: StepSlice) -> tuple[StepSlice, list[Any]]:
        """What torch's loader asks for: all items of a batch, with what the sampler says about it."""
        return part, [self.item(part.epoch, index) for index in part.indices]

    def item(self, epoch: int, index: int) -> Any:
        """(image, label), or an Unreadable."""
        item = self._read(epoch, index)
        if self.mixing is None or isinstance(item, Unreadable):
            return item
        dice = np.random.default_rng((self.seed, epoch, index, MIXING))
        other = self._read(epoch, int(dice.integers(len(self.dataset))))  # type: ignore[arg-type]
        return other if isinstance(other, Unreadable) else self.mixing.mix(item, other, dice)

    def _read(self, epoch: int, index: int) -> Any:
        if self.draws:
            words = np.random.SeedSequence((self.seed, epoch, index)).generate_state(2, np.uint32)
            torch.default_generator.manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)
        try:
            return self.dataset[index]
        except UNREADABLE as error:
            return Unreadable(item_name(self.dataset, index), f"{type(error).__name__}: {error}".splitlines()[0])


def collate(loaded: tuple[StepSlice, list[Any]]) -> Batch | Unreadable:
    """A batch, or the first of its images that could not be read."""
    part, items = loaded
    broken = next((item for item in items if isinstance(item, Unreadable)), None)
    if broken is not None:
        return broken
    images, labels = default_collate(items)
    return Batch(images, labels, part.first, part.count, part.total)


def item_name(dataset: Any, index: int) -> str:
    """The file of an image, or its number where it has none."""
    while isinstance(dataset, Subset):
        dataset, index = dataset.dataset, dataset.indices[index]
    return dataset.name(index) if isinstance(dataset, ImageFiles) else f"image {index}"


def drop_unreadable(splits: Splits) -> Splits:
    """The splits without the images that cannot be read, each of which is named on standard error.

    Raises:
        ValueError: a part, or a class of the training images, has nothing left.
    """
    kept = {name: _readable(part) for name, part in splits.parts()}
    labels = [splits.train_labels[index] for index in kept["train"]]
    empty = sorted(set(splits.train_labels) - set(labels))
    if empty:
        raise ValueError(f"class {splits.classes[empty[0]]!r} has no training image that can be read")
    parts: dict[str, Any] = {part: Subset(getattr(splits, part), indices) for part, indices in kept.items()}
    return replace(splits, **parts, train_labels=labels)


def _readable(dataset: Dataset[Any]) -> list[int]:
    samples = len(dataset)  # type: ignore[arg-type]
    if isinstance(dataset, TensorDataset):
        return list(range(samples))
    with ThreadPoolExecutor(DECODE_THREADS) as pool:
        seeded = SeededDataset(dataset, 0)
        kept = []
        for index, item in enumerate(pool.map(lambda index: seeded.item(0, index), range(samples))):
            if isinstance(item, Unreadable):
                print(f"left out: {item.name} cannot be read ({item.reason})", file=sys.stderr)
            else:
                kept.append(index)
    if not kept:
        raise ValueError("no image of a part of the data set can be read")
    return kept


def _loader(dataset: SeededDataset, slices: Any, workers: int, pin: bool, *, keep_workers: bool) -> DataLoader[Any]:
    if isinstance(dataset.dataset, TensorDataset):
        workers = 0  # in memory already
    return DataLoader(
        dataset,
        batch_sampler=slices,
        collate_fn=collate,  # type: ignore[arg-type]  # it gets what __getitems__ gives, not a list of items
        num_workers=workers,
        pin_memory=pin,
        persistent_workers=keep_workers and workers > 0,
        prefetch_factor=PREFETCH if workers else None,
    )
