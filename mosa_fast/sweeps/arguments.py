"""What the words of a sweep's command line mean: recipes, grids, variants, seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from glob import glob
from itertools import product
from pathlib import Path
from typing import Any

from mosa_fast.recipes import find_recipe, packaged
from mosa_fast.sweeps.table import Options

FOLDERS_OF_PARTS = ("base", "backbones", "methods")  # what recipes are made from

Grid = Mapping[str, Sequence[Any]]  # values by option


def find_recipes(patterns: Sequence[str]) -> dict[str, Path]:
    """Recipes by name: files that the patterns match here, else in the installed package.

    Raises:
        ValueError: a pattern matches nothing.
    """
    found: dict[str, Path] = {}
    for pattern in patterns:
        paths = [Path(name) for name in sorted(glob(pattern))]
        if not paths:
            inside = pattern.removeprefix("configs/").removesuffix(".yaml")
            paths = sorted(packaged().glob(f"{inside}.yaml"))
        paths = [path for path in paths if path.is_file() and path.resolve().parent.name not in FOLDERS_OF_PARTS]
        if not paths:
            paths = [find_recipe(pattern)]
        for path in paths:
            name = f"{path.resolve().parent.name}/{path.stem}"
            if found.setdefault(name, path) != path:
                raise ValueError(f"two recipes are called {name}: {found[name]} and {path}")
    return found


def parse_grid(items: Sequence[str]) -> Grid:
    """The grid from items like "optim.lr=1e-3,5e-3"; ValueError for others, and for an option or a value twice."""
    axes = _axes("--grid", items)
    for key, values in axes:
        _check_differ(f"--grid {key}", values)
    return dict(axes)


def parse_variants(groups: Sequence[Sequence[str]]) -> dict[str, Options]:
    """What every recipe is run with, by name: for each group one of its options' values, those at the same place.

    Args:
        groups: of items like "data.shots=10,50"; a variant is called by the first of each group.

    Raises:
        ValueError: an item is something else, the options of a group have different numbers of values, or two variants
            would be called the same.
    """
    choices = []
    for items in groups:
        axes = _axes("--vary", items)
        if len({len(values) for _, values in axes}) > 1:
            raise ValueError(f"--vary needs as many values for each option, got {' '.join(items)}")
        _check_differ(f"--vary {axes[0][0]}", axes[0][1])
        options = [[f"--{key}={value}" for value in values] for key, values in axes]
        choices.append(list(zip(*options, strict=True)))
    return {label(tuple(part[0] for part in parts)): sum(parts, ()) for parts in product(*choices)}


def parse_seeds(text: str, flag: str = "--seeds") -> list[int] | int:
    """A number of seeds, or the seeds themselves from "1,2,3"; ValueError, which names the flag, for anything else."""
    try:
        seeds = [int(word) for word in text.split(",") if word]
    except ValueError:
        raise ValueError(f"{flag} must be a number of seeds, or seeds as in 1,2,3; got {text!r}") from None
    if "," in text and seeds:
        _check_differ(flag, seeds)
        return seeds
    if not seeds or seeds[0] < 1:
        raise ValueError(f"{flag} must be at least 1, got {text}")
    return seeds[0]


def label(point: Options) -> str:
    """What folders and tables call a point of the grid, or a variant."""
    return "-".join(option.removeprefix("--").replace("/", "_") for option in point)


def _check_differ(what: str, values: Sequence[object]) -> None:
    """Raise ValueError for a value that is there twice: its runs would be the same run, in one folder."""
    twice = next((value for value in values if values.count(value) > 1), None)
    if twice is not None:
        raise ValueError(f"{what} gives {twice} twice")


def _axes(flag: str, items: Sequence[str]) -> list[tuple[str, list[str]]]:
    axes: dict[str, list[str]] = {}
    for item in items:
        key, _, values = item.partition("=")
        if not key or not all(values.split(",")):
            raise ValueError(f"{flag} must look like optim.lr=1e-3,5e-3, got {item!r}")
        if key in axes:
            raise ValueError(f"{flag} gives {key} twice: write {key}={','.join(axes[key])},{values}")
        axes[key] = values.split(",")
    return list(axes.items())
