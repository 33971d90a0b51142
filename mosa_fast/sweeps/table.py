"""What a sweep found, as the table that it prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

from mosa_fast.recipes import load_recipe

Options = tuple[str, ...]  # words of a command line
NO_VARIANTS: Mapping[str, Options] = {"": ()}


@dataclass(frozen=True)
class Row:
    """One row: a recipe, and what `--vary` makes of it.

    Attributes:
        name: of the recipe.
        recipe: its file.
        variant: what `--vary` sets, in short; empty where it sets nothing.
        options: that come after the recipe.
    """

    name: str
    recipe: Path
    variant: str
    options: Options

    @property
    def title(self) -> str:
        """What the table calls it."""
        return _title(self.name, self.variant)


@dataclass
class Results:
    """What a sweep found, by the titles of the rows.

    Attributes:
        accuracies: test accuracy in percent for every seed; None: the run failed.
        trained_weights: number of trained weights, with the head.
        failed: folders of the runs that failed.
    """

    accuracies: dict[str, list[float | None]] = field(default_factory=dict)
    trained_weights: dict[str, int] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)


def make_rows(
    recipes: Mapping[str, Path], options: Options = (), variants: Mapping[str, Options] = NO_VARIANTS
) -> list[Row]:
    """Every recipe with every variant.

    Args:
        recipes: by name.
        options: for all of them.
        variants: options of each, by name.
    """
    return [
        Row(name, recipe, variant, (*options, *own))
        for name, recipe in recipes.items()
        for variant, own in variants.items()
    ]


def groups(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Titles of the rows of each group that the paper averages over, those with a missing member left out."""
    from mosa_fast.data.fgvc import SETS
    from mosa_fast.data.vtab import GROUPS

    tables = {"FGVC": ("fgvc", [*SETS]), **{title: ("vtab", [*tasks]) for title, tasks in GROUPS.items()}}
    # recipes of one folder belong together: fgvc, linear, full and swin are about the same five sets
    by_task: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
    for row in rows:
        data = load_recipe(row.recipe).get("data", {})
        together = by_task.setdefault((row.name.split("/")[0], row.variant), {})
        together[str(data.get("name")), str(data.get("task"))] = row.title
    found: dict[str, list[str]] = {}
    for (folder, variant), titles in by_task.items():
        for title, (family, tasks) in tables.items():
            own = [titles[family, task] for task in tasks if (family, task) in titles]
            if len(own) == len(tasks):
                found[_title(f"{folder}: {title} mean", variant)] = own
    return found


def table(results: Results, members: dict[str, list[str]]) -> str:
    """Mean and standard error over seeds for every row and group, as a Markdown table.

    A group's value for a seed is the mean of its rows; it takes the seeds that all of them have.
    """
    lines = [
        "| recipe | test accuracy, % | standard error | seeds | trained weights |",
        "| --- | --- | --- | --- | --- |",
    ]
    for title, accuracies in results.accuracies.items():
        weights = results.trained_weights.get(title)
        lines.append(_row(title, [score for score in accuracies if score is not None], weights))
    for title, names in members.items():
        seeds = zip(*(results.accuracies[name] for name in names), strict=True)
        whole = [[score for score in scores if score is not None] for scores in seeds]
        lines.append(_row(f"**{title}** ({len(names)})", [mean(s) for s in whole if len(s) == len(names)], None))
    return "\n".join(lines)


def _row(name: str, scores: list[float], weights: int | None) -> str:
    value = f"{mean(scores):.2f}" if scores else "failed"
    error = f"{stdev(scores) / len(scores) ** 0.5:.2f}" if len(scores) > 1 else "-"
    return f"| {name} | {value} | {error} | {len(scores)} | {'-' if weights is None else f'{weights:,}'} |"


def _title(name: str, variant: str) -> str:
    return f"{name}, {variant}" if variant else name
