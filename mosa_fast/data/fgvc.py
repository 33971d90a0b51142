"""The fine-grained sets with the split files of VPT, one by one or all five as one task (docs/data.md, FGVC)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from mosa_fast.config import DataConfig
from mosa_fast.data.annotations import (
    Listed,
    check_class_count,
    check_files,
    class_labels,
    class_names,
    read_text,
)
from mosa_fast.data.images import ImageFiles
from mosa_fast.data.parts import PARTS, Splits, Wanted
from mosa_fast.data.transforms import Transforms

FIX = "data.root must hold train.json, val.json and test.json; `python -m mosa_fast.data.split` makes them"


@dataclass(frozen=True)
class FGVCSet:
    """A fine-grained data set: its published name, number of classes, and where below the root its images are."""

    name: str
    classes: int
    images: str = ""


SETS = {
    "cub": FGVCSet("CUB_200_2011", 200, "images"),
    "nabirds": FGVCSet("nabirds", 555, "images"),
    "flowers": FGVCSet("OxfordFlowers", 102),
    "dogs": FGVCSet("StanfordDogs", 120, "Images"),
    "cars": FGVCSet("StanfordCars", 196),
}
MULTITASK = ("cars", "cub", "dogs", "flowers", "nabirds")  # in the order of the published label offsets
OFFSETS = dict(zip(MULTITASK, accumulate([0, *(SETS[task].classes for task in MULTITASK[:-1])]), strict=True))
MULTITASK_CLASSES = sum(SETS[task].classes for task in MULTITASK)

TASKS = {task: known.classes for task, known in SETS.items()} | {"multitask": MULTITASK_CLASSES}

Parts = dict[str, list[tuple[str, int]]]  # (path, label) by part


def load_fgvc(config: DataConfig, wanted: Wanted) -> Splits:
    """One set, or with the task "multitask" the five of `root/FGVC-<task>` with their labels one after another.

    Args:
        config: the data section; `task` names the set, `fraction` picks the low-resource training file.
        wanted: its root is the folder of the set.

    Raises:
        ValueError: a split file is missing or is not what it should be, or an image that it lists is missing.
    """
    if config.task != "multitask":
        assert config.task is not None
        parts, names = read_set(wanted.root, SETS[config.task], config.fraction, strict=wanted.strict)
        return _splits(parts, names, wanted.transforms)
    names = [f"{task}/{label}" for task in MULTITASK for label in range(SETS[task].classes)]
    parts = {part: [] for part in PARTS}
    for task in MULTITASK:
        root = wanted.root / f"FGVC-{task}"
        own_parts, own_names = read_set(root, SETS[task], config.fraction, strict=wanted.strict)
        for label, name in enumerate(own_names):
            names[OFFSETS[task] + label] = f"{task}/{name}"
        for part in PARTS:
            parts[part] += [(path, OFFSETS[task] + label) for path, label in own_parts[part]]
    return _splits(parts, names, wanted.transforms)


def read_set(root: Path, fgvc_set: FGVCSet, fraction: float | None, *, strict: bool) -> tuple[Parts, list[str]]:
    """(path, label) of the three parts of a set, and the names of its classes.

    Ids are mapped once, over all split files that are there: a class that a low-resource file lacks shifts nothing.
    """
    train = "train" if fraction is None else f"train_{fraction:g}"
    listed = {part: read_json(root / f"{file}.json") for part, file in zip(PARTS, (train, "val", "test"), strict=True)}
    everything = [*listed.values()]
    if fraction is not None and (root / "train.json").is_file():
        everything.append(read_json(root / "train.json"))
    try:
        labels = class_labels(everything)
    except ValueError as error:
        raise ValueError(f"split files of {root}: {error}") from None
    check_class_count(len(labels), fgvc_set.classes, fgvc_set.name)
    images = root / fgvc_set.images
    parts = {part: [(str(images / path), labels[class_id]) for path, class_id in rows] for part, rows in listed.items()}
    if strict:
        for part, file in zip(PARTS, (train, "val", "test"), strict=True):
            check_files([path for path, _ in parts[part]], root / f"{file}.json")
    return parts, class_names(everything, labels, _folder_names(root))


def read_json(path: Path) -> Listed:
    """A split file, `{"relative/image.jpg": class_id}`; ValueError says what is wrong with it."""
    try:
        rows = json.loads(read_text(path, FIX))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}): {FIX}") from None
    if not isinstance(rows, dict) or not rows:
        raise ValueError(f'{path} must be a mapping like {{"relative/image.jpg": 0}} that is not empty')
    for name, class_id in rows.items():
        if type(class_id) not in (int, str):
            raise ValueError(f"{path}: the class id of {name} must be a number or a name, got {class_id!r}")
    return list(rows.items())


def _folder_names(root: Path) -> dict[int, str]:
    """NABirds' classes.txt: lines "<folder number> <name>"."""
    path = root / "classes.txt"
    rows = (line.split(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines()) if path.is_file() else ()
    return {int(row[0]): row[1] for row in rows if len(row) == 2 and row[0].isdigit()}


def _splits(parts: Parts, names: list[str], transforms: Transforms) -> Splits:
    train = ImageFiles(parts["train"], transforms.train)
    val, test = (ImageFiles(parts[part], transforms.evaluate) for part in ("val", "test"))
    return Splits(train, val, test, train.targets, names)
