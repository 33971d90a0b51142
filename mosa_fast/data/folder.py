"""A directory of images: ROOT/{train,val,test}/<class>/*.jpg, as torchvision's ImageFolder reads it."""

from __future__ import annotations

from pathlib import Path

from torch.utils.data import Subset
from torchvision.datasets import ImageFolder

from mosa_fast.data.split import stratified_split
from mosa_fast.data.splits import Splits
from mosa_fast.data.transforms import image_transform


def load_folder(root: str | None, image_size: int, val_fraction: float, seed: int) -> Splits:
    """Read the three folders; a missing val is cut from train, class by class.

    Raises:
        ValueError: a folder is missing or empty, or the classes of the parts differ.
    """
    if root is None:
        raise ValueError("data.root is needed: the folder that holds train, val and test")
    augmented = _read(Path(root), "train", image_size, train=True)
    test = _read(Path(root), "test", image_size, train=False)
    labels = augmented.targets
    if (Path(root) / "val").is_dir():
        val = _read(Path(root), "val", image_size, train=False)
        _check_classes("val", val, augmented)
        splits = Splits(augmented, val, test, labels, augmented.classes)
    else:
        # The same files read twice: held-out images must not be augmented.
        plain = _read(Path(root), "train", image_size, train=False)
        held_out, kept = stratified_split(labels, val_fraction, seed)
        train_labels = [labels[index] for index in kept]
        splits = Splits(Subset(augmented, kept), Subset(plain, held_out), test, train_labels, augmented.classes)
    _check_classes("test", test, augmented)
    return splits


def _read(root: Path, part: str, image_size: int, *, train: bool) -> ImageFolder:
    folder = root / part
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: data.root must hold train and test (val is optional)")
    try:
        return ImageFolder(str(folder), transform=image_transform(image_size, train=train))
    except FileNotFoundError as error:
        raise ValueError(f"{folder} cannot be used: {error}") from None


def _check_classes(part: str, dataset: ImageFolder, train: ImageFolder) -> None:
    if dataset.classes != train.classes:
        odd = sorted(set(dataset.classes) ^ set(train.classes))
        raise ValueError(f"the classes of {part} are not those of train; they differ in {', '.join(odd[:8])}")
