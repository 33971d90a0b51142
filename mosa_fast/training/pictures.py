"""The pictures that a run leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

NAMED_CLASSES = 40  # with more of them their names cannot be read


def plot_curves(path: Path, rows: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    """Losses and accuracies over the epochs, with the selected epoch marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    validated = [row for row in rows if "val_accuracy" in row]
    # The training loss may have a second view's terms in it; both are per image.
    for axes, what in ((loss_axes, "loss"), (accuracy_axes, "accuracy")):
        for part, found, colour, label in (
            ("train", rows, "tab:grey", "train, active experts"),
            ("val", validated, "tab:orange", "validation, merged"),
        ):
            epochs, values = [row["epoch"] for row in found], [row[f"{part}_{what}"] for row in found]
            axes.plot(epochs, values, color=colour, label=label)
    loss_axes.set(xlabel="epoch", ylabel="loss")
    loss_axes.legend(loc="upper right", fontsize="small")
    accuracy_axes.axvline(summary["selected_epoch"], color="black", linewidth=0.8, linestyle=":")
    if "test_accuracy" in summary:
        accuracy_axes.axhline(
            summary["test_accuracy"], color="tab:green", linewidth=0.8, linestyle="--", label="test, selected epoch"
        )
    accuracy_axes.set(xlabel="epoch", ylabel="accuracy, %")
    accuracy_axes.legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=120)


def plot_confusion(path: Path, confusion: Tensor, classes: list[str]) -> None:
    """Which class is taken for which, in percent of the images of a class.

    Args:
        path: the PNG file.
        confusion: `[C, C]`, images of the class of a row that were taken for that of a column.
        classes: their names.
    """
    from matplotlib.figure import Figure

    percent = 100 * confusion / confusion.sum(1, keepdim=True).clamp_min(1)
    names = len(classes) <= NAMED_CLASSES
    side = max(5.0, 0.28 * len(classes)) if names else 8.0
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(percent.numpy(), cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    axes.set(xlabel="predicted", ylabel="class")
    if names:
        # Class names are people's own: a dollar sign begins no formula in them.
        labels = [name.replace("$", r"\$") for name in classes]
        axes.set_xticks(range(len(classes)), labels, rotation=90, fontsize="small")
        axes.set_yticks(range(len(classes)), labels, fontsize="small")
    figure.colorbar(image, ax=axes, label="images of the class, %", shrink=0.8)
    figure.savefig(path, dpi=120)
