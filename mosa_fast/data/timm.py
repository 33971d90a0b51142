"""Data sets of torchvision, of the Hugging Face Hub and in webdataset's files (docs/data.md, Any other data set).

timm's readers open the latter two; torchvision's classes are called as they are.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torchvision
from PIL import Image

from mosa_fast.config import DataConfig
from mosa_fast.data.image_file import read_image, to_rgb
from mosa_fast.data.images import ImageFiles, Transform
from mosa_fast.data.parts import Splits, Wanted
from mosa_fast.data.stratify import stratified_split

# Names that data sets use for their parts, the likeliest first.
TRAIN, VAL, TEST = ("train", "training", "trainval"), ("val", "valid", "validation", "dev"), ("test", "testing")
TEST_FRACTION, TEST_SEED = 0.2, 0  # of a set that has no parts; the test images are the same in every run


class NoSuchSplit(ValueError):
    """A data set has no part of that name."""


@dataclass(frozen=True)
class Part:
    """A part of a data set as it is published.

    Attributes:
        image: an index to the RGB image.
        targets: the labels.
        classes: their names; None where the data set gives none.
    """

    image: Callable[[int], Image.Image]
    targets: list[int]
    classes: list[str] | None


def load_timm(config: DataConfig, wanted: Wanted) -> Splits:
    """The data set `config.task`: torch/<class of torchvision.datasets>, hfds/<name on the hub or folder>, wds/.

    Its parts are the ones that the configuration names, else train; val, or a stratified `val_fraction` of train; and
    test. Where there is no test part, that is val, and where there is neither, a fifth of the images.

    Args:
        config: the data section. `root` is, for torch, the folder that torchvision keeps its files in; for hfds the
            cache, None for the usual one; for wds the folder of the shards and of info.json.
        wanted: its seed draws the validation images.

    Raises:
        ValueError: there is no such data set or part, files or a package are missing, or it does not classify images.
    """
    train, val, test = _published(config)
    kept = list(range(len(train.targets)))
    tested, test_part = None, train
    if test is None:
        tested, kept = stratified_split(train.targets, TEST_FRACTION, TEST_SEED)
    else:
        tested, test_part = list(range(len(test.targets))), test
    if val is None:
        first, second = stratified_split([train.targets[index] for index in kept], config.val_fraction, wanted.seed)
        validated, val_part, kept = [kept[i] for i in first], train, [kept[i] for i in second]
    else:
        validated, val_part = list(range(len(val.targets))), val
    classes = _classes(train, val, test)

    def images(part: Part, indices: Sequence[int], transform: Transform) -> ImageFiles:
        return ImageFiles([(index, part.targets[index]) for index in indices], transform, part.image)

    data = images(train, kept, wanted.transforms.train)
    return Splits(
        data,
        images(val_part, validated, wanted.transforms.evaluate),
        images(test_part, tested, wanted.transforms.evaluate),
        data.targets,
        classes,
    )


def count_classes(config: DataConfig) -> int:
    """Number of classes."""
    return len(_classes(*_published(config)))


def _published(config: DataConfig) -> tuple[Part, Part | None, Part | None]:
    """The parts to train on, to select with and to test on, as far as the data set has them."""
    with _explained(config):
        train = _first(config, config.train_split, TRAIN)
        if train is None:
            raise ValueError(f"{config.task} has no part {' or '.join(TRAIN)}: name it with data.train_split")
        val = _first(config, config.val_split, VAL)
        test = _first(config, config.test_split, TEST)
    return (train, None, val) if test is None and config.val_split is None else (train, val, test)


def _first(config: DataConfig, given: str | None, usual: Sequence[str]) -> Part | None:
    if given is not None:
        return _open(config, given)
    for split in usual:
        try:
            return _open(config, split)
        except NoSuchSplit:
            continue
    return None


def _open(config: DataConfig, split: str) -> Part:
    kind, _, name = (config.task or "").partition("/")
    readers = {"torch": _torchvision_part, "hfds": _hub_part, "wds": _webdataset_part}
    if kind not in readers or (not name and kind != "wds"):
        raise ValueError(
            f"data.task must be torch/NAME (torchvision), hfds/NAME (the hub, or a local folder of it) or wds/ "
            f"(webdataset's shards in data.root), got {config.task!r}"
        )
    root = None if config.root is None else Path(config.root).expanduser()
    return readers[kind](config, name, root, split)


def _torchvision_part(config: DataConfig, name: str, root: Path | None, split: str) -> Part:
    kinds = {_plain(known): known for known in torchvision.datasets.__all__}
    if _plain(name) not in kinds:
        near = ", ".join(difflib.get_close_matches(_plain(name), kinds, n=3))
        raise ValueError(f"torchvision.datasets has no {name}" + (f"; it has {near}" if near else ""))
    if root is None:
        raise ValueError("data.root is needed: the folder that torchvision keeps the data set in, or downloads it to")
    kind = getattr(torchvision.datasets, kinds[_plain(name)])
    parameters = inspect.signature(kind).parameters
    arguments: dict[str, Any] = {"download": config.download} if "download" in parameters else {}
    if "split" in parameters:
        arguments["split"] = split
    elif "train" in parameters and split in ("train", "test"):
        arguments["train"] = split == "train"
    elif "train" in parameters or split != "train":  # a set without parts is all training images
        raise NoSuchSplit(f"{config.task} has no part {split!r}")
    try:
        dataset = kind(str(root), **arguments)
    except ValueError as error:
        if "Unknown value" in str(error):  # torchvision's word for a wrong choice
            raise NoSuchSplit(f"{config.task}: {error}") from None
        raise
    return Part(partial(_item, dataset), _targets(dataset), _names(dataset))


def _hub_part(config: DataConfig, name: str, root: Path | None, split: str) -> Part:
    from timm.data import create_dataset

    try:
        reader = create_dataset(
            f"hfds/{name}", None if root is None else str(root), split=split, **_keys(config)
        ).reader
    except ValueError as error:
        if "split" in str(error).lower():
            raise NoSuchSplit(f"{config.task}: {error}") from None
        raise
    names = sorted(reader.class_to_idx, key=reader.class_to_idx.__getitem__)
    return Part(partial(_encoded, reader), _whole(reader.dataset[reader.label_key], config.task), names or None)


def _webdataset_part(config: DataConfig, name: str, root: Path | None, split: str) -> Part:
    """All images are read into memory: shards can only be read in their order, and training wants its own."""
    from timm.data import create_dataset

    if root is None or not root.is_dir():
        raise ValueError("data.root is needed: the folder of the shards and of their info.json")
    try:
        reader = create_dataset(f"wds/{name}", str(root), split=split, input_img_mode="", **_keys(config)).reader
    except RuntimeError as error:
        if "not found in info" in str(error):
            raise NoSuchSplit(f"{config.task}: {error}") from None
        raise
    reader.dist_rank, reader.dist_num_replicas = 0, 1  # every process holds all of it, as of the other data sets
    images, targets = [], []
    for picture, target in reader:
        images.append(to_rgb(picture))
        targets.append(target)
    expected = reader.split_info.num_samples
    if not images or (expected and len(images) != expected):
        raise ValueError(f"{config.task}: part {split} has {len(images)} images that can be read, not {expected}")
    return Part(images.__getitem__, _whole(targets, config.task), None)


def _item(dataset: Any, index: int) -> Image.Image:
    return to_rgb(dataset[index][0])


def _encoded(reader: Any, index: int) -> Image.Image:
    return read_image(reader[index][0])


def _keys(config: DataConfig) -> dict[str, Any]:
    given = {"input_key": config.image_key, "target_key": config.label_key}
    return {name: key for name, key in given.items() if key is not None}


def _targets(dataset: Any) -> list[int]:
    """Labels of one of torchvision's data sets, without decoding its images where an attribute holds them."""
    size = len(dataset)
    samples = [0, size // 2, size - 1] if size else []
    for attribute in ("targets", "_labels", "labels", "y", "_samples", "samples"):
        values = getattr(dataset, attribute, None)
        if values is None or len(values) != size:
            continue
        listed = [value[-1] if isinstance(value, tuple) else value for value in values]
        try:
            if all(int(listed[index]) == int(dataset[index][1]) for index in samples):
                return _whole(listed, type(dataset).__name__)
        except (TypeError, ValueError):
            continue
    return _whole([dataset[index][1] for index in range(size)], type(dataset).__name__)


def _whole(values: Sequence[Any], source: str | None) -> list[int]:
    try:
        labels = np.asarray(values)
        if labels.ndim == 1 and labels.size and labels.dtype.kind in "iu" and labels.min() >= 0:
            return [int(label) for label in labels]
    except ValueError:
        pass
    raise ValueError(f"{source} has no whole-number label from 0 on for every image: it is no data set of classes")


def _names(dataset: Any) -> list[str] | None:
    for attribute in ("classes", "categories"):
        names = getattr(dataset, attribute, None)
        if isinstance(names, (list, tuple)) and all(isinstance(name, (str, tuple)) for name in names):
            return [name if isinstance(name, str) else name[0] for name in names]
    return None


def _classes(*published: Part | None) -> list[str]:
    """Names by label, the numbers where there are none."""
    parts = [part for part in published if part is not None]
    count = 1 + max(max(part.targets) for part in parts)
    names = next((part.classes for part in parts if part.classes and len(part.classes) >= count), None)
    return names or [str(label) for label in range(count)]


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


@contextmanager
def _explained(config: DataConfig) -> Iterator[None]:
    """What the readers raise over files, packages and connections, as one line for people."""
    try:
        yield
    except ValueError:
        raise
    except ImportError as error:
        raise ValueError(f"{config.task} needs a package ({error}): pip install 'mosa_fast[data]'") from None
    except Exception as error:  # the hub's clients raise errors of many kinds, and not all of them are public
        reason = (str(error) or type(error).__name__).splitlines()[0].split(" You can use download=True")[0].rstrip(".")
        fix = "" if config.download or not (config.task or "").startswith("torch/") else ": --data.download true"
        raise ValueError(f"{config.task} cannot be read ({reason}){fix and fix + ' fetches it'}") from None
