"""Images that somebody names: files, folders, patterns. One that cannot be read does not cost the others anything."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mosa_fast.data.image_file import SUFFIXES, UNREADABLE, find_files, is_image_name, read_image
from mosa_fast.data.loading import PREFETCH, Unreadable


@dataclass(frozen=True)
class InputBatch:
    """Consecutive inputs.

    Attributes:
        names: of all of them, in order.
        images: float32 `[B, 3, H, W]`, of those that could be read.
        bad: of the others, by their place in `names`.
    """

    names: list[str]
    images: Tensor
    bad: dict[int, Unreadable]


def find_inputs(words: Iterable[str], listed: Iterable[str] = ()) -> list[str | Unreadable]:
    """The image files that words stand for, in the order of the words.

    Args:
        words: each a file; a folder, which stands for the images anywhere below it, by name; a pattern of names, as
            in `shots/**/*.png`; or `-`, which stands for the list.
        listed: lines, each a file or a folder.

    Returns:
        Names of files, which may turn out to be no images; what stands for nothing is an Unreadable among them.
    """
    found: list[str | Unreadable] = []
    for word in words:
        if word == "-":
            for line in listed:
                name = line.rstrip("\r\n")
                found += _expand(name) if name else ()
        elif glob.has_magic(word) and not os.path.lexists(word):
            matches = sorted(glob.glob(word, recursive=True))
            found += [name for match in matches for name in _expand(match)] or [
                Unreadable(word, "no file has that name")
            ]
        else:
            found += _expand(word)
    return found


def input_batches(
    inputs: Sequence[str | Unreadable], transform: Callable[..., Tensor], batch_size: int, workers: int
) -> Iterator[InputBatch]:
    """The inputs' images, in order.

    Args:
        inputs: of `find_inputs`.
        transform: from an RGB image to a tensor `[3, H, W]`.
        batch_size: inputs of a batch.
        workers: processes that read, where there is more than one batch.
    """
    workers = workers if len(inputs) > batch_size else 0
    yield from DataLoader(
        Inputs(inputs, transform),
        batch_size,
        collate_fn=_collate,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
    )


class Inputs(Dataset[Any]):
    """(name, tensor) of every input, or (name, Unreadable)."""

    def __init__(self, inputs: Sequence[str | Unreadable], transform: Callable[..., Tensor]) -> None:
        self.inputs, self.transform = inputs, transform

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[str, Tensor | Unreadable]:
        name = self.inputs[index]
        if isinstance(name, Unreadable):
            return name.name, name
        try:
            return name, self.transform(read_image(name))
        except UNREADABLE as error:
            return name, Unreadable(name, _reason(error))


def _collate(items: list[tuple[str, Tensor | Unreadable]]) -> InputBatch:
    images = [image for _, image in items if isinstance(image, Tensor)]
    bad = {place: item for place, (_, item) in enumerate(items) if isinstance(item, Unreadable)}
    return InputBatch([name for name, _ in items], torch.stack(images) if images else torch.empty(0), bad)


def _expand(name: str) -> list[str | Unreadable]:
    """A folder's images, by name."""
    if not os.path.isdir(name):
        return [name]
    denied: list[OSError] = []
    files = find_files(Path(name), denied.append)
    found: list[str | Unreadable] = [str(path) for path in files if is_image_name(path)]
    found += [Unreadable(str(error.filename), _reason(error)) for error in denied]
    return found or [Unreadable(name, f"no image ({', '.join(SUFFIXES)}) below this folder")]


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}".splitlines()[0]
