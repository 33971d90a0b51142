"""Data sets, one file per family."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mosa_fast.config import DataConfig
from mosa_fast.data.preprocessing import IMAGENET, Preprocessing, Statistics, cropped, squashed
from mosa_fast.options import check_choice, check_fields, facts_of, listed

if TYPE_CHECKING:  # the command lines in this package are to start without torch
    from mosa_fast.data.parts import Splits
    from mosa_fast.data.transforms import Transforms

INK = Statistics((0.5,) * 3, (0.5,) * 3)  # light ink on a dark ground, in [-1, 1]


class Family(NamedTuple):
    """A family of data sets. Its module of the same name has `load_<name>(config, wanted)`.

    Attributes:
        root: what data.root is; None: the family needs none.
        squash: both sides of an image are resized, and nothing about training is random, as in VTAB-1k.
        statistics: the family's own, whatever the backbone wants: its images are made in memory, and have this one
            preprocessing. None: those that are asked for.
    """

    root: str | None
    squash: bool = False
    statistics: Statistics | None = None


FAMILIES = {
    "digits": Family(None, squash=True, statistics=INK),
    "fashion_mnist": Family(
        "the folder of the four idx files, or the one that torchvision downloads them to", squash=True, statistics=INK
    ),
    "folder": Family("the folder that holds train, val and test"),
    "fgvc": Family(
        "the folder that holds train.json, val.json, test.json and the images (multitask: the folders FGVC-<set>)"
    ),
    "vtab": Family("the folder that holds one folder for each task", squash=True),
    "gicd": Family("the folder that torchvision keeps the data set in, or downloads it to with --data.download true"),
    "timm": Family(None),  # it depends on the task
}


def load_data(
    config: DataConfig, image_size: int, seed: int, preprocessing: Preprocessing | None = None, *, strict: bool = True
) -> Splits:
    """The data set that a configuration names.

    Args:
        config: the data section of a run.
        image_size: side of the images in pixels.
        seed: of every random split.
        preprocessing: of the images in evaluation; None: `preprocessing_of` the data set.
        strict: refuse missing images and labels out of range; the data check wants to see all of them instead.

    Raises:
        ValueError: the name is unknown, an option is not for this family, files are missing or do not fit, or the
            preprocessing is one that the family's images do not have.
    """
    check_fields(config, "data.")
    _check_family(config)
    from mosa_fast.data.parts import Wanted

    root = _root(config) if FAMILIES[config.name].root else Path()
    usual = preprocessing_of(config, image_size)
    if FAMILIES[config.name].statistics and preprocessing not in (None, usual):
        raise ValueError(f"data.name {config.name} has images of {usual}, and cannot give images of {preprocessing}")
    transforms = make_transforms(config, preprocessing or usual)
    wanted = Wanted(root, image_size, transforms, seed, strict)
    return getattr(_module(config.name), f"load_{config.name}")(config, wanted)


def preprocessing_of(config: DataConfig, image_size: int, statistics: Statistics = IMAGENET) -> Preprocessing:
    """What evaluation does to the images of a data set.

    Args:
        config: the data section of a run.
        image_size: side of the images in pixels.
        statistics: mean and standard deviation that images are normalised with, where the family has none of its own.
    """
    family = FAMILIES[config.name]
    return (squashed if family.squash else cropped)(image_size, family.statistics or statistics)


def make_transforms(config: DataConfig, preprocessing: Preprocessing) -> Transforms:
    """What is done to images of files: in evaluation the preprocessing, in training with what the section adds."""
    from mosa_fast.data.transforms import Transforms, evaluation_transform, train_transform

    return Transforms(train_transform(preprocessing, config), evaluation_transform(preprocessing))


def class_count(config: DataConfig) -> int:
    """Number of classes of the data set that a configuration names, as published; of a folder, those that it holds.

    Raises:
        ValueError: there is no such data set.
    """
    _check_family(config)
    module = _module(config.name)
    if hasattr(module, "count_classes"):
        return module.count_classes(config)
    return module.CLASSES if config.task is None else module.TASKS[config.task]


def tasks(family: str) -> dict[str, int]:
    """The data sets of a family, as `data.task` names them, with their numbers of classes; none where it is one."""
    return getattr(_module(family), "TASKS", {})


def _module(family: str) -> Any:
    return import_module(f"mosa_fast.data.{family}")  # when it is wanted: torchvision takes a while


def _root(config: DataConfig) -> Path:
    if config.root is None:
        raise ValueError(f"data.root is needed: {FAMILIES[config.name].root}")
    return Path(config.root).expanduser()


def _check_family(config: DataConfig) -> None:
    choices = tasks(config.name)
    if choices:
        check_choice("data.task", config.task, tuple(choices))
    defaults = DataConfig()
    for option, facts in facts_of(DataConfig).items():
        is_set = getattr(config, option) != getattr(defaults, option)
        if is_set and facts.families and config.name not in facts.families:
            raise ValueError(f"data.{option} is for {listed(facts.families, 'and')}, not for {config.name}")
