"""A directory of images: ROOT/{train,val,test}/<class>/*.jpg (docs/data.md, Image folders)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

from mosa_fast.config import DataConfig
from mosa_fast.data.image_file import SUFFIXES, find_files, is_image_name
from mosa_fast.data.images import ImageFiles
from mosa_fast.data.parts import Splits, Wanted
from mosa_fast.data.stratify import stratified_split


def load_folder(config: DataConfig, wanted: Wanted) -> Splits:
    """Read the three folders of the root; a missing val is cut from train, class by class.

    Raises:
        ValueError: a folder is missing or empty, or the classes of the parts differ.
    """
    root, transforms = wanted.root, wanted.transforms
    train, test = _read(root / "train"), _read(root / "test")
    if (root / "val").is_dir():
        val = _read(root / "val")
        _check_classes("val", val, train)
        kept, held_out = train.samples, val.samples
    else:
        labels = [label for _, label in train.samples]
        first, second = stratified_split(labels, config.val_fraction, wanted.seed)
        held_out, kept = ([train.samples[index] for index in indices] for indices in (first, second))
        if not held_out:
            raise ValueError(f"{root / 'train'} has too few images to cut a validation part from: add a folder val")
    _check_classes("test", test, train)
    data = ImageFiles(kept, transforms.train)
    val_data, test_data = (ImageFiles(samples, transforms.evaluate) for samples in (held_out, test.samples))
    return Splits(data, val_data, test_data, data.targets, train.classes)


def count_classes(config: DataConfig) -> int:
    """Number of classes of the training images; ValueError where there is no such folder."""
    folder = Path(config.root or "").expanduser() / "train"
    if config.root is None or not folder.is_dir():
        raise ValueError("data.root is needed, with a folder train in it")
    return len(class_folders(folder))


def class_folders(part: Path) -> list[str]:
    """Names of the classes: the folders in a part, but for those that begin with a dot, or lead back to above it."""
    above = (part.resolve(), *part.resolve().parents)
    folders = (entry for entry in part.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    return sorted(entry.name for entry in folders if entry.resolve() not in above)


@dataclass
class _Part:
    classes: list[str]
    samples: list[tuple[str, int]]


def _read(folder: Path) -> _Part:
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: data.root must hold train and test (val is optional)")
    classes = class_folders(folder)
    samples, others = [], []
    for label, name in enumerate(classes):
        found = list(find_files(folder / name))
        images = [(str(path), label) for path in found if is_image_name(path)]
        others += [path for path in found if not is_image_name(path)]
        if not images:
            raise ValueError(f"{folder / name} holds no image: a class needs files that end in {', '.join(SUFFIXES)}")
        samples += images
    if not classes:
        raise ValueError(f"{folder} holds no folder: every class needs one")
    if others:
        rest = f" and {len(others) - 1} more" if len(others) > 1 else ""
        warnings.warn(f"left out, since their names are not those of images: {others[0]}{rest}", stacklevel=2)
    return _Part(classes, samples)


def _check_classes(part: str, dataset: _Part, train: _Part) -> None:
    if dataset.classes != train.classes:
        odd = sorted(set(dataset.classes) ^ set(train.classes))
        raise ValueError(f"the classes of {part} are not those of train; they differ in {', '.join(odd[:8])}")
