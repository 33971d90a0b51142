"""Plots of the evidence: a method has one colour in all of them.

`shots`: accuracy against training images a class. `steps`: against the schedule. `differences`: to the dense adapter,
paired by seed, with 95 % intervals.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.evidence_rows import DATA, METHODS, STEPS, YARDSTICK, Estimate, Evidence, Setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DPI = 120
WIDTH, HEIGHT = 5.0, 3.6  # inches of a panel
LINE, FRAME = 0.24, 0.9  # inches of a difference; of what surrounds a panel of them
# Told apart by people who see no red or green, too (Okabe and Ito's, and matplotlib's for more methods).
COLORS = dict(
    zip(
        METHODS,
        (
            *("#9a9a9a", "tab:olive", "#0072b2", "#56b4e9", "tab:brown", "#009e73", "#d55e00", "#e69f00"),
            *("tab:red", "tab:pink", "tab:purple", "tab:cyan", "#555555", "black"),
        ),
        strict=True,
    )
)


def shots(evidence: Evidence, path: Path) -> None:
    """Accuracy against training images a class at the shortest schedule, a panel for each data set."""
    panels = {DATA[data]: [s for s in evidence if s.data == data and s.schedule == 1] for data in DATA}
    _curves(evidence, panels, lambda setting: setting.shots, "training images a class", path)


def steps(evidence: Evidence, path: Path) -> None:
    """Accuracy against steps, a panel for each data set and number of images that has several schedules."""
    panels: dict[str, list[Setting]] = {}
    for setting in evidence:
        panels.setdefault(f"{DATA[setting.data]}, {setting.shots} images a class", []).append(setting)
    several = {title: settings for title, settings in panels.items() if len(settings) > 1}
    _curves(evidence, several, lambda setting: setting.schedule * STEPS, "steps of 16 images", path)


def differences(evidence: Evidence, path: Path) -> None:
    """To the dense adapter, paired by seed, with 95 % intervals, a panel for each setting."""
    import matplotlib.pyplot as plt

    panels: dict[Setting, dict[str, Estimate]] = {}
    for setting, rows in evidence.items():
        for name, row in rows.items():
            pair = row.minus(rows[YARDSTICK]) if name != YARDSTICK and YARDSTICK in rows else None
            if pair is not None:
                panels.setdefault(setting, {})[name] = pair
    if not panels:
        return
    heights = [len(pairs) * LINE + FRAME for pairs in panels.values()]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(1.6 * WIDTH, sum(heights)), squeeze=False, layout="constrained", height_ratios=heights
    )
    for axis, (setting, pairs) in zip(axes[:, 0], panels.items(), strict=True):
        for place, (name, pair) in enumerate(pairs.items()):
            reach = pair.reach if pair.seeds > 1 else 0.0
            axis.errorbar(pair.mean, place, xerr=reach, fmt="o", color=COLORS[name], capsize=3)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_yticks(range(len(pairs)), [_plain(name) for name in pairs])
        axis.set_ylim(len(pairs) - 0.5, -0.5)
        axis.set_title(setting.title, fontsize="medium")
        axis.set_xlabel("test accuracy minus that of a dense adapter, points")
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def _curves(
    evidence: Evidence, panels: dict[str, list[Setting]], place: Callable[[Setting], int], label: str, path: Path
) -> None:
    """A panel of accuracies, with standard errors, for each list of settings; no picture where there is none."""
    import matplotlib.pyplot as plt

    panels = {title: settings for title, settings in panels.items() if settings}
    if not panels:
        return
    figure, axes = plt.subplots(
        1, len(panels), figsize=(WIDTH * len(panels) + 2, HEIGHT), squeeze=False, layout="constrained"
    )
    for axis, (title, settings) in zip(axes[0], panels.items(), strict=True):
        _curve_panel(axis, evidence, settings, place)
        axis.set(title=title, xlabel=label, ylabel="test accuracy, %")
    handles = {text: handle for axis in axes[0] for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(list(handles.values()), list(handles), loc="outside right center", fontsize="small")
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def _curve_panel(axis: Axes, evidence: Evidence, settings: list[Setting], place: Callable[[Setting], int]) -> None:
    for name in METHODS:
        own = [(place(setting), evidence[setting][name].accuracy) for setting in settings if name in evidence[setting]]
        if own:
            errors = [accuracy.error if accuracy.seeds > 1 else 0.0 for _, accuracy in own]
            axis.errorbar(
                [x for x, _ in own],
                [accuracy.mean for _, accuracy in own],
                errors,
                marker="o",
                color=COLORS[name],
                label=_plain(name),
                capsize=2,
            )
    places = sorted({place(setting) for setting in settings})
    axis.set_xscale("log")
    axis.set_xticks(places, [str(x) for x in places])
    axis.minorticks_off()


def _plain(method: str) -> str:
    return METHODS[method].replace("*", "")


PLOTS = {"shots": shots, "steps": steps, "differences": differences}
