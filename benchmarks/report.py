"""`python -m benchmarks.report [FILE.json ...]`: Markdown tables and plots of the suite's results, beside the files.

`FILE.md` has every table; the plots are those of `benchmarks.plots`. Without arguments: all results in
benchmarks/results/.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.contenders import NO_ADAPTER, NO_ADAPTER_APART
from benchmarks.groups import Group, groups, heading, shape, subject, timed, yardstick
from benchmarks.plots import PLOTS
from benchmarks.results import FOLDER, LEAST_RUNS, Row, markdown_table, publish, read
from benchmarks.spec import BANKS, EVALUATIONS
from mosa_fast.command_line import CommandParser

README_ROWS = {
    NO_ADAPTER: "without adapters",
    "ours, reference": "**ours**",
    "dense": "a dense adapter",
    "paper": "the paper's way",
    "MoSL, reference": "**ours**, low-rank pairs (MoSL)",
    "peft, q and v": "peft's LoRA on q and v",
    "paper, MoSL": "the paper's way of MoSL",
}
PAPERS = ("paper", "paper, MoSL")  # the published way of working; pairs alone are compared with the second


def memory(row: Row) -> float | None:
    """MiB that a training run needs on top of what is there: the peak on a GPU, on a CPU what backward keeps."""
    return row["saved_mib"] if row["peak_mib"] is None else row["peak_mib"]


def taxes(rows: Iterable[Row]) -> list[tuple[str, float, float | None]]:
    """The adapter tax of every contender of a training step: (name, of time, of memory), 0.05 for 5 %.

    Against the same step without adapters, of the same two views, with gradients that reach as deep; whoever runs
    once what the views have in common is measured against a step that does so too.
    """
    found = []
    by_name = timed(rows)
    for name, row in by_name.items():
        base = by_name.get(yardstick(("step",), name))
        if base is None or name in (NO_ADAPTER, NO_ADAPTER_APART):
            continue
        ours, bare = memory(row), memory(base)
        found.append((name, row["ms"] / base["ms"] - 1, None if ours is None or not bare else ours / bare - 1))
    return found


def table(group: Group, rows: list[Row]) -> str:
    """The rows of one measurement; the adapter tax is a column where the case is a training step."""
    case, mode, by_name = group[0], group[-1], timed(rows)
    tax = {name: values for name, *values in taxes(rows)} if case == "step" else {}
    peak = any(row["peak_mib"] is not None for row in rows)
    of_copy = any(row["of_copy"] is not None for row in rows)
    keeps = peak or (mode == "all" and case not in EVALUATIONS)
    paper = next((by_name[name] for name in PAPERS if name in by_name), None)
    against_paper, stored = case not in ("methods", *BANKS), case in ("step", "methods")
    columns = ["", "ms (quartiles)", "images/s", *(["times the paper's speed"] if against_paper else [])]
    columns += ["of the copy's speed"] if of_copy else []
    columns += ["peak, MiB" if peak else "activations, MiB"] if keeps else []
    columns += ["state, MiB"] if stored else []
    columns += ["adapter tax: time", "memory"] if case == "step" else []
    lines = []
    for name, row in by_name.items():
        cells = [name, f"{row['ms']:.2f} ({row['low']:.2f} to {row['high']:.2f})"]
        cells += [f"{row['images_per_s']:,.{0 if row['images_per_s'] >= 100 else 1}f}"]
        cells += ["" if paper is None else f"{paper['ms'] / row['ms']:.2f}"] if against_paper else []
        cells += [_number(row["of_copy"], "{:.2f}")] if of_copy else []
        cells += [_number(memory(row), "{:,.0f}")] if keeps else []
        cells += [_number(row["state_mib"], "{:,.1f}")] if stored else []
        if case == "step":
            time, space = tax.get(name, (None, None))
            cells += [_number(time, "{:+.1%}"), _number(space, "{:+.1%}")]
        lines.append(cells)
    what = subject(group)
    parts = [f"**{what[0].upper()}{what[1:]}**: {shape(group)}", markdown_table(columns, lines)]
    runs = min((row["runs"] for row in by_name.values()), default=LEAST_RUNS)
    notes = [f"Few runs: {runs}, since there was no time for more."] if runs < LEAST_RUNS else []
    missing = [f"{row['contender']} ({row['reason']})" for row in rows if row["ms"] is None]
    notes += [f"Not timed: {'; '.join(missing)}."] if missing else []
    return "\n\n".join([*parts, *([" ".join(notes)] if notes else [])])


def readme_table(results: dict[str, Any]) -> str:
    """What the README shows: of the training step, the fewest columns, and not every variant."""
    found = next(rows for group, rows in groups(results).items() if group[0] == "step")
    by_name, tax = timed(found), {name: time for name, time, _ in taxes(found)}
    columns = ("a training step", "ms", "kept for backward, MiB", "adapter tax")
    lines = [
        [
            words,
            f"{by_name[name]['ms']:.0f} ({by_name[name]['low']:.0f} to {by_name[name]['high']:.0f})",
            _number(memory(by_name[name]), "{:.0f}"),
            _number(tax.get(name), "{:+.1%}"),
        ]
        for name, words in README_ROWS.items()
    ]
    return markdown_table(columns, lines)


def markdown(results: dict[str, Any]) -> str:
    """Everything."""
    machine = ", ".join(f"{name} {value:,}" for name, value in results["machine"].items())
    tables = [table(group, rows) for group, rows in groups(results).items()]
    return "\n\n".join(["# The suite's results", heading(results), f"The machine: {machine}.", *tables]) + "\n"


def reliability_table(campaigns: dict[str, Any]) -> str:
    """What CONTRIBUTING.md shows of results/campaign.json: what was tried at random, how often it went as it should."""
    rows = [
        (
            name + (f" ({found['kills']} kills)" if "kills" in found else ""),
            f"{found['tried']:,}",
            f"{found['right']:,}",
        )
        for name, found in campaigns.items()
    ]
    return markdown_table(("campaign", "tried", "right"), rows)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def main() -> None:
    parser = CommandParser(prog="python -m benchmarks.report", description="Tables and plots of the suite's results.")
    parser.add_argument(
        "files", type=Path, nargs="*", metavar="FILE.json", help="results; default: all in benchmarks/results"
    )
    options = parser.parse_args()
    files = options.files or sorted(FOLDER.glob("suite_*.json"))
    if not files:
        parser.error("there are no results yet: python -m benchmarks makes them")
    for path in files:
        try:
            results = read(path)
        except ValueError as error:
            parser.error(str(error))
        publish(results, path, markdown(results), PLOTS)


if __name__ == "__main__":
    main()
