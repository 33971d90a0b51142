"""`python -m mosa_fast.sweep --configs PATTERN --seeds 5 [--grid ...] [--option value]`: many runs, as one table.

Runs recipes times seeds, each as a `python -m mosa_fast.train` of its own, and prints the table of test accuracies.
Finished runs are skipped, so an interrupted sweep is started again with the same command.

`--grid optim.lr=1e-3,5e-3`: every point of the grid is first trained once per recipe with the test images unread; the
best on validation, where several tie the one with the smallest values, is what is then run. Without values, each
recipe's own `grid` is taken.
`--vary data.shots=10,50 optim.epochs=60,12`: every recipe is run with the first value of each option, then with the
second; given again, with all combinations.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from glob import glob
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from mosa_fast.config import TrainConfig
from mosa_fast.files import write_atomically
from mosa_fast.recipes import find_recipe, load_grid, load_recipe, packaged
from mosa_fast.run_folder import RunFolder
from mosa_fast.sweep_table import Options, Results, Row, groups, make_rows, table

SEARCH = ("--test=false", "--data.mode=tune")  # validation images are held out, test images are not read
FOLDERS_OF_PARTS = ("base", "backbones", "methods")  # what recipes are made from
STOPPED = (130, 143, -2, -15)  # exit codes of a run that SIGINT or SIGTERM stopped
TABLE = "table.md"

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Run:
    """One training: a recipe with the options that come after it."""

    recipe: Path
    options: Options
    folder: RunFolder

    def identity(self) -> dict[str, Any]:
        """What decides the run's result; kept beside it."""
        return {"recipe": load_recipe(self.recipe), "options": list(self.options)}

    def summary(self, key: str) -> dict[str, Any] | None:
        """The finished run's summary, None if it is not finished.

        Raises:
            ValueError: the folder holds a run with other settings.
        """
        kept = _read(self.folder.read_sweep)
        if kept is not None and kept != self.identity():
            raise ValueError(f"{self.folder} was made with other settings: choose another --out, or remove it")
        summary = _read(self.folder.read_summary)
        return summary if kept is not None and summary is not None and summary.get(key) is not None else None

    def execute(self, key: str) -> dict[str, Any] | None:
        """Train unless it is done; the summary, or None if the run failed.

        Raises:
            KeyboardInterrupt: the run was told to stop.
        """
        done = self.summary(key)
        if done is not None:
            return done
        self.folder.write_sweep(self.identity())
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


def parse_grid(items: Sequence[str]) -> list[Options]:
    """Options of every point of the grid, from items like "optim.lr=1e-3,5e-3"; none without items."""
    axes = [[f"--{key}={value}" for value in values] for key, values in (_axis("--grid", item) for item in items)]
    return list(product(*axes)) if axes else []


def own_grid(recipe: Path) -> list[Options]:
    """Options of every point of a recipe's own grid; none where it has none."""
    axes = [[f"--{key}={value}" for value in values] for key, values in load_grid(recipe).items()]
    return list(product(*axes)) if axes else []


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
        axes = [_axis("--vary", item) for item in items]
        if len({len(values) for _, values in axes}) > 1:
            raise ValueError(f"--vary needs as many values for each option, got {' '.join(items)}")
        if len(set(axes[0][1])) < len(axes[0][1]):
            raise ValueError(f"--vary: the values of {axes[0][0]} must differ")
        options = [[f"--{key}={value}" for value in values] for key, values in axes]
        choices.append(list(zip(*options, strict=True)))
    return {_label(tuple(part[0] for part in parts)): sum(parts, ()) for parts in product(*choices)}


def parse_seeds(text: str) -> list[int] | int:
    """A number of seeds, or the seeds themselves from "1,2,3"."""
    try:
        seeds = [int(word) for word in text.split(",") if word]
    except ValueError:
        raise ValueError(f"--seeds must be a number of seeds, or seeds as in 1,2,3; got {text!r}") from None
    if "," in text and seeds:
        return seeds
    if not seeds or seeds[0] < 1:
        raise ValueError(f"--seeds must be at least 1, got {text}")
    return seeds[0]


def sweep(
    rows: Sequence[Row], seeds: Sequence[int] | int, grid: list[Options] | None, out: Path, processes: int = 1
) -> Results:
    """Run everything that is missing.

    Args:
        rows: of the table.
        seeds: of the runs of each row; a number: so many, from the recipe's own on.
        grid: points to choose from on validation; empty: nothing is searched; None: each recipe's own.
        out: folder of the runs.
        processes: runs at the same time.

    Raises:
        ValueError: a folder holds a run with other settings.
        KeyboardInterrupt: a run was told to stop.
    """
    points = {row: own_grid(row.recipe) if grid is None else grid for row in rows}
    searches = {
        (row, point): Run(
            row.recipe,
            (*row.options, *point, *SEARCH),
            RunFolder(out.joinpath("search", row.name, row.variant, _label(point))),
        )
        for row in rows
        for point in points[row]
    }
    found = _execute_all(searches, "val_accuracy", processes)
    best: dict[Row, Options] = {row: () for row in rows if not points[row]}
    for row in rows:
        scores = {point: summary["val_accuracy"] for point in points[row] if (summary := found[row, point])}
        if scores:
            best[row] = min(scores, key=lambda point: (-scores[point], [*map(_size, point)]))
            print(f"{row.title}: {_label(best[row])} is best on validation, {scores[best[row]]:.2f} %", flush=True)

    runs = {}
    for row, point in best.items():
        first = load_recipe(row.recipe).get("seed", TrainConfig().seed)
        for seed in range(first, first + seeds) if isinstance(seeds, int) else seeds:
            folder = RunFolder(out.joinpath(row.name, row.variant, f"seed{seed}"))
            runs[row, seed] = Run(row.recipe, (*row.options, *point, f"--seed={seed}"), folder)
    summaries = _execute_all(runs, "test_accuracy", processes)

    results = Results()
    for row in rows:
        own = [summary for (owner, _), summary in summaries.items() if owner == row]
        # Where no point of its grid could be trained, nothing was.
        own = own or [None] * (seeds if isinstance(seeds, int) else len(seeds))
        results.accuracies[row.title] = [None if summary is None else summary["test_accuracy"] for summary in own]
        for summary in own:
            if summary is not None and "trained_weights" in summary:
                results.trained_weights[row.title] = summary["trained_weights"] + summary["head_weights"]
    results.failed = [str(searches[key].folder) for key, summary in found.items() if summary is None]
    results.failed += [str(runs[key].folder) for key, summary in summaries.items() if summary is None]
    return results


def _execute_all(runs: Mapping[Key, Run], key: str, processes: int) -> dict[Key, dict[str, Any] | None]:
    """The runs' summaries, in order; so many at a time."""
    if processes == 1:
        return {name: run.execute(key) for name, run in runs.items()}
    with ThreadPoolExecutor(processes) as pool:  # its threads wait for processes
        futures = {name: pool.submit(run.execute, key) for name, run in runs.items()}
        try:
            return {name: future.result() for name, future in futures.items()}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _axis(flag: str, item: str) -> tuple[str, list[str]]:
    key, _, values = item.partition("=")
    if not key or not all(values.split(",")):
        raise ValueError(f"{flag} must look like optim.lr=1e-3,5e-3, got {item!r}")
    return key, values.split(",")


def _size(option: str) -> float:
    """Of an option's value, where it is a number."""
    try:
        return float(option.partition("=")[2])
    except ValueError:
        return 0.0


def _label(point: Options) -> str:
    return "-".join(option.removeprefix("--").replace("/", "_") for option in point)


def _read(read: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    try:
        return read()
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
    parser.add_argument("--seeds", default="1", help="runs of each recipe (1), or their seeds as in 1,2,3")
    parser.add_argument(
        "--grid", nargs="*", help="tune on validation first: optim.lr=1e-3,5e-3 ...; without values: the recipes' grids"
    )
    parser.add_argument(
        "--vary",
        nargs="+",
        action="append",
        default=[],
        help="run each recipe with the first value of each option, then with the second: data.shots=10,50 ...",
    )
    parser.add_argument("--processes", type=int, default=1, help="runs at the same time, which divide the cores (1)")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"), help="folder of the runs (runs/sweep)")
    arguments, options = parser.parse_known_args()
    try:
        if arguments.processes < 1:
            raise ValueError(f"--processes must be at least 1, got {arguments.processes}")
        if arguments.processes > 1:
            threads = max(1, (os.cpu_count() or 1) // arguments.processes)
            os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # the runs inherit it
        rows = make_rows(find_recipes(arguments.configs), tuple(options), parse_variants(arguments.vary))
        grid = None if arguments.grid == [] else parse_grid(arguments.grid or [])
        results = sweep(rows, parse_seeds(arguments.seeds), grid, arguments.out, arguments.processes)
        text = table(results, groups(rows))
    except ValueError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        raise SystemExit(130) from None
    print(text)
    write_atomically(arguments.out / TABLE, lambda temporary: temporary.write_text(text + "\n"))
    if results.failed:
        print(f"{len(results.failed)} runs failed: {', '.join(results.failed)}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
