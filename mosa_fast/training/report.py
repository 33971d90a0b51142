"""What a run leaves for people: a line an epoch, curves, and the closing table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mosa_fast.files import write_atomically
from mosa_fast.run_folder import RunFolder


class MetricsLog:
    """One JSON object a line, one line an epoch.

    Args:
        path: the file.
        enabled: False: nothing is written.

    Attributes:
        rows: of the epochs so far.
    """

    def __init__(self, path: Path, *, enabled: bool = True) -> None:
        self.path, self.enabled = path, enabled
        self.rows: list[dict[str, Any]] = []

    def begin(self) -> None:
        """Let the file hold the rows so far: those of the checkpoint that a run is resumed from, or none."""
        if self.enabled:
            text = "".join(json.dumps(row) + "\n" for row in self.rows)
            write_atomically(self.path, lambda temporary: temporary.write_text(text))

    def add(self, row: dict[str, Any]) -> None:
        """Append a row to the file and to `rows`."""
        self.rows.append(row)
        if self.enabled:
            with self.path.open("a") as handle:
                handle.write(json.dumps(row) + "\n")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.rows = state["rows"]


def plot_curves(path: Path, rows: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    """Training loss and validation accuracy over the epochs, with the selected epoch marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in rows]
    loss_axes.plot(epochs, [row["train_loss"] for row in rows], color="tab:blue")
    loss_axes.set(xlabel="epoch", ylabel="training loss")
    validated = [row for row in rows if "val_accuracy" in row]
    accuracy_axes.plot(epochs, [row["train_accuracy"] for row in rows], color="tab:grey", label="train, active experts")
    accuracy_axes.plot(
        [row["epoch"] for row in validated],
        [row["val_accuracy"] for row in validated],
        color="tab:orange",
        label="validation, merged",
    )
    accuracy_axes.axvline(summary["selected_epoch"], color="black", linewidth=0.8, linestyle=":")
    if "test_accuracy" in summary:
        accuracy_axes.axhline(
            summary["test_accuracy"], color="tab:green", linewidth=0.8, linestyle="--", label="test, selected epoch"
        )
    accuracy_axes.set(xlabel="epoch", ylabel="accuracy, %")
    accuracy_axes.legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=120)


def format_table(rows: list[tuple[str, str]]) -> str:
    """Two aligned columns between rules."""
    left = max(len(name) for name, _ in rows)
    right = max(len(value) for _, value in rows)
    rule = "-" * (left + right + 2)
    return "\n".join([rule, *(f"{name:<{left}}  {value}" for name, value in rows), rule])


def closing_table(summary: dict[str, Any], folder: RunFolder, weights: Path) -> str:
    """The table at the end of a run."""
    rows = [("validation accuracy", "none: trained on the validation images too, the last epoch counts")]
    if summary["val_accuracy"] is not None:
        rows = [("validation accuracy", f"{summary['val_accuracy']:.2f} %  (epoch {summary['selected_epoch']})")]
    if "test_accuracy" in summary:
        rows.append(("test accuracy", f"{summary['test_accuracy']:.2f} %"))
        rows.append(("test accuracy, last epoch", f"{summary['last_test_accuracy']:.2f} %"))
    rows += [
        ("trained weights", f"{summary['trained_weights']:,} + head {summary['head_weights']:,}"),
        ("time", f"{summary['seconds']:.0f} s, {summary['steps']} steps on {summary['device']}"),
        ("weights", str(weights)),
        ("metrics", str(folder.metrics)),
        ("summary", str(folder.summary)),
        ("curves", str(folder.curves)),
    ]
    return format_table(rows)
