"""A directory of images: ROOT/{train,val,test}/<class>/*.jpg, as torchvision's ImageFolder reads it."""

from __future__ import annotations

from pathlib import Path

from torchvision.datasets import ImageFolder

from mosa_fast.data.images import ImageFiles
from mosa_fast.data.parts import Splits
from mosa_fast.data.stratify import stratified_split
from mosa_fast.data.transforms import Transforms
from mosa_fast.data.tree import check_tree


def load_folder(root: Path, transforms: Transforms, val_fraction: float, seed: int) -> Splits:
    """Read the three folders; a missing val is cut from train, class by class.

    Raises:
        ValueError: a folder is missing or empty, or the classes of the parts differ.
    """
    train, test = _read(root, "train"), _read(root, "test")
    if (root / "val").is_dir():
        val = _read(root, "val")
        _check_classes("val", val, train)
        kept, held_out = train.samples, val.samples
    else:
        first, second = stratified_split(train.targets, val_fraction, seed)
        held_out, kept = ([train.samples[index] for index in indices] for indices in (first, second))
        if not held_out:
            raise ValueError(f"{root / 'train'} has too few images to cut a validation part from: add a folder val")
    _check_classes("test", test, train)
    data = ImageFiles(kept, transforms.train)
    val_data, test_data = (ImageFiles(samples, transforms.evaluate) for samples in (held_out, test.samples))
    return Splits(data, val_data, test_data, data.targets, train.classes)


def _read(root: Path, part: str) -> ImageFolder:
    folder = root / part
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: data.root must hold train and test (val is optional)")
    check_tree(folder)
    try:
        return ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise ValueError(f"{folder} cannot be used: {error}") from None


def _check_classes(part: str, dataset: ImageFolder, train: ImageFolder) -> None:
    if dataset.classes != train.classes:
        odd = sorted(set(dataset.classes) ^ set(train.classes))
        raise ValueError(f"the classes of {part} are not those of train; they differ in {', '.join(odd[:8])}")
