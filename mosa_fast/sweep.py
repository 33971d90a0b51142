"""`python -m mosa_fast.sweep --configs PATTERN --seeds 5 [--grid ...] [--option value]`: many runs, as one table.

Runs recipes times seeds, each as a `python -m mosa_fast.train` of its own, and prints the table of test accuracies.
Finished runs are skipped, so an interrupted sweep is started again with the same command.

`--grid optim.lr=1e-3,5e-3`: the points of the grid are first trained per recipe with the test images unread; the best
on validation, where several tie the one with the smallest values, is what is then run. Without values, each recipe's
own `grid` is taken.
`--search uphill` trains only the points on the way from the middle of the grid to its summit.
`--vary data.shots=10,50 optim.epochs=60,12`: every recipe is run with the first value of each option, then with the
second; given again, with all combinations.
`--records FILE`: a line of JSON for every finished run, with its commit. A line that is there stands for its run where
the run's folder is not.
`--engine ray`: runs are tasks of a cluster (mosa_fast/sweeps/cluster.py).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mosa_fast.command_line import CommandParser, leave, names_of, one_line_errors, user_path
from mosa_fast.files import write_text
from mosa_fast.options import counted
from mosa_fast.recipes import load_grid
from mosa_fast.run_options import parse_options
from mosa_fast.sweeps.arguments import Grid, find_recipes, parse_grid, parse_seeds, parse_variants
from mosa_fast.sweeps.runs import Start, as_process
from mosa_fast.sweeps.sweep import SEARCHES, sweep
from mosa_fast.sweeps.table import Row, groups, make_rows, table

TABLE = "table.md"


def engine(arguments: argparse.Namespace) -> tuple[Start, int]:
    """What trains, and how many runs at the same time.

    Raises:
        ValueError: a number is too small, or the engine is not there.
    """
    if arguments.processes is not None and arguments.processes < 1:
        raise ValueError(f"--processes must be at least 1, got {arguments.processes}")
    if arguments.engine == "ray":
        from mosa_fast.sweeps.cluster import Tasks, fitting

        start = Tasks(arguments.cpus, arguments.gpus)
        return start, arguments.processes or fitting(arguments.cpus, arguments.gpus)
    processes = arguments.processes or 1
    if processes > 1:
        threads = max(1, (os.cpu_count() or 1) // processes)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # the runs inherit it
    return as_process, processes


def main() -> None:
    """Sweep as the command line says."""
    parser = CommandParser(
        prog="python -m mosa_fast.sweep",
        description="Run recipes times seeds and print the table. Other options go to every mosa_fast.train.",
        allow_abbrev=False,
    )
    parser.add_argument("--configs", nargs="+", required=True, help="recipes: paths, patterns or names")
    parser.add_argument("--seeds", default="1", help="runs of each recipe (1), or their seeds as in 1,2,3")
    parser.add_argument(
        "--grid", nargs="*", help="tune on validation first: optim.lr=1e-3,5e-3 ...; without values: the recipes' grids"
    )
    parser.add_argument("--search", choices=[*SEARCHES], default="everywhere", help="points of the grid (everywhere)")
    parser.add_argument("--search-seeds", help="as --seeds, for each point of the grid; their mean counts")
    parser.add_argument("--seed-options", nargs="+", default=["seed"], help="options that get a run's seed (seed)")
    parser.add_argument(
        "--vary",
        nargs="+",
        action="append",
        default=[],
        help="run each recipe with the first value of each option, then with the second: data.shots=10,50 ...",
    )
    parser.add_argument(
        "--processes",
        type=int,
        help="runs at the same time, which divide the cores (1; ray: what the cluster has room for)",
    )
    parser.add_argument("--engine", choices=("processes", "ray"), default="processes", help="what trains (processes)")
    parser.add_argument("--cpus", type=float, default=1, help="engine ray: CPUs that each run asks for (1)")
    parser.add_argument("--gpus", type=float, default=0, help="engine ray: GPUs that each run asks for (0)")
    parser.add_argument(
        "--records", type=user_path, help="file of a line of JSON for every finished run; its runs are done"
    )
    parser.add_argument("--out", type=user_path, default=Path("runs/sweep"), help="folder of the runs (runs/sweep)")
    arguments, options = parser.parse_known_args()
    with one_line_errors():
        if any(option.split("=")[0] == "--test" for option in options):
            raise ValueError("--test is no option of a sweep: its table is of test accuracies")
        if arguments.grid is None and (arguments.search != "everywhere" or arguments.search_seeds):
            raise ValueError("--search and --search-seeds are for a grid: give --grid")
        variants = parse_variants(arguments.vary)
        rows = make_rows(find_recipes(arguments.configs), tuple(options), variants)
        seeds = parse_seeds(arguments.seeds)
        grid = None if arguments.grid == [] else parse_grid(arguments.grid or [])
        search_seeds = parse_seeds(arguments.search_seeds, "--search-seeds") if arguments.search_seeds else None
        # A search without seeds of its own takes the one that the options give.
        seeded = arguments.seed_options if arguments.grid is None or search_seeds is not None else []
        varied = names_of(next(iter(variants.values())))
        check_once([*dict.fromkeys(names_of(options)), *varied], rows, grid, seeded)
        check_rows(rows, grid)
        start, processes = engine(arguments)
        try:
            results = sweep(
                rows,
                seeds,
                grid,
                arguments.out,
                processes,
                search=arguments.search,
                search_seeds=search_seeds,
                seed_options=arguments.seed_options,
                records=arguments.records,
                start=start,
            )
        except KeyboardInterrupt:
            print("stopped; the same command goes on from here", file=sys.stderr)
            leave(130)
        text = table(results, groups(rows))
        print(text)
        write_text(arguments.out / TABLE, text + "\n")
    if results.failed:
        print(f"{counted(len(results.failed), 'run')} failed: {', '.join(results.failed)}", file=sys.stderr)
        leave(1)


def check_once(given: Sequence[str], rows: Sequence[Row], grid: Grid | None, seeded: Sequence[str]) -> None:
    """Raise ValueError for an option that would mean nothing, since something else sets it after that.

    Args:
        given: names of the options of all rows, and of those that `--vary` sets.
        rows, grid: of the sweep.
        seeded: options that get the seeds of all runs.
    """
    for row in rows:
        names = [*given, *(load_grid(row.recipe) if grid is None else grid)]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name} is set twice, among the options, --vary and the grid: leave one of them out")
            if name in seeded:
                raise ValueError(f"{name} is set by --seeds: give the seeds there, as in --seeds 1,2,3")


def check_rows(rows: Sequence[Row], grid: Grid | None) -> None:
    """Leave with one line and code 2 where the options of a row, or its grid's first values, are none of a run's.

    Better now than from each training.

    Raises:
        ValueError: a value is out of range.
    """
    for row in rows:
        axes = load_grid(row.recipe) if grid is None else grid
        point = [f"--{option}={values[0]}" for option, values in axes.items()]
        parse_options(["--config", str(row.recipe), *row.options, *point], "sweep", "")


if __name__ == "__main__":
    main()
