"""`python -m mosa_fast.sweep --configs "configs/vtab/*.yaml" --seeds 5 [--grid optim.lr=1e-3,5e-3] [--option value]`.

Runs recipes times seeds, each as a `python -m mosa_fast.train` of its own, and prints the table of test accuracies.
Finished runs are skipped, so an interrupted sweep is started again with the same command. With `--grid`, every point
of the grid is first trained once per recipe with the test images unread; the best on validation is what is then run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from mosa_fast.files import write_atomically
from mosa_fast.recipes import find_recipe, load_recipe, packaged

SEARCH = ("--test=false", "--data.mode=tune")  # validation images are held out, test images are not read
FOLDERS_OF_PARTS = ("base", "backbones")  # what recipes are made from
STOPPED = (130, 143, -2, -15)  # exit codes of a run that SIGINT or SIGTERM stopped


@dataclass(frozen=True)
class Run:
    """One training: a recipe with the options that come after it."""

    recipe: Path
    options: tuple[str, ...]
    folder: Path

    def identity(self) -> dict[str, Any]:
        """What decides the run's result; kept beside it."""
        return {"recipe": load_recipe(self.recipe), "options": list(self.options)}

    def summary(self, key: str) -> dict[str, Any] | None:
        """summary.json of the finished run, None if it is not finished.

        Raises:
            ValueError: the folder holds a run with other settings.
        """
        kept = _read_json(self.folder / "sweep.json")
        if kept is not None and kept != self.identity():
            raise ValueError(f"{self.folder} was made with other settings: choose another --out, or remove it")
        summary = _read_json(self.folder / "summary.json")
        return summary if kept is not None and summary is not None and summary.get(key) is not None else None

    def execute(self, key: str) -> dict[str, Any] | None:
        """Train unless it is done; the summary, or None if the run failed.

        Raises:
            KeyboardInterrupt: the run was told to stop.
        """
        done = self.summary(key)
        if done is not None:
            return done
        text = json.dumps(self.identity(), indent=2) + "\n"
        write_atomically(self.folder / "sweep.json", lambda temporary: temporary.write_text(text))
        command = [sys.executable, "-m", "mosa_fast.train", "--config", str(self.recipe), *self.options]
        code = subprocess.run([*command, "--resume", f"--out={self.folder}"]).returncode
        if code in STOPPED or code < 0:
            raise KeyboardInterrupt
        return self.summary(key) if code == 0 else None


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


def parse_grid(items: Sequence[str]) -> list[tuple[str, ...]]:
    """Options of every point of the grid, from items like "optim.lr=1e-3,5e-3"; none without items."""
    axes = []
    for item in items:
        key, _, values = item.partition("=")
        if not key or not all(values.split(",")):
            raise ValueError(f"--grid must look like optim.lr=1e-3,5e-3, got {item!r}")
        axes.append([f"--{key}={value}" for value in values.split(",")])
    return list(product(*axes)) if axes else []


def sweep(
    recipes: dict[str, Path], seeds: int, grid: list[tuple[str, ...]], options: tuple[str, ...], out: Path
) -> tuple[dict[str, list[float | None]], list[str]]:
    """Run everything that is missing.

    Args:
        recipes: by name.
        seeds: runs of each recipe, with its own seed, that plus one, and so on.
        grid: points to choose from on validation; empty: none.
        options: for all runs.
        out: folder of the runs.

    Returns:
        Test accuracy in percent of every recipe and seed (None: the run failed), and what failed, as lines.
    """
    results: dict[str, list[float | None]] = {}
    failed: list[str] = []
    for name, recipe in recipes.items():
        best: tuple[str, ...] = ()
        if grid:
            runs = [Run(recipe, (*options, *p, *SEARCH), out / "search" / name / _label(p)) for p in grid]
            scores = [(run.execute("val_accuracy") or {}).get("val_accuracy") for run in runs]
            failed += [str(run.folder) for run, score in zip(runs, scores, strict=True) if score is None]
            found = [(score, -index) for index, score in enumerate(scores) if score is not None]
            if not found:
                results[name] = [None] * seeds
                continue
            best = grid[-max(found)[1]]
            print(f"{name}: {_label(best)} is best on validation, {max(found)[0]:.2f} %", flush=True)
        first_seed = load_recipe(recipe).get("seed", 3407)
        results[name] = []
        for seed in range(first_seed, first_seed + seeds):
            run = Run(recipe, (*options, *best, f"--seed={seed}"), out / name / f"seed{seed}")
            summary = run.execute("test_accuracy")
            results[name].append(None if summary is None else summary["test_accuracy"])
            failed += [] if summary is not None else [str(run.folder)]
    return results, failed


def groups(recipes: dict[str, Path]) -> dict[str, list[str]]:
    """Names of the recipes of each group that the paper averages over, those with a missing member left out."""
    from mosa_fast.data.fgvc import SETS
    from mosa_fast.data.vtab import GROUPS

    by_task: dict[tuple[str, str, str], str] = {}
    for name, recipe in recipes.items():
        data = load_recipe(recipe).get("data", {})
        # recipes of one folder belong together: fgvc, linear, full and swin are about the same five sets
        by_task[name.split("/")[0], str(data.get("name")), str(data.get("task"))] = name
    found: dict[str, list[str]] = {}
    for folder in dict.fromkeys(folder for folder, _, _ in by_task):
        for family, title, members in [("fgvc", "FGVC", [*SETS]), *(("vtab", t, [*g]) for t, g in GROUPS.items())]:
            own = [by_task[folder, family, task] for task in members if (folder, family, task) in by_task]
            if len(own) == len(members):
                found[f"{folder}: {title} mean"] = own
    return found


def table(results: dict[str, list[float | None]], members: dict[str, list[str]]) -> str:
    """Mean and standard error over seeds for every recipe and group, as a Markdown table.

    A group's value for a seed is the mean of its recipes; it takes the seeds that all of them have.
    """
    lines = ["| recipe | test accuracy, % | standard error | seeds |", "| --- | --- | --- | --- |"]
    for name, scores in results.items():
        lines.append(_row(name, [score for score in scores if score is not None]))
    for title, names in members.items():
        seeds = zip(*(results[name] for name in names), strict=True)
        whole = [[score for score in scores if score is not None] for scores in seeds]
        lines.append(_row(f"**{title}** ({len(names)})", [mean(s) for s in whole if len(s) == len(names)]))
    return "\n".join(lines)


def _row(name: str, scores: list[float]) -> str:
    value = f"{mean(scores):.2f}" if scores else "failed"
    error = f"{stdev(scores) / len(scores) ** 0.5:.2f}" if len(scores) > 1 else "-"
    return f"| {name} | {value} | {error} | {len(scores)} |"


def _label(point: tuple[str, ...]) -> str:
    return "-".join(option.removeprefix("--").replace("/", "_") for option in point)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None  # not there, or cut off


def main() -> None:
    """Sweep as the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m mosa_fast.sweep",
        description="Run recipes times seeds and print the table. Other options go to every mosa_fast.train.",
        allow_abbrev=False,
    )
    parser.add_argument("--configs", nargs="+", required=True, help="recipes: paths, patterns or names")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each recipe (1)")
    parser.add_argument("--grid", nargs="+", default=[], help="tune on validation first: optim.lr=1e-3,5e-3 ...")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"), help="folder of the runs (runs/sweep)")
    arguments, options = parser.parse_known_args()
    try:
        if arguments.seeds < 1:
            raise ValueError(f"--seeds must be at least 1, got {arguments.seeds}")
        recipes = find_recipes(arguments.configs)
        results, failed = sweep(recipes, arguments.seeds, parse_grid(arguments.grid), tuple(options), arguments.out)
        text = table(results, groups(recipes))
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
    print(text)
    write_atomically(arguments.out / "table.md", lambda temporary: temporary.write_text(text + "\n"))
    if failed:
        print(f"{len(failed)} runs failed: {', '.join(failed)}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
