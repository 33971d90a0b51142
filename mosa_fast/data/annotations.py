"""From lists of files with class ids to splits: one map of ids for all parts, names from folders."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

ClassId = int | str
Listed = list[tuple[str, ClassId]]  # (path relative to the images' folder, class id)


def class_labels(parts: Sequence[Listed]) -> dict[ClassId, int]:
    """Labels 0..C-1 of the sorted ids of ALL parts: a class that one part lacks shifts nothing.

    Raises:
        ValueError: ids are numbers in some places and text in others.
    """
    ids = {class_id for part in parts for _, class_id in part}
    if len({type(class_id) for class_id in ids}) > 1:
        raise ValueError("class ids must be all numbers or all text")
    return {class_id: label for label, class_id in enumerate(sorted(ids))}


def class_names(parts: Sequence[Listed], labels: dict[ClassId, int], lookup: dict[int, str]) -> list[str]:
    """Names of the classes: those of their folders where every class has one of its own, else their ids.

    Args:
        parts: all parts.
        labels: label of every id.
        lookup: names of folders that are numbers (NABirds' classes.txt), empty where there is none.
    """
    folders: dict[ClassId, set[str]] = {class_id: set() for class_id in labels}
    for part in parts:
        for path, class_id in part:
            folders[class_id].add(PurePosixPath(path).parent.name)
    single = [next(iter(names)) for names in folders.values() if len(names) == 1]
    if "" in single or len(set(single)) < len(labels):
        return [str(class_id) for class_id in labels]
    return [_readable(next(iter(folders[class_id])), lookup) for class_id in labels]


def _readable(folder: str, lookup: dict[int, str]) -> str:
    if folder.isdigit():
        return lookup.get(int(folder), folder)
    # "001.Black_footed_Albatross" of CUB, "n02085620-Chihuahua" of Stanford Dogs
    return re.sub(r"^(\d+\.|n\d{8}-)", "", folder).replace("_", " ")


def check_files(paths: Sequence[str], source: Path) -> None:
    """Raise ValueError if files that a list names are missing."""
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(paths)} images that {source} lists are missing, the first is {missing[0]}; "
            f"is data.root right?"
        )


def check_class_count(found: int, expected: int, source: str) -> None:
    """Raise ValueError for more classes than a data set has; warn of fewer."""
    if found > expected:
        raise ValueError(f"{source} has {expected} classes, but its split files name {found}")
    if found < expected:
        warnings.warn(f"{source} has {expected} classes, these split files name {found}", stacklevel=3)


def read_text(path: Path, fix: str) -> str:
    """Contents of a text file; ValueError, with `fix`, if it is missing or is not text."""
    if not path.is_file():
        raise ValueError(f"no file {path}: {fix}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file: {fix}") from None


def read_lines(path: Path, fix: str, parse: Callable[[str], tuple[str, int]]) -> list[tuple[str, int]]:
    """Every non-empty line through `parse`; ValueError names the file and the line that fails."""
    rows = []
    for number, line in enumerate(read_text(path, fix).splitlines(), 1):
        if line.strip():
            try:
                rows.append(parse(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    if not rows:
        raise ValueError(f"{path} is empty: {fix}")
    return rows
