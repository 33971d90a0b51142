"""`python -m mosa_fast.data.split IMAGES`: split files for data sets without public ones (family fgvc)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mosa_fast.command_line import CommandParser, one_line_errors, user_path
from mosa_fast.data.image_file import find_files, is_image_name
from mosa_fast.data.stratify import stratified_split
from mosa_fast.files import write_text

BIRD_LISTS = ("images.txt", "image_class_labels.txt", "train_test_split.txt")  # of CUB and NABirds


def make_split_files(
    rows: Sequence[tuple[str, int | str, bool | None]],
    out: Path,
    *,
    val: float = 0.1,
    test: float = 0.2,
    fractions: Sequence[float] = (),
    seed: int = 3407,
) -> dict[str, int]:
    """Write train.json, val.json, test.json and a train_<fraction>.json for each fraction (docs/data.md, FGVC).

    Args:
        rows: (path, class id, whether it is a test image) of every image; None, not known, for all of them or none.
        out: folder of the files.
        val: part of the training images of each class held out for validation.
        test: part of the images of each class held out for the test, where the rows do not say.
        fractions: low-resource parts of the training images, nested: a larger one holds the smaller.
        seed: fixes every choice.

    Returns:
        Number of images by file name.

    Raises:
        ValueError: a file exists already, an image is there twice, or a class has too few images for its parts.
    """
    paths = [path for path, _, _ in rows]
    ids = [class_id for _, class_id, _ in rows]
    twice = next((path for path, count in Counter(paths).items() if count > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} is listed more than once: it might be trained on and tested with")
    if all(is_test is None for _, _, is_test in rows):
        _check_counts(ids, 3, "a test, a validation and a training image")
        test_part, rest = stratified_split(_integers(ids), test, seed)
    else:
        test_part = [index for index, (_, _, is_test) in enumerate(rows) if is_test]
        rest = [index for index, (_, _, is_test) in enumerate(rows) if not is_test]
        _check_counts([ids[index] for index in rest], 2, "a validation and a training image")
    val_part, train = _choose(rest, ids, val, seed)
    parts = {"train": train, "val": val_part, "test": test_part}
    for fraction in fractions:
        if not 0.0 < fraction < 1.0:
            raise ValueError(f"fractions must be between 0 and 1, got {fraction:g}")
        # The beginnings of one order, so that they nest; class by class, at least one image of each.
        target = {label: max(1, round(fraction * count)) for label, count in Counter(ids[i] for i in train).items()}
        parts[f"train_{fraction:g}"] = _take(train, ids, target, seed)
    if not parts["test"]:
        raise ValueError("there is no test image")
    for name in parts:
        if (out / f"{name}.json").exists():
            raise ValueError(f"{out / name}.json exists; move it away to make a new split")
    for name, indices in parts.items():
        _write_json(out / f"{name}.json", {paths[index]: ids[index] for index in indices})
    return {f"{name}.json": len(indices) for name, indices in parts.items()}


def find_images(images: Path) -> list[tuple[str, int | str, bool | None]]:
    """Rows of every image below a folder of class folders; ids are 0..C-1 in the order of the folders' names.

    CUB's and NABirds' own lists (images.txt, image_class_labels.txt, train_test_split.txt in the folder or the one
    above) are used where they are: their ids, and the official test images.

    Raises:
        ValueError: there is no image, or the lists do not fit together.
    """
    for folder in (images, images.parent):
        if all((folder / name).is_file() for name in BIRD_LISTS):
            return _read_bird_lists(*(folder / name for name in BIRD_LISTS))
    found = [path for path in find_files(images) if is_image_name(path)]
    names = sorted({path.parent.relative_to(images).as_posix() for path in found})
    if not found or names == ["."]:
        raise ValueError(f"{images} must hold a folder of images for each class (or give --labels FILE)")
    ids = {name: index for index, name in enumerate(names)}
    return [
        (path.relative_to(images).as_posix(), ids[path.parent.relative_to(images).as_posix()], None) for path in found
    ]


def _read_bird_lists(paths: Path, labels: Path, parts: Path) -> list[tuple[str, int | str, bool | None]]:
    """Rows by the lines "<image> <path>", "<image> <class id>" and "<image> <1 to train on, 0 to test with>"."""
    listed, class_ids, is_train = map(_pairs, (paths, labels, parts))
    for source, found in ((labels, class_ids), (parts, is_train)):
        missing = next((key for key in listed if not found.get(key, "").isdigit()), None)
        if missing is not None:
            raise ValueError(f"{source} has no number for image {missing}, which {paths} lists")
    return [(path, int(class_ids[key]), is_train[key] == "0") for key, path in listed.items()]


def read_labels(path: Path) -> list[tuple[str, int | str, bool | None]]:
    """Rows of a text file with lines `<path> <class id> [train|test]`, for images that lie in one folder.

    Raises:
        ValueError: the file is missing, or a line is something else.
    """
    rows: list[tuple[str, int | str, bool | None]] = []
    if not path.is_file():
        raise ValueError(f"no file {path}")
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        words = line.rsplit(maxsplit=2)
        is_test = None
        if words[-1] in ("train", "test"):
            is_test, words = words[-1] == "test", words[:-1]
        else:
            words = line.rsplit(maxsplit=1)
        if len(words) != 2:
            raise ValueError(f"{path}, line {number}: expected '<path> <class id> [train|test]', got {line!r}")
        rows.append((words[0], int(words[1]) if words[1].isdigit() else words[1], is_test))
    marked = {is_test is None for _, _, is_test in rows}
    if len(marked) != 1:
        raise ValueError(f"{path} must say train or test on every line, or on none" if rows else f"{path} is empty")
    return rows


def _write_json(path: Path, content: dict[str, int | str]) -> None:
    write_text(path, json.dumps(content, indent=0, ensure_ascii=False))


def _choose(indices: list[int], ids: Sequence[int | str], take: float, seed: int) -> tuple[list[int], list[int]]:
    first, second = stratified_split(_integers([ids[index] for index in indices]), take, seed)
    return [indices[i] for i in first], [indices[i] for i in second]


def _take(indices: list[int], ids: Sequence[int | str], target: dict[int | str, int], seed: int) -> list[int]:
    rng = np.random.default_rng(seed)
    members: dict[int | str, list[int]] = {}
    for index in indices:
        members.setdefault(ids[index], []).append(index)
    return sorted(i for label, own in members.items() for i in rng.permutation(own)[: target[label]].tolist())


def _integers(ids: Sequence[int | str]) -> list[int]:
    order = {class_id: index for index, class_id in enumerate(dict.fromkeys(ids))}
    return [order[class_id] for class_id in ids]


def _check_counts(ids: Sequence[int | str], least: int, parts: str) -> None:
    class_id, count = min(Counter(ids).items(), key=lambda item: item[1], default=(None, 0))
    if count < least:
        raise ValueError(f"class {class_id} has {count} images, too few for {parts}")


def _pairs(path: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        words = line.split(maxsplit=1)
        if len(words) == 1:
            raise ValueError(f"{path}, line {number}: expected an image and what it has, got {line!r}")
        if words:
            found[words[0]] = words[1].strip()
    return found


def _parse_fractions(text: str) -> list[float]:
    try:
        return [float(fraction) for fraction in text.split(",") if fraction]
    except ValueError:
        raise ValueError(f"--fractions must look like 0.1,0.5, got {text!r}") from None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from None


def main() -> None:
    """`python -m mosa_fast.data.split IMAGES [--labels FILE] [--out DIR] [--fractions 0.1,0.5]`."""
    parser = CommandParser(
        prog="python -m mosa_fast.data.split",
        description="Make split files (train.json, val.json, test.json) for the family fgvc, seeded and stratified.",
    )
    parser.add_argument(
        "images", type=user_path, help="folder of class folders, or of CUB's or NABirds' images and lists"
    )
    parser.add_argument("--labels", type=user_path, help="text file, lines '<path> <class id> [train|test]'")
    parser.add_argument("--out", type=user_path, help="folder of the split files (default: the images' folder)")
    parser.add_argument("--val", type=float, default=0.1, help="part of the training images for validation (0.1)")
    parser.add_argument(
        "--test", type=float, default=0.2, help="part of all images for the test, if none is given (0.2)"
    )
    parser.add_argument("--fractions", default="", help="low-resource parts of the training images, as in 0.1,0.5")
    parser.add_argument("--seed", type=int, default=3407, help="fixes every choice (3407)")
    arguments = parser.parse_args()
    with one_line_errors():
        for name in ("val", "test"):
            if not 0.0 < getattr(arguments, name) < 1.0:
                raise ValueError(f"--{name} must be between 0 and 1, got {getattr(arguments, name)}")
        if arguments.seed < 0:
            raise ValueError(f"--seed must be at least 0, got {arguments.seed}")
        if not arguments.images.is_dir():
            raise ValueError(f"no folder {arguments.images}")
        rows = read_labels(arguments.labels) if arguments.labels else find_images(arguments.images)
        fractions = _parse_fractions(arguments.fractions)
        out = arguments.out or arguments.images
        counts = make_split_files(
            rows, out, val=arguments.val, test=arguments.test, fractions=fractions, seed=arguments.seed
        )
        for name, count in counts.items():
            print(f"{out / name}: {count} images")


if __name__ == "__main__":
    main()
