"""CIFAR-100, FGVC-Aircraft and Food-101 through torchvision, which can download them (docs/data.md, GICD)."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR100, FGVCAircraft, Food101

from mosa_fast.config import DataConfig
from mosa_fast.data.annotations import check_files
from mosa_fast.data.images import ImageArrays, ImageFiles, Transform
from mosa_fast.data.parts import Splits, Wanted
from mosa_fast.data.stratify import stratified_split
from mosa_fast.data.transforms import Transforms

TASKS = {"cifar100": 100, "aircraft": 100, "food101": 101}


def load_gicd(config: DataConfig, wanted: Wanted) -> Splits:
    """One of the three sets.

    Aircraft comes with validation images; of the others' training images a stratified `val_fraction` is held out. In
    the mode "final" these are trained on too, and there is nothing to select with.

    Args:
        config: the data section; `download` lets torchvision fetch what is missing.
        wanted: its root is the folder that holds, or gets, torchvision's own layout.

    Raises:
        ValueError: the files are missing, damaged or cannot be downloaded.
    """
    root, transforms, strict = wanted.root, wanted.transforms, wanted.strict
    final = config.mode == "final"
    with _explained(config, root):
        if config.task == "aircraft":
            first, second = ("trainval", None) if final else ("train", "val")
            train, classes = _aircraft(config, root, first, transforms.train, strict)
            val = None if second is None else _aircraft(config, root, second, transforms.evaluate, strict)[0]
            test = _aircraft(config, root, "test", transforms.evaluate, strict)[0]
            return Splits(train, val, test, train.targets, classes)
        if config.task == "cifar100":
            cifar, cifar_test = (CIFAR100(root, train=part, download=config.download) for part in (True, False))
            data: np.ndarray = cifar.data

            def cifar_part(indices: list[int], transform: Transform) -> ImageArrays:
                return ImageArrays(data[indices], [cifar.targets[index] for index in indices], transform)

            held_out = ImageArrays(cifar_test.data, cifar_test.targets, transforms.evaluate)
            return _hold_out(config, cifar.targets, cifar_part, transforms, held_out, cifar.classes, wanted.seed)
        food, food_test = (Food101(root, split=part, download=config.download) for part in ("train", "test"))
        samples = _samples(food, strict)

        def food_part(indices: list[int], transform: Transform) -> ImageFiles:
            return ImageFiles([samples[index] for index in indices], transform)

        test = ImageFiles(_samples(food_test, strict), transforms.evaluate)
        return _hold_out(config, food._labels, food_part, transforms, test, food.classes, wanted.seed)


def _hold_out(
    config: DataConfig,
    labels: list[int],
    part: Callable[[list[int], Transform], ImageFiles | ImageArrays],
    transforms: Transforms,
    test: ImageFiles | ImageArrays,
    classes: list[str],
    seed: int,
) -> Splits:
    held_out, kept = stratified_split(labels, config.val_fraction, seed)
    if config.mode == "final":
        held_out, kept = [], list(range(len(labels)))
    train = part(kept, transforms.train)
    return Splits(train, part(held_out, transforms.evaluate) if held_out else None, test, train.targets, list(classes))


def _aircraft(
    config: DataConfig, root: Path, split: str, transform: Transform, strict: bool
) -> tuple[ImageFiles, list[str]]:
    source = FGVCAircraft(root, split=split, annotation_level="variant", download=config.download)
    return ImageFiles(_samples(source, strict), transform), source.classes


def _samples(source: FGVCAircraft | Food101, strict: bool) -> list[tuple[str, int]]:
    # torchvision has no public way to the labels that does not decode every image.
    paths = [str(path) for path in source._image_files]
    if strict:
        check_files(paths, Path(source.root))
    return list(zip(paths, source._labels, strict=True))


@contextmanager
def _explained(config: DataConfig, root: Path) -> Iterator[None]:
    """What torchvision raises over files, as one line for people."""
    try:
        yield
    except (RuntimeError, OSError, KeyError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error) or type(error).__name__).split(" You can use download=True")[0].rstrip(".")
        fix = "the download failed" if config.download else "--data.download true fetches it"
        raise ValueError(f"{config.task} cannot be read from {root} ({reason}): {fix}") from None
