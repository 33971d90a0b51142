"""From data sets to batches: order, random transforms, workers, unreadable images.

The order of the images is a pure function of (seed, epoch), the random transforms of an image one of (seed, epoch,
image): neither the number of workers or processes, nor a resumption in the middle of an epoch changes them.
"""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, TensorDataset, default_collate

from mosa_fast.data.images import ImageArrays
from mosa_fast.data.splits import Splits

PREFETCH = 4  # batches that each worker loads ahead
DECODE_THREADS = 16  # Pillow decodes without holding Python's lock
UNREADABLE = (OSError, SyntaxError, EOFError, ValueError, struct.error, zlib.error, Image.DecompressionBombError)
Batch = tuple[Tensor, Tensor]


def train_loader(
    dataset: Dataset[Any],
    batch_size: int,
    seed: int,
    *,
    workers: int = 0,
    pin: bool = False,
    share: Share | None = None,
) -> DataLoader[Any]:
    """Shuffled batches of one rank; its `batch_sampler` is a StepSampler.

    Args:
        dataset: gives (image, label).
        batch_size: of a step, over all ranks.
        seed: of order and transforms.
        workers: processes that load.
        pin: put batches into pinned memory, from where a GPU copies without waiting.
        share: cuts this rank's part out of a step's batch; None: all of it.
    """
    sampler = StepSampler(len(dataset), batch_size, seed, share)  # type: ignore[arg-type]
    return _loader(dataset, sampler, seed, workers, pin, keep_workers=True)


def evaluation_loader(
    dataset: Dataset[Any], batch_size: int, *, workers: int = 0, pin: bool = False, rank: int = 0, world: int = 1
) -> DataLoader[Any]:
    """Every `world`-th image from `rank` on, in order: each image is seen by exactly one rank."""
    mine = range(rank, len(dataset), world)  # type: ignore[arg-type]
    batches = [[(0, index) for index in mine[start : start + batch_size]] for start in range(0, len(mine), batch_size)]
    return _loader(dataset, batches, 0, workers, pin, keep_workers=False)


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


Share = Callable[[int], tuple[int, int]]


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) for one rank: its contiguous slice of each step's batch, from a given step on.

    A slice that would be empty is the step's first image, so that every rank takes part in every step; the loop gives
    it no weight.
    """

    def __init__(self, samples: int, batch_size: int, seed: int, share: Share | None = None) -> None:
        self.samples, self.batch_size, self.seed = samples, batch_size, seed
        self.share = share or (lambda size: (0, size))
        self.epoch, self.first_step = 0, 0

    def set_position(self, epoch: int, first_step: int) -> None:
        """What the next iteration gives: the batches of `epoch` from `first_step` on."""
        self.epoch, self.first_step = epoch, first_step

    def __len__(self) -> int:
        return -(-self.samples // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.samples).tolist()
        epoch = self.epoch
        for start in range(self.first_step * self.batch_size, self.samples, self.batch_size):
            batch = order[start : start + self.batch_size]
            first, last = self.share(len(batch))
            yield [(epoch, index) for index in (batch[first:last] or batch[:1])]


@dataclass
class Unreadable:
    """Stands in for an image that could not be read, so that the main process can name it."""

    name: str
    reason: str


class SeededDataset(Dataset[Any]):
    """Items by (epoch, index); whatever its transforms draw from torch is a function of (seed, epoch, index)."""

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        self.draws = not isinstance(dataset, TensorDataset)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        if self.draws:
            words = np.random.SeedSequence((self.seed, epoch, index)).generate_state(2, np.uint32)
            torch.default_generator.manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)
        try:
            return self.dataset[index]
        except UNREADABLE as error:
            return Unreadable(item_name(self.dataset, index), f"{type(error).__name__}: {error}".splitlines()[0])


def collate(items: list[Any]) -> Any:
    """A batch, or the first of its images that could not be read."""
    return next((item for item in items if isinstance(item, Unreadable)), None) or default_collate(items)


def item_name(dataset: Any, index: int) -> str:
    """The file of an image, or its number where it has none."""
    while isinstance(dataset, Subset):
        dataset, index = dataset.dataset, dataset.indices[index]
    samples = getattr(dataset, "samples", None)
    return str(samples[index][0]) if samples is not None else f"image {index}"


def drop_unreadable(splits: Splits) -> Splits:
    """The splits without the images that cannot be read, each of which is named on standard error.

    Raises:
        ValueError: a part, or a class of the training images, has nothing left.
    """
    present = [part for part in ("train", "val", "test") if getattr(splits, part) is not None]
    kept = {part: _readable(getattr(splits, part)) for part in present}
    labels = [splits.train_labels[index] for index in kept["train"]]
    empty = sorted(set(splits.train_labels) - set(labels))
    if empty:
        raise ValueError(f"class {splits.classes[empty[0]]!r} has no training image that can be read")
    parts: dict[str, Any] = {part: Subset(getattr(splits, part), indices) for part, indices in kept.items()}
    return replace(splits, **parts, train_labels=labels)


def cache_decoded(*datasets: Dataset[Any]) -> None:
    """Let data sets of image files read from memory, in place; all their files are decoded now.

    Raises:
        ValueError: a file cannot be read, or a data set is not made of image files.
    """
    folders: list[Any] = []
    for dataset in datasets:
        while isinstance(dataset, Subset):
            dataset = dataset.dataset
        if isinstance(dataset, (TensorDataset, ImageArrays)):
            continue  # in memory already
        if not (hasattr(dataset, "samples") and hasattr(dataset, "loader")):
            raise ValueError(f"loader.cache needs a data set of image files, not {type(dataset).__name__}")
        folders.append(dataset)
    if folders:
        memory = DecodedImages(sorted({str(path) for folder in folders for path, *_ in folder.samples}))
        for folder in folders:
            folder.loader = memory


class DecodedImages:
    """A reader of image files, path to RGB image, that holds them decoded in one shared tensor."""

    def __init__(self, paths: list[str]) -> None:
        with ThreadPoolExecutor(DECODE_THREADS) as pool:
            sizes = list(pool.map(_open_size, paths))
            ends = np.cumsum([0] + [3 * width * height for width, height in sizes]).tolist()
            # One tensor, because each shared tensor costs an open file.
            self.pixels = torch.empty(ends[-1], dtype=torch.uint8).share_memory_()
            self.where = {path: (ends[i], ends[i + 1], *sizes[i]) for i, path in enumerate(paths)}
            list(pool.map(self._fill, paths))

    def __call__(self, path: str) -> Image.Image:
        """The image of a file."""
        first, last, width, height = self.where[str(path)]
        return Image.fromarray(self.pixels[first:last].view(height, width, 3).numpy())

    def _fill(self, path: str) -> None:
        first, last, *_ = self.where[path]
        try:
            with Image.open(path) as image:
                self.pixels[first:last] = torch.from_numpy(np.array(image.convert("RGB"))).flatten()
        except UNREADABLE as error:
            raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error})") from None


def _open_size(path: str) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.size
    except UNREADABLE as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error})") from None


def _readable(dataset: Dataset[Any]) -> list[int]:
    samples = len(dataset)  # type: ignore[arg-type]
    if isinstance(dataset, TensorDataset):
        return list(range(samples))
    with ThreadPoolExecutor(DECODE_THREADS) as pool:
        items = pool.map(SeededDataset(dataset, 0).__getitem__, ((0, index) for index in range(samples)))
        kept = []
        for index, item in enumerate(items):
            if isinstance(item, Unreadable):
                print(f"left out: {item.name} cannot be read ({item.reason})", file=sys.stderr)
            else:
                kept.append(index)
    if not kept:
        raise ValueError("no image of a part of the data set can be read")
    return kept


def _loader(
    dataset: Dataset[Any], batches: Any, seed: int, workers: int, pin: bool, *, keep_workers: bool
) -> DataLoader[Any]:
    if isinstance(dataset, TensorDataset):
        workers = 0  # in memory already
    return DataLoader(
        SeededDataset(dataset, seed),
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin,
        persistent_workers=keep_workers and workers > 0,
        prefetch_factor=PREFETCH if workers else None,
    )
