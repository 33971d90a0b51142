"""Everything that a sweep runs: each row's search on validation, then its seeds on test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from mosa_fast.config import TrainConfig
from mosa_fast.recipes import load_grid, load_recipe
from mosa_fast.run_folder import RunFolder
from mosa_fast.sweeps.arguments import Grid, label
from mosa_fast.sweeps.jobs import Job, execute
from mosa_fast.sweeps.records import Records
from mosa_fast.sweeps.runs import Run, Start, Summary, as_process
from mosa_fast.sweeps.search import Place, Search, best_of, everywhere, uphill
from mosa_fast.sweeps.table import Options, Results, Row

HELD_BACK = ("--test=false", "--data.mode=tune")  # in a search validation images are held out, test images not read
SEARCHES = {"everywhere": everywhere, "uphill": uphill}


def sweep(
    rows: Sequence[Row],
    seeds: Sequence[int] | int,
    grid: Grid | None,
    out: Path,
    processes: int = 1,
    *,
    search: str = "everywhere",
    search_seeds: Sequence[int] | int | None = None,
    seed_options: Sequence[str] = ("seed",),
    records: Path | None = None,
    start: Start = as_process,
) -> Results:
    """Run everything that is missing.

    Args:
        rows: of the table.
        seeds: of the runs of each row; a number: so many, from the recipe's own on.
        grid: what is chosen from on validation; empty: nothing is searched; None: each recipe's own.
        out: folder of the runs.
        processes: runs at the same time.
        search: key of SEARCHES.
        search_seeds: of the runs at each point of the grid, whose mean counts; None: one run with the recipe's own.
        seed_options: options that get a run's seed.
        records: file that gets a line for every finished run, and whose lines are finished runs (`Records`).
        start: what trains.

    Raises:
        ValueError: a folder holds a run with other settings.
        KeyboardInterrupt: a run was told to stop.
    """

    def run(row: Row, point: Options, seed: int | None, *, is_search: bool) -> Run:
        own = () if seed is None else tuple(f"--{option}={seed}" for option in seed_options)
        options = (*row.options, *point, *(HELD_BACK if is_search else ()), *own)
        where = ("search", row.name, row.variant, label(point)) if is_search else (row.name, row.variant)
        folder = RunFolder(out.joinpath(*where, *(() if seed is None else (f"seed{seed}",))))
        labels = {"recipe": row.name, "options": [*row.options, *point], "seed": seed, "search": is_search}
        return Run(row.recipe, options, folder, "val_accuracy" if is_search else "test_accuracy", labels)

    def choose(row: Row, axes: Grid, first: int) -> Job[Options | None]:
        """The best point of the grid; None where none could be trained."""
        values = {option: sorted(map(str, own), key=_size) for option, own in axes.items()}

        def point(place: Place) -> Options:
            return tuple(f"--{option}={own[i]}" for (option, own), i in zip(values.items(), place, strict=True))

        own_seeds = [None] if search_seeds is None else _spread(search_seeds, first)
        places: Search = SEARCHES[search]([len(own) for own in values.values()])
        wanted = next(places)
        while True:
            runs = [run(row, point(place), seed, is_search=True) for place in wanted for seed in own_seeds]
            found = yield runs
            failed = [str(run.folder) for run, summary in zip(runs, found, strict=True) if summary is None]
            results.failed += failed
            scores: dict[Place, float | None] = {}
            for i, place in enumerate(wanted):
                summaries = found[i * len(own_seeds) : (i + 1) * len(own_seeds)]
                accuracies = [summary["val_accuracy"] for summary in summaries if summary is not None]
                scores[place] = mean(accuracies) if len(accuracies) == len(own_seeds) else None
            try:
                wanted = places.send(scores)
            except StopIteration as end:
                known: dict[Place, float] = end.value
                break
        if not known:
            return None
        best = best_of(known)
        edges = [o for (o, own), i in zip(values.items(), best, strict=True) if len(own) > 1 and i in (0, len(own) - 1)]
        note = f" (at the edge of the grid: {', '.join(edges)})" if edges else ""
        print(f"{row.title}: {label(point(best))} is best on validation, {known[best]:.2f} %{note}", flush=True)
        return point(best)

    def job(row: Row) -> Job[list[Summary | None]]:
        first = load_recipe(row.recipe).get("seed", TrainConfig().seed)
        axes = load_grid(row.recipe) if grid is None else grid
        own_seeds = _spread(seeds, first)
        best: Options | None = ()
        if axes:
            best = yield from choose(row, axes, first)
        if best is None:
            return [None] * len(own_seeds)
        runs = [run(row, best, seed, is_search=False) for seed in own_seeds]
        found = yield runs
        results.failed += [str(run.folder) for run, summary in zip(runs, found, strict=True) if summary is None]
        return found

    results = Results()
    for row, summaries in zip(rows, execute([*map(job, rows)], processes, Records(records), start), strict=True):
        results.accuracies[row.title] = [None if summary is None else summary["test_accuracy"] for summary in summaries]
        for summary in summaries:
            if summary is not None and "trained_weights" in summary:
                results.trained_weights[row.title] = summary["trained_weights"] + summary["head_weights"]
    return results


def _spread(seeds: Sequence[int] | int, first: int) -> Sequence[int]:
    """The seeds themselves, or so many from the first on."""
    return range(first, first + seeds) if isinstance(seeds, int) else seeds


def _size(value: str) -> float:
    """Of an option's value, where it is a number."""
    try:
        return float(value)
    except ValueError:
        return 0.0
