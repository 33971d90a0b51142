"""Recipes: YAML files composed from shared bases, found by path or, in the installed package, by name.

base: [../base/paper.yaml, ../backbones/vit_b16_in21k.yaml]   # relative to this file; later ones win
grid:  # for `mosa_fast.sweep --grid`; a single run takes no notice of it
  optim.lr: [2.0e-4, 5.0e-4]
optim:
  lr: 5.0e-4  # what the file itself says wins over its bases
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, get_loader

from mosa_fast.config import TrainConfig
from mosa_fast.options import facts_of, flat

SECTIONS = {name for name, hint in get_type_hints(TrainConfig).items() if is_dataclass(hint)}
BASE = "base"  # the key that names a recipe's bases
GRID = "grid"  # the key of the values that a sweep tries on validation


def packaged() -> Path:
    """Folder of the recipes that are installed with the package."""
    return Path(str(files("mosa_fast.configs")))


def find_recipe(name: str | Path) -> Path:
    """The file that a path, or the name of an installed recipe such as "fgvc/cub", means.

    Raises:
        ValueError: there is none.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    inside = path.relative_to("configs") if path.parts[:1] == ("configs",) else path
    for candidate in (packaged() / inside, packaged() / f"{inside}.yaml"):
        if candidate.is_file():
            return candidate
    installed = [recipe.relative_to(packaged()).with_suffix("").as_posix() for recipe in packaged().rglob("*.yaml")]
    near = difflib.get_close_matches(inside.as_posix().removesuffix(".yaml"), installed, n=1)
    nearest = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"no recipe {name}: neither a file nor one of those in {packaged()}{nearest}")


def load_recipe(name: str | Path) -> dict[str, Any]:
    """The options of a run, one mapping from a recipe and all its bases.

    Raises:
        ValueError: a file is missing, is not a YAML mapping, or includes itself; or a run has no such option.
    """
    recipe = _load(find_recipe(name), ())
    recipe.pop(GRID, None)
    known = facts_of(TrainConfig)
    unknown = [option for option in flat(recipe) if option not in known]
    if unknown:
        raise ValueError(f"{name}: there is no option {unknown[0]}")
    return recipe


def own_options(name: str | Path) -> dict[str, Any]:
    """The options that a recipe's own file gives, by full name, without those of its bases; errors as `load_recipe`."""
    path = find_recipe(name)
    return flat({key: value for key, value in _read(path).items() if key not in (BASE, GRID)})


def load_grid(name: str | Path) -> dict[str, list[Any]]:
    """The values that a sweep of a recipe tries, by option; empty where it names none.

    Raises:
        ValueError: as `load_recipe`; or the grid is not a mapping of options to lists of values.
    """
    grid = _load(find_recipe(name), ()).get(GRID) or {}
    if not isinstance(grid, dict) or not all(isinstance(values, list) and values for values in grid.values()):
        raise ValueError(f"{name}: {GRID} must be like {{optim.lr: [1.0e-3, 5.0e-3]}}, got {grid!r}")
    return grid


def _load(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    chain = (*above, path.resolve())
    if path.resolve() in above:
        raise ValueError(f"recipes include each other: {' -> '.join(str(file) for file in chain)}")
    if not path.is_file():
        raise ValueError(f"{above[-1]}: no base {path}")
    own = _read(path)
    bases = own.pop(BASE, None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ValueError(f"{path}: base must be a file name or a list of them, got {bases!r}")
    merged: dict[str, Any] = {}
    for base in bases:
        merged = merge(merged, _load(path.parent / base, chain))
    return merge(merged, own)


def _read(path: Path) -> dict[str, Any]:
    """What one file says."""
    try:
        text = path.read_text(encoding="utf-8")
        document = yaml.compose(text, yaml.SafeLoader)
        own = get_loader("yaml")(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    except Exception as error:  # the YAML parser's errors, of several lines
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if document is None:
        raise ValueError(f"{path} is empty: a recipe is a mapping of options")
    if isinstance(document, yaml.MappingNode):
        _check_keys(document, path)
        if isinstance(own, str):  # jsonargparse takes "optim:" for a text
            own = dict.fromkeys(key.value for key, _ in document.value)
    if not isinstance(own, dict):
        raise ValueError(f"{path} must be a mapping of options, it is a {type(own).__name__}")
    for section in SECTIONS & own.keys():
        if not isinstance(own[section], dict):
            raise ValueError(f"{path}: {section} must be a mapping of options, got {own[section]!r}")
    return own


def _check_keys(mapping: yaml.MappingNode, path: Path, above: tuple[yaml.Node, ...] = ()) -> None:
    """Raise ValueError for an option that is given twice, of which YAML would take the last in silence."""
    if mapping in above:
        raise ValueError(f"{path}, line {mapping.start_mark.line + 1}: a mapping is inside itself")
    lines: dict[str, int] = {}
    for key, value in mapping.value:
        line = key.start_mark.line + 1
        if lines.setdefault(str(key.value), line) != line:
            raise ValueError(f"{path} gives {key.value} twice, in lines {lines[str(key.value)]} and {line}")
        if isinstance(value, yaml.MappingNode):
            _check_keys(value, path, (*above, mapping))


def merge(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """`first` with the values of `second` over them, section by section."""
    merged = dict(first)
    for key, value in second.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


class ActionRecipe(ActionConfigFile):
    """`--config RECIPE`, given once or several times; later ones and later options win."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Resolve the recipe and its bases into one mapping, and apply that."""
        try:
            recipe = load_recipe(values)
        except ValueError as error:
            raise TypeError(str(error)) from None  # what jsonargparse reports as the user's mistake
        try:
            self.apply_config(parser, cfg, self.dest, json.dumps(recipe))
        except TypeError as error:
            raise TypeError(f"{values}: {error}") from None
