"""`python -m mosa_fast.data.check --config X [--section.key value ...]`: is a data set what it should be?

Counts images and classes of every part, reads every image, and looks for images that two parts have in common and
for labels out of range. Exit code 0: nothing wrong; 1: what was found is listed; 2: the data set could not be opened at
all.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from itertools import combinations
from statistics import median
from typing import TYPE_CHECKING, Any

from mosa_fast.data.image_file import read_bytes, read_image
from mosa_fast.options import counted

if TYPE_CHECKING:
    from PIL.Image import Image

    from mosa_fast.data.parts import Splits

SHOWN = 10  # of each kind of problem
ROWS_SHOWN = 20  # data sets with at most so many classes get a table of all of them


@dataclass
class Part:
    """One part of a data set as the check sees it: for each image a name, a label, and what reading it gave."""

    name: str
    names: list[str]
    labels: list[int]
    digests: list[str | None]
    errors: list[str | None]


def check_splits(splits: Splits) -> tuple[list[str], list[str]]:
    """Read everything; what there is, and what is wrong with it, as lines of text."""
    parts = [read_part(name, dataset) for name, dataset in splits.parts()]
    classes = splits.classes
    report = [line for part in parts for line in balance(part, classes)]
    if len(classes) <= ROWS_SHOWN:
        report += class_table(parts, classes)
    problems: list[str] = []
    for part in parts:
        problems += _shorten([f"{part.name}: {error}" for error in part.errors if error])
        odd = [
            f"{part.name}: {name} has label {label}, not one of 0 to {len(classes) - 1}"
            for name, label in zip(part.names, part.labels, strict=True)
            if not 0 <= label < len(classes)
        ]
        problems += _shorten(odd)
        problems += _shorten(list(_conflicts(part)))
        if not part.labels:
            problems.append(f"{part.name}: no images")
    for first, second in combinations(parts, 2):
        problems += _shorten(list(_overlap(first, second)))
    return report, problems


def read_part(name: str, dataset: Any) -> Part:
    """Digest and decode every image of a part."""
    from torch.utils.data import TensorDataset

    from mosa_fast.data.images import ImageArrays, ImageFiles

    if isinstance(dataset, ImageFiles):
        keys, labels = [key for key, _ in dataset.samples], dataset.targets
        names = [key if isinstance(key, str) else f"image {key} of {name}" for key in keys]
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding releases Python's lock
            outcomes = list(pool.map(lambda key, name: _read(key, name, dataset.loader), keys, names))
        return Part(name, names, labels, [digest for digest, _ in outcomes], [error for _, error in outcomes])
    if isinstance(dataset, ImageArrays):
        arrays, labels = [row.tobytes() for row in dataset.data], dataset.targets
    else:
        assert isinstance(dataset, TensorDataset)
        arrays, labels = [row.numpy().tobytes() for row in dataset.tensors[0]], dataset.tensors[1].tolist()
    names = [f"image {index} of {name}" for index in range(len(labels))]
    return Part(name, names, labels, [_digest(array) for array in arrays], [None] * len(labels))


def balance(part: Part, classes: list[str]) -> list[str]:
    """How many images, of how many classes, and how evenly."""
    counts = Counter(part.labels)
    lines = [f"{part.name}: {len(part.labels)} images of {len(counts)} classes (of {len(classes)})"]
    if counts:
        (most, high), (least, low) = counts.most_common()[0], counts.most_common()[-1]
        lines[0] += (
            f"; per class {low} ({_name(least, classes)}) to {high} ({_name(most, classes)}), "
            f"median {median(counts.values()):g}, ratio {high / low:.1f}"
        )
    absent = [name for label, name in enumerate(classes) if label not in counts]
    if absent:
        lines.append(f"{part.name}: no image of {', '.join(absent[:SHOWN])}" + (", ..." if len(absent) > SHOWN else ""))
    return lines


def class_table(parts: list[Part], classes: list[str]) -> list[str]:
    """Images of every class in every part."""
    width = max(map(len, [*classes, "class"]))
    counts = [Counter(part.labels) for part in parts]
    lines = [f"{'class':<{width}}" + "".join(f"{part.name:>8}" for part in parts)]
    for label, name in enumerate(classes):
        lines.append(f"{name:<{width}}" + "".join(f"{count[label]:>8}" for count in counts))
    return lines


def _read(key: Any, name: str, loader: Callable[[Any], Image]) -> tuple[str | None, str | None]:
    """Digest of a file's bytes, or of an image's that is in no file; and the error that reading it gave."""
    content = None
    try:
        if loader is not read_image:
            return _digest(loader(key).tobytes()), None
        content = read_bytes(key)
        read_image(BytesIO(content))
        error = None
    except Exception as raised:  # Pillow's decoders raise many kinds, SyntaxError among them
        verb = "read" if content is None else "decoded"
        reason = getattr(raised, "strerror", None) or str(raised).split(" <_io.")[0]  # Pillow names the object it read
        error = f"{name} cannot be {verb}: {reason}"
    return (None if content is None else _digest(content)), error


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _overlap(first: Part, second: Part) -> Iterator[str]:
    """Images that two parts have in common: the same file, or the same bytes in another."""
    names, digests = set(first.names), dict(zip(first.digests, first.names, strict=True))
    for name, digest in zip(second.names, second.digests, strict=True):
        if name in names:
            yield f"{first.name} and {second.name} share {name}"
        elif digest is not None and digest in digests:
            yield f"{first.name} and {second.name} share an image: {digests[digest]} has the bytes of {name}"


def _conflicts(part: Part) -> Iterator[str]:
    """Images of one part with the same bytes and different labels."""
    seen: dict[str, tuple[str, int]] = {}
    for name, digest, label in zip(part.names, part.digests, part.labels, strict=True):
        if digest is not None:
            other, other_label = seen.setdefault(digest, (name, label))
            if other_label != label:
                yield f"{part.name}: {other} and {name} are the same image with labels {other_label} and {label}"


def _name(label: int, classes: list[str]) -> str:
    return classes[label] if 0 <= label < len(classes) else f"label {label}"


def _shorten(lines: list[str]) -> list[str]:
    rest = len(lines) - SHOWN
    return lines if rest <= 0 else [*lines[:SHOWN], f"{lines[0].split(':')[0]}: and {rest} more like these"]


def main() -> None:
    """Check the data set of a recipe; options are those of mosa_fast.train."""
    from mosa_fast.command_line import check_packages, leave, one_line_errors
    from mosa_fast.data import load_data
    from mosa_fast.run_options import parse_options

    with one_line_errors():
        description = "Is a data set what it should be? Reads all of it; its options are those of a run."
        config = parse_options(sys.argv[1:], "data.check", description)
        check_packages()
        # The size of the images does not matter here: they are decoded, not transformed.
        splits = load_data(config.data, config.data.image_size or 32, config.seed, strict=False)
        report, problems = check_splits(splits)
        print("\n".join(report))
        if problems:
            print(f"\n{counted(len(problems), 'problem')}:")
            print("\n".join(problems))
        else:
            print("nothing wrong was found")
    if problems:
        leave(1)


if __name__ == "__main__":
    main()
