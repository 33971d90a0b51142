"""Plots of the suite's results: a contender has one colour in all of them.

`bars`: times with their quartiles and, at each bar, how many times the yardstick's time that is. `roofline`: the
operator against what the machine can do. `scaling`: the operator over batch and tokens.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.cases import COPY
from benchmarks.contenders import CONTENDERS, NO_ADAPTER, split_variant
from benchmarks.groups import Group, groups, heading, shape, subject, timed, yardstick, yardstick_words
from benchmarks.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 120
# Told apart by people who see no red or green, too (Okabe and Ito's, and Tol's and matplotlib's for more contenders);
# the first two are greys for what is no adapter.
COLORS = (
    *("#9a9a9a", "#555555", "#e69f00", "#d55e00", "#cc79a7", "#0072b2", "#56b4e9", "#009e73"),
    *("#332288", "#117733", "#44aa99", "#88ccee", "#ddcc77", "#cc6677", "#aa4499", "#882255"),
    *("tab:olive", "tab:brown", "tab:purple", "tab:red", "tab:cyan", "tab:pink"),
)
HATCHES = {"compiled": "///", "two views": "..."}
STYLES = {"compiled": "--", "two views": ":"}
LINE = 0.34  # inches of a bar with its gap


def color(contender: str) -> str:
    """The colour of a contender and its variants, the same in every plot."""
    known = list(dict.fromkeys([NO_ADAPTER, COPY, *(split_variant(name)[0] for name in CONTENDERS)]))
    name = split_variant(contender)[0]
    return COLORS[known.index(name) % len(COLORS)] if name in known else "black"


def ratio(group: Group, rows: dict[str, Row], contender: str) -> float | None:
    """How many times the yardstick's time a contender takes; None where the yardstick has no time.

    The yardsticks are those of `benchmarks.groups`.
    """
    base = rows.get(yardstick(group, contender))
    return None if base is None else rows[contender]["ms"] / base["ms"]


def bars(results: dict[str, Any], path: Path) -> None:
    """Median times with their quartiles, a panel for the largest shape of each case, precision and mode."""
    import matplotlib.pyplot as plt

    shown = {group: rows for group, found in groups(results).items() if len(rows := timed(found)) > 1}
    by_size = sorted(shown, key=lambda group: group[2] * group[3])
    largest = {(case, precision, mode): group for group in by_size for case, *_, precision, mode in [group]}
    shown = {group: rows for group, rows in shown.items() if group in largest.values()}
    heights = [len(rows) * LINE + 0.9 for rows in shown.values()]
    figure, axes = plt.subplots(
        len(shown), 1, figsize=(9, sum(heights) + 0.5), squeeze=False, layout="constrained", height_ratios=heights
    )
    figure.suptitle(heading(results).split(", commit")[0], fontsize="medium")
    for axis, (group, rows) in zip(axes[:, 0], shown.items(), strict=True):
        _bar_panel(axis, group, rows)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def _bar_panel(axis: Axes, group: Group, rows: dict[str, Row]) -> None:
    for place, (name, row) in enumerate(rows.items()):
        spread = [[row["ms"] - row["low"]], [row["high"] - row["ms"]]]
        hatch = HATCHES.get(split_variant(name)[1])
        axis.barh(place, row["ms"], xerr=spread, color=color(name), hatch=hatch, edgecolor="white", capsize=3)
        times = ratio(group, rows, name)
        text = _milliseconds(row["ms"]) + ("" if times is None else f"   {times:.2f} x")
        axis.annotate(text, (row["high"], place), (6, 0), textcoords="offset points", va="center", fontsize="small")
    axis.set_yticks(range(len(rows)), list(rows))
    axis.invert_yaxis()
    axis.set_xlim(0, 1.3 * max(row["high"] for row in rows.values()))  # room for what is written at the longest bar
    axis.spines[["top", "right"]].set_visible(False)
    compared = any(ratio(group, rows, name) is not None for name in rows)
    axis.set_xlabel(f"ms, and how many times that of {yardstick_words(group)}" if compared else "ms", fontsize="small")
    what = subject(group)
    axis.set_title(f"{what[0].upper()}{what[1:]}\n{shape(group)}", fontsize="medium", loc="left")


def _milliseconds(value: float) -> str:
    return f"{value:,.{max(0, 2 - int(math.log10(max(value, 1))))}f} ms"  # three digits, all of them before the point


def roofline(results: dict[str, Any], path: Path) -> None:
    """The operator's operations per second, over operations per byte of our kernels' plan."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    machine = results["machine"]
    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    points: dict[str, list[tuple[float, float]]] = {}
    for group, rows in groups(results).items():
        for name, row in timed(rows).items() if group[0] == "operator" else ():
            if name not in (NO_ADAPTER, COPY):
                place = row["operations"] / row["planned_bytes"], row["operations"] / row["ms"] / 1e9
                points.setdefault(name, []).append(place)
    intensities = [1.0, 300.0]
    for precision, style in (("fp32", "-"), ("bf16", "--")):
        peak = machine.get(f"{precision}_tflop_per_s")
        if peak is not None:
            ridge = peak * 1e3 / machine["copy_gb_per_s"]
            roof = [machine["copy_gb_per_s"] * intensities[0] / 1e3, peak, peak]
            label = f"measured copy and {precision} product"
            axis.plot([intensities[0], ridge, intensities[1]], roof, style, color="black", label=label)
    for name, reached in points.items():
        marker = "s" if split_variant(name)[1] else "o"
        axis.plot(*zip(*reached, strict=True), marker, color=color(name), alpha=0.8, label=name)
    axis.set(xscale="log", yscale="log", xlabel="operations per planned byte", ylabel="TFLOP/s")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.set_title("The adapter alone, at every shape and mode", loc="left")
    axis.grid(which="both", alpha=0.2)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def scaling(results: dict[str, Any], path: Path) -> None:
    """The operator's time for a token, over the batch and over the tokens of an image."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    measured = {
        group: timed(rows) for group, rows in groups(results).items() if group[0] == "operator" and group[-1] == "all"
    }
    for axis, field, label in zip(axes, (2, 3), ("images", "tokens of an image"), strict=True):
        axis.set(xlabel=label, xscale="log", yscale="log")
        axis.grid(alpha=0.2)
        _scaling_panel(axis, measured, field)
    axes[0].set_ylabel("ns a token")
    figure.suptitle("The adapter alone, forward and backward")
    handles = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    handles |= dict(zip(*reversed(axes[1].get_legend_handles_labels()), strict=True))
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def _scaling_panel(axis: Axes, measured: dict[Group, dict[str, Row]], field: int) -> None:
    other = 5 - field  # of images (2) and tokens (3), the one that stays
    families: dict[tuple[Any, ...], list[Group]] = {}
    for group in measured:
        families.setdefault((group[1], group[other], group[4]), []).append(group)
    family = max(families.values(), key=lambda groups: len({group[field] for group in groups}), default=[])
    for name in dict.fromkeys(name for group in family for name in measured[group]):
        points = sorted((group[field], measured[group][name]) for group in family if name in measured[group])
        if len(points) > 1:
            places = [place for place, _ in points]
            times = [1e6 * row["ms"] / (row["images"] * row["tokens"]) for _, row in points]
            style = STYLES.get(split_variant(name)[1], "-")
            axis.plot(places, times, "o" + style, color=color(name), label=name)
            axis.set_xticks(places, [str(place) for place in places])
            axis.set_xticks([], minor=True)
    if family:
        backbone, stays, precision = family[0][1], family[0][other], family[0][4]
        held = f"{stays} tokens" if field == 2 else f"{stays} images"
        axis.set_title(f"{backbone}, {held}, {precision}", fontsize="medium", loc="left")


PLOTS = {"bars": bars, "roofline": roofline, "scaling": scaling}
