"""Data sets, one file per family."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mosa_fast.config import DataConfig
from mosa_fast.data.preprocessing import IMAGENET, Preprocessing, Statistics, cropped, squashed
from mosa_fast.options import check_choice, check_fields, facts_of

if TYPE_CHECKING:  # the command lines in this package are to start without torch
    from mosa_fast.data.parts import Splits
    from mosa_fast.data.transforms import Transforms


def load_data(
    config: DataConfig, image_size: int, seed: int, statistics: Statistics = IMAGENET, *, strict: bool = True
) -> Splits:
    """The data set that a configuration names.

    Args:
        config: the data section of a run.
        image_size: side of the images in pixels.
        seed: of every random split.
        statistics: mean and standard deviation that images are normalised with (digits bring their own).
        strict: refuse missing images and labels out of range; the data check wants to see all of them instead.

    Raises:
        ValueError: the name is unknown, an option is not for this family, or files are missing or do not fit.
    """
    check_fields(config, "data.")
    _check_family(config)
    if config.name == "digits":
        from mosa_fast.data.digits import load_digits

        return load_digits(config.shots, image_size, seed)
    transforms = make_transforms(config, image_size, statistics)
    if config.name == "timm":
        from mosa_fast.data.timm_sets import load_timm

        return load_timm(config, transforms, _root(config), seed)
    root = _root(config)
    if root is None:
        raise ValueError(f"data.root is needed: {_WHERE[config.name]}")
    if config.name == "vtab":
        from mosa_fast.data.vtab import load_vtab

        return load_vtab(config, transforms, root, strict=strict)
    if config.name == "fgvc":
        from mosa_fast.data.fgvc import load_fgvc

        return load_fgvc(config, transforms, root, strict=strict)
    if config.name == "gicd":
        from mosa_fast.data.gicd import load_gicd

        return load_gicd(config, transforms, root, seed, strict=strict)
    from mosa_fast.data.folder import load_folder

    return load_folder(root, transforms, config.val_fraction, seed)


def preprocessing_of(config: DataConfig, image_size: int, statistics: Statistics = IMAGENET) -> Preprocessing:
    """What evaluation does to the images of a data set; the arguments are those of `load_data`."""
    if config.name == "digits":
        from mosa_fast.data.digits import STATISTICS

        return squashed(image_size, STATISTICS)
    return (squashed if config.name == "vtab" else cropped)(image_size, statistics)


def make_transforms(config: DataConfig, image_size: int, statistics: Statistics = IMAGENET) -> Transforms:
    """What a family of image files does to its images; the arguments are those of `load_data`."""
    from mosa_fast.data.transforms import Transforms, evaluation_transform, train_transform

    preprocessing = preprocessing_of(config, image_size, statistics)
    return Transforms(train_transform(preprocessing, config), evaluation_transform(preprocessing))


_WHERE = {
    "folder": "the folder that holds train, val and test",
    "fgvc": "the folder that holds train.json, val.json, test.json and the images (multitask: the folders FGVC-<set>)",
    "vtab": "the folder that holds one folder for each task",
    "gicd": "the folder that torchvision keeps the data set in, or downloads it to with --data.download true",
}


def class_count(config: DataConfig) -> int:
    """Number of classes of the data set that a configuration names, as published; of a folder, those that it holds.

    Raises:
        ValueError: there is no such data set.
    """
    _check_family(config)
    if config.name == "digits":
        return 10
    if config.name == "timm":
        from mosa_fast.data.timm_sets import count_classes

        return count_classes(config, _root(config))
    if config.task is not None:
        return tasks(config.name)[config.task]
    root = _root(config)
    if root is None or not (root / "train").is_dir():
        raise ValueError(f"data.root is needed: {_WHERE[config.name]}")
    return sum(entry.is_dir() for entry in (root / "train").iterdir())


def tasks(family: str) -> dict[str, int]:
    """The data sets of a family, as `data.task` names them, with their numbers of classes; none where it is one."""
    if family == "fgvc":
        from mosa_fast.data.fgvc import MULTITASK_CLASSES, SETS

        return {name: known.classes for name, known in SETS.items()} | {"multitask": MULTITASK_CLASSES}
    if family == "vtab":
        from mosa_fast.data.vtab import TASKS

        return TASKS
    if family == "gicd":
        from mosa_fast.data.gicd import TASKS

        return TASKS
    return {}


def _root(config: DataConfig) -> Path | None:
    return None if config.root is None else Path(config.root).expanduser()


def _check_family(config: DataConfig) -> None:
    choices = tasks(config.name)
    if choices:
        check_choice("data.task", config.task, tuple(choices))
    defaults = DataConfig()
    for option, facts in facts_of(DataConfig).items():
        is_set = getattr(config, option) != getattr(defaults, option)
        if is_set and facts.families and config.name not in facts.families:
            raise ValueError(f"data.{option} is for {' and '.join(facts.families)}, not for {config.name}")
