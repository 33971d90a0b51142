"""What a run was trained on, in a few bytes: whether a resumed run still has the same images."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import Subset, TensorDataset

from mosa_fast.data.images import ImageArrays, ImageFiles
from mosa_fast.data.parts import Splits


class DataFingerprint:
    """Of every part of a data set: its number of images, and a digest of what they are.

    Files count by their path below `root`, label and size in bytes, so that the folder may move; images that another
    data set holds by their index there and label; images in memory by their pixels and labels; the embedded digits,
    which the configuration determines, by their labels.

    Args:
        splits: the data set.
        root: the folder that it lies in; None: none.
    """

    def __init__(self, splits: Splits, root: str | None) -> None:
        base = None if root is None else Path(root).expanduser()
        self.parts = {name: _describe(part, base) for name, part in splits.parts()}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return self.parts

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare with what a checkpoint has kept.

        Raises:
            ValueError: the data are others.
        """
        for name in {**state, **self.parts}:
            then, now = state.get(name), self.parts.get(name)
            if then == now:
                continue
            counts = [0 if part is None else part["images"] for part in (then, now)]
            same_count = counts[0] == counts[1]
            differ = "other files, sizes or labels" if same_count else f"{counts[0]} images, now {counts[1]}"
            raise ValueError(
                f"the run was started on other data: {name} had {differ}; resume it with the same (data.root may "
                "move), or start anew with --overwrite"
            )


def _describe(dataset: Any, root: Path | None) -> dict[str, Any]:
    indices = None
    while isinstance(dataset, Subset):
        own = list(dataset.indices)
        indices = own if indices is None else [own[index] for index in indices]
        dataset = dataset.dataset
    digest = hashlib.sha256()
    chosen = range(len(dataset)) if indices is None else indices
    for record in _records(dataset, chosen, root):
        digest.update(record)
    return {"images": len(chosen), "sha256": digest.hexdigest()}


def _records(dataset: Any, indices: Any, root: Path | None) -> Iterator[bytes]:
    """What tells the images apart, one after the other; of a data set of another kind nothing but its size is known."""
    if isinstance(dataset, ImageArrays):
        for index in indices:
            yield dataset.data[index].tobytes() + str(dataset.targets[index]).encode()
    elif isinstance(dataset, TensorDataset):
        yield str(dataset.tensors[1][list(indices)].tolist()).encode()
    elif isinstance(dataset, ImageFiles):
        for index in indices:
            key, label = dataset.samples[index]
            name, size = str(key), None
            if isinstance(key, str):
                name, size = key if root is None else os.path.relpath(key, root), _size(key)
            yield f"{name}\0{label}\0{size}\n".encode("utf-8", "surrogateescape")


def _size(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:  # which images can be read is for the loader to say
        return None
