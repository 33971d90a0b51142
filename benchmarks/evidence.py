"""`python -m benchmarks.evidence [FILE.jsonl]`: the tables and plots of docs/evidence.md.

They are written beside the file: `FILE.md` has a table for every data set, number of images and schedule; the plots are
those of `benchmarks.evidence_plots`. The file is what benchmarks/evidence.sh makes; without an argument, the one in
benchmarks/results/.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from benchmarks.evidence_plots import PLOTS
from benchmarks.evidence_rows import DATA, METHODS, YARDSTICK, Estimate, Evidence, Row, collect, read
from benchmarks.results import FOLDER, markdown_table, publish
from mosa_fast.command_line import CommandParser

RESULTS = FOLDER / "evidence.jsonl"


def table(rows: Mapping[str, Row]) -> str:
    """All methods at one setting, each with its difference to the dense adapter."""
    columns = ("", "trained weights", "rate", "scale", "seeds", "test accuracy, %", "minus dense adapter", "")
    lines = []
    for name, row in rows.items():
        difference = row.minus(rows[YARDSTICK]) if YARDSTICK in rows and name != YARDSTICK else None
        cells = [METHODS[name], f"{row.trained:,}", *(row.point.get(key, "") for key in ("optim.lr", "adapter.scale"))]
        cells += [str(len(row.tests)), show(row.accuracy)]
        cells += ["", ""] if difference is None else [show(difference, "+"), difference.verdict]
        lines.append(cells)
    return markdown_table(columns, lines)


def readme_table(evidence: Evidence) -> str:
    """What the README shows: accuracies at the shortest schedule, a column for each data set and number of images."""
    settings = [setting for setting in evidence if setting.schedule == 1]
    names = [name for name in METHODS if any(name in evidence[setting] for setting in settings)]
    columns = ["test accuracy, %", "trained weights"]
    columns += [f"{DATA[setting.data]}, {setting.shots} a class" for setting in settings]
    lines = []
    for name in names:
        rows = [evidence[setting].get(name) for setting in settings]
        trained = next(row.trained for row in rows if row is not None)
        cells = ["" if row is None else show(row.accuracy) for row in rows]
        lines.append([METHODS[name], f"{trained:,}", *cells])
    return markdown_table(columns, lines)


def markdown(evidence: Evidence) -> str:
    """Everything."""
    parts = ["# Evidence: all tables", "How they came about: [docs/evidence.md](../../docs/evidence.md)."]
    for setting, rows in evidence.items():
        parts += [f"**{setting.title}**", table(rows)]
    return "\n\n".join(parts) + "\n"


def show(estimate: Estimate, sign: str = "") -> str:
    """Mean ± standard error."""
    return f"{estimate.mean:{sign}.2f}" + (f" ± {estimate.error:.2f}" if estimate.seeds > 1 else "")


def main() -> None:
    """Write tables and plots."""
    parser = CommandParser(prog="python -m benchmarks.evidence", description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, nargs="?", default=RESULTS, metavar="FILE.jsonl")
    path = parser.parse_args().file
    try:
        evidence = collect(read(path))
    except ValueError as error:
        parser.error(str(error))
    publish(evidence, path, markdown(evidence), PLOTS)


if __name__ == "__main__":
    main()
