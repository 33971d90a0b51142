"""Files of results: written, read, compared, and shown as tables."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
KEY = ("case", "backbone", "images", "tokens", "precision", "mode", "contender")
MEASURED = (
    *("runs", "ms", "low", "high", "images_per_s", "saved_mib", "peak_mib", "state_mib"),
    *("operations", "planned_bytes", "of_copy", "reason"),
)
NO_TIME = "no time left"  # a row's reason
LEAST_RUNS = 3  # below which quartiles say nothing
Row = dict[str, Any]


def write(results: dict[str, Any], path: Path) -> None:
    """JSON at `path`, and its rows as CSV beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, (*results["environment"], *KEY, *MEASURED))
        writer.writeheader()
        writer.writerows(results["environment"] | row for row in results["rows"])


def publish(results: Any, path: Path, text: str, plots: Mapping[str, Callable[[Any, Path], object]]) -> None:
    """Tables as Markdown and plots, beside the file at `path` that the results are of."""
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    pictures = {path.with_name(f"{path.stem}_{name}.png"): plot for name, plot in plots.items()}
    for picture, plot in pictures.items():
        picture.unlink(missing_ok=True)  # of earlier results, which had what it shows
        plot(results, picture)
    print(", ".join(map(str, (path.with_suffix(".md"), *filter(Path.is_file, pictures)))))


def read(path: Path) -> dict[str, Any]:
    """A file that `write` made.

    Raises:
        ValueError: it cannot be read, or holds something else.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        results["environment"]["device"], results["machine"], results["config"]
        for row in results["rows"]:
            row.update({field: row[field] for field in (*KEY, *MEASURED)})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a result of this suite ({error})") from error
    return results


def compare(new: dict[str, Any], old: dict[str, Any]) -> tuple[list[str], bool]:
    """Lines with ratios new / old for rows that both have, and whether any is slower beyond the spread.

    Slower beyond the spread: the new first quartile is above the old third one, of at least `LEAST_RUNS` runs each. A
    row that had a time and has none now counts as well, unless there was no time left for it.

    Raises:
        ValueError: the results are of different devices.
    """
    devices = [results["environment"]["device"] for results in (new, old)]
    if devices[0] != devices[1]:
        raise ValueError(f"the results are of different devices: {devices[0]} and {devices[1]}")
    before = {tuple(row[field] for field in KEY): row for row in old["rows"]}
    lines, slower = [], False
    for row in new["rows"]:
        past = before.get(tuple(row[field] for field in KEY))
        if past is None or past["ms"] is None:
            continue
        name = " ".join(str(row[field]) for field in KEY)
        if row["ms"] is None:
            lines.append(f"{name}: {past['ms']:.3f} ms -> not timed ({row['reason']})")
            slower |= row["reason"] != NO_TIME
            continue
        spread = min(row["runs"], past["runs"]) >= LEAST_RUNS
        regressed = spread and row["low"] > past["high"]
        slower |= regressed
        verdict = "SLOWER" if regressed else "faster" if row["high"] < past["low"] else "within the spread"
        verdict = verdict if spread else f"fewer than {LEAST_RUNS} runs: no verdict"
        lines.append(f"{name}: {past['ms']:.3f} -> {row['ms']:.3f} ms, {row['ms'] / past['ms']:.3f}, {verdict}")
    return lines, slower


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
