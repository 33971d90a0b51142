"""`python -m benchmarks.report [FILE.json ...]`: Markdown tables and plots of the suite's results, beside the files.

`FILE.md` has every table, `FILE_bars.png` times with their spread, `FILE_roofline.png` the operator against what the
machine can do, `FILE_scaling.png` the operator over batch and tokens. Without arguments: all results in
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm

from benchmarks.suite import KEY, Row, operator_work

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESULTS = Path(__file__).parent / "results"
PAPER = "paper"
# A contender, and what it is measured against for the adapter tax: the same views, without adapters.
SHARED, UNSHARED = "no adapter", "no adapter, two views"
TITLES = {
    "operator": "the adapter alone, forward and backward",
    "block": "a block with its adapter, forward and backward",
    "step": "a training step",
    "evaluation": "evaluation",
}


def groups(results: dict[str, Any]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by spec, in order."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in results["rows"]:
        found.setdefault(tuple(row[field] for field in KEY[:-1]), []).append(row)
    return found


def timed(rows: Iterable[Row]) -> dict[str, Row]:
    """Rows that have a time, by contender."""
    return {row["contender"]: row for row in rows if row["ms"] is not None}


def memory(row: Row) -> float | None:
    """MiB that a training run needs on top of what is there: the peak on a GPU, on a CPU what backward keeps."""
    return row["saved_mib"] if row["peak_mib"] is None else row["peak_mib"]


def taxes(rows: Iterable[Row]) -> list[tuple[str, float, float | None]]:
    """The adapter tax of every contender of a training step: (name, share of time, share of memory).

    Against the same step without adapters, of the same two views, with gradients that reach as deep; ours shares the
    views' beginning unless its name says otherwise, and so does its yardstick.
    """
    found = []
    by_name = timed(rows)
    for name, row in by_name.items():
        shared = name.startswith("ours") and "two views" not in name
        base = by_name.get(SHARED if shared else UNSHARED)
        if base is None or name in (SHARED, UNSHARED):
            continue
        ours, bare = memory(row), memory(base)
        found.append((name, row["ms"] / base["ms"] - 1, None if ours is None or not bare else ours / bare - 1))
    return found


def table(spec: tuple[Any, ...], rows: list[Row]) -> str:
    """A spec's rows; the adapter tax is a column where the case is a training step."""
    case, backbone, images, tokens, precision = spec
    by_name, tax = timed(rows), {name: shares for name, *shares in taxes(rows)} if case == "step" else {}
    title = f"**{TITLES.get(case, case).capitalize()}**: {backbone}, {images} images of {tokens} tokens, {precision}"
    columns = ["", "ms (quartiles)", "images/s", "times the paper's speed"]
    training = case != "evaluation"
    peak = any(row["peak_mib"] is not None for row in rows)
    columns += ["activations, MiB" if not peak else "peak, MiB"] if training else []
    columns += ["state, MiB", "adapter tax: time", "memory"] if case == "step" else []
    lines = [title, "", f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for row in rows:
        if row["ms"] is None:
            continue
        faster = f"{by_name[PAPER]['ms'] / row['ms']:.2f}" if PAPER in by_name else ""
        cells = [row["contender"], f"{row['ms']:.2f} ({row['low']:.2f} to {row['high']:.2f})"]
        cells += [f"{row['images_per_s']:,.{0 if row['images_per_s'] >= 100 else 1}f}", faster]
        cells += [_number(memory(row), "{:,.0f}")] if training else []
        if case == "step":
            time, space = tax.get(row["contender"], (None, None))
            cells += [_number(row["state_mib"], "{:,.1f}"), _number(time, "{:+.1%}"), _number(space, "{:+.1%}")]
        lines.append(f"| {' | '.join(cells)} |")
    missing = [f"{row['contender']} ({row['reason']})" for row in rows if row["ms"] is None]
    return "\n".join(lines + (["", f"Not timed: {'; '.join(missing)}."] if missing else []))


def heading(results: dict[str, Any]) -> str:
    """Where and with what the results were measured."""
    e = results["environment"]
    return (
        f"{e['device']}, {e['threads']} threads, torch {e['torch']}, triton {e['triton']}, commit {e['commit']}; "
        f"adapters with r = {results['config']['bottleneck']}, E = {results['config']['experts']}."
    )


def summary(results: dict[str, Any]) -> str:
    """What the README shows: the training steps."""
    steps = [table(spec, rows) for spec, rows in groups(results).items() if spec[0] == "step"]
    return "\n\n".join([heading(results), *steps])


def markdown(results: dict[str, Any]) -> str:
    """Everything."""
    machine = ", ".join(f"{name} {value:,}" for name, value in results["machine"].items())
    tables = [table(spec, rows) for spec, rows in groups(results).items()]
    return "\n\n".join(["# The suite's results", heading(results), f"The machine: {machine}.", *tables]) + "\n"


def plot_bars(results: dict[str, Any], path: Path) -> None:
    """Median times with their quartiles, a panel for each spec that is not a scaling point."""
    import matplotlib.pyplot as plt

    shown = [(spec, timed(rows)) for spec, rows in groups(results).items() if len(timed(rows)) > 1]
    largest = {spec[:2] + spec[4:]: spec for spec, _ in sorted(shown, key=lambda item: item[0][2] * item[0][3])}
    shown = [(spec, rows) for spec, rows in shown if spec in largest.values()]
    figure, axes = plt.subplots(len(shown), 1, figsize=(8, 2.6 * len(shown)), squeeze=False, layout="constrained")
    for axis, (spec, rows) in zip(axes[:, 0], shown, strict=True):
        medians = [row["ms"] for row in rows.values()]
        spread = [[row["ms"] - row["low"] for row in rows.values()], [row["high"] - row["ms"] for row in rows.values()]]
        colors = ["tab:orange" if name.startswith("ours") else "tab:gray" for name in rows]
        axis.barh(list(rows), medians, xerr=spread, color=colors, capsize=3)
        axis.invert_yaxis()
        axis.set(
            xlabel="ms", title=f"{TITLES.get(spec[0], spec[0])}: {spec[1]}, {spec[2]} x {spec[3]} tokens, {spec[4]}"
        )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_roofline(results: dict[str, Any], path: Path) -> None:
    """The operator's operations per second, over operations per byte of our kernels' plan."""
    import matplotlib.pyplot as plt

    machine = results["machine"]
    figure, axis = plt.subplots(figsize=(7, 5), layout="constrained")
    intensities = [1.0, 1000.0]
    for precision in ("fp32", "bf16"):
        peak = machine.get(f"{precision}_tflop_per_s")
        if peak is not None:
            ridge = peak * 1e3 / machine["copy_gb_per_s"]
            roof = [machine["copy_gb_per_s"] * intensities[0] / 1e3, peak, peak]
            axis.plot([intensities[0], ridge, intensities[1]], roof, label=f"measured copy and {precision} product")
    points: dict[str, list[tuple[float, float]]] = {}
    for spec, rows in groups(results).items():
        for name, row in timed(rows).items() if spec[0] == "operator" else ():
            if name != SHARED:
                operations, nbytes = operator_work(row, width(spec[1]))
                points.setdefault(name, []).append((operations / nbytes, operations / row["ms"] / 1e9))
    for name, reached in points.items():
        axis.plot(*zip(*reached, strict=True), "*" if name.startswith("ours") else ".", alpha=0.7, label=name)
    axis.set(xscale="log", yscale="log", xlabel="operations per planned byte", ylabel="TFLOP/s", title="the operator")
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_scaling(results: dict[str, Any], path: Path) -> None:
    """The operator's time for a token, over the batch and over the tokens of an image."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    specs = {spec: timed(rows) for spec, rows in groups(results).items() if spec[0] == "operator"}
    for axis, field, label in zip(axes, (2, 3), ("images", "tokens of an image"), strict=True):
        axis.set(xlabel=label, xscale="log", yscale="log")
        _plot_scaling_over(axis, specs, field)
    axes[0].set_ylabel("ns a token")
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _plot_scaling_over(axis: Axes, specs: dict[tuple[Any, ...], dict[str, Row]], field: int) -> None:
    other = 5 - field  # of images (2) and tokens (3), the one that stays
    families: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
    for spec in specs:
        families.setdefault((spec[1], spec[other], spec[4]), []).append(spec)
    family = max(families.values(), key=lambda specs: len({spec[field] for spec in specs}), default=[])
    for name in dict.fromkeys(name for spec in family for name in specs[spec]):
        points = sorted((spec[field], specs[spec][name]) for spec in family if name in specs[spec])
        if len(points) > 1:
            places = [place for place, _ in points]
            axis.set_xticks(places, [str(place) for place in places])
            axis.set_xticks([], minor=True)
            axis.plot(
                places, [1e6 * row["ms"] / (row["images"] * row["tokens"]) for _, row in points], "o-", label=name
            )


def width(backbone: str) -> int:
    """Width of a timm ViT's tokens."""
    import torch

    with torch.device("meta"):
        model: Any = timm.create_model(backbone, depth=1)
    return int(model.embed_dim)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n")[0])
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE.json")
    options = parser.parse_args()
    files = options.files or sorted(RESULTS.glob("suite_*.json"))
    if not files:
        parser.error("there are no results yet: python -m benchmarks makes them")
    for path in files:
        try:
            results = json.loads(path.read_text())
            text = markdown(results)
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"{path} is not a result of the suite ({error})")
        path.with_suffix(".md").write_text(text, encoding="utf-8")
        for name, plot in (("bars", plot_bars), ("roofline", plot_roofline), ("scaling", plot_scaling)):
            plot(results, path.with_name(f"{path.stem}_{name}.png"))
        print(f"{path.with_suffix('.md')} and three plots")


if __name__ == "__main__":
    main()
