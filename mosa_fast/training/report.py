"""What a run tells people: a table at its start, a line an epoch, and a table at its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from mosa_fast.config import TrainConfig
from mosa_fast.data.parts import Splits, labels_of
from mosa_fast.files import write_text
from mosa_fast.methods import METHODS
from mosa_fast.options import counted
from mosa_fast.run_folder import RunFolder
from mosa_fast.training.distributed import Ranks
from mosa_fast.training.evaluation import Scores
from mosa_fast.training.model import count_trained
from mosa_fast.training.position import Position

WEAKEST = 3  # classes that the closing table names


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
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))

    def add(self, row: dict[str, Any]) -> None:
        """Append a row to the file and to `rows`."""
        self.rows.append(row)
        if self.enabled:
            with self.path.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(row) + "\n")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.rows = state["rows"]


def format_table(rows: list[tuple[str, str]]) -> str:
    """Two aligned columns between rules."""
    left = max(len(name) for name, _ in rows)
    right = max(len(value) for _, value in rows)
    rule = "-" * (left + right + 2)
    return "\n".join([rule, *(f"{name:<{left}}  {value}" for name, value in rows), rule])


def opening_table(config: TrainConfig, splits: Splits, model: nn.Module, position: Position, ranks: Ranks) -> str:
    """What a run is about to do."""
    counts = count_trained(model)
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    start = "pretrained" if config.model.pretrained and METHODS[config.method].pretrained else "random weights"
    if config.model.checkpoint is not None and start == "pretrained":
        start = config.model.checkpoint
    parts = {}
    for name, part in splits.parts():
        labels = labels_of(part)
        parts[name] = f"{len(labels):,} images of {len(set(labels))} classes"
    epochs = counted(position.epochs, "epoch")
    each = f"{epochs} of {position.steps_per_epoch}, batches of {counted(position.batch_size, 'image')}"
    rows = [
        *parts.items(),
        ("backbone", f"{config.model.name}, {start}, {config.data.image_size} pixels"),
        ("method", config.method),
        ("trained weights", f"{counts['trained_weights']:,} + head {counts['head_weights']:,}; frozen {frozen:,}"),
        ("steps", f"{position.total_steps:,}: {each}"),
        ("device", f"{ranks.device}" + (f", {ranks.world} processes" if ranks.world > 1 else "")),
        ("precision", config.precision),
    ]
    return format_table(rows)


def class_table(scores: Scores, classes: list[str]) -> list[dict[str, Any]]:
    """For every class its name, its number of images, the percentage that is recognised, and what they are taken for.

    The last is a number of images by label, for the labels that any were given.
    """
    assert scores.confusion is not None
    return [
        {
            "class": name,
            "images": sum(row),
            "accuracy": 100 * row[label] / sum(row) if sum(row) else None,
            "taken_for": {str(other): count for other, count in enumerate(row) if count},
        }
        for label, (name, row) in enumerate(zip(classes, scores.confusion.tolist(), strict=True))
    ]


def closing_table(summary: dict[str, Any], folder: RunFolder, weights: Path) -> str:
    """The table at the end of a run."""
    rows = [("validation accuracy", "none: trained on the validation images too, the last epoch counts")]
    if summary["val_accuracy"] is not None:
        rows = [
            ("validation accuracy", f"{summary['val_accuracy']:.2f} %  (epoch {summary['selected_epoch']})"),
            ("validation loss", f"{summary['val_loss']:.4f}"),
        ]
    if "test_accuracy" in summary:
        rows.append(("test accuracy", f"{summary['test_accuracy']:.2f} %"))
        if "test_top5" in summary:
            rows.append(("test accuracy, top 5", f"{summary['test_top5']:.2f} %"))
        rows.append(("test accuracy, last epoch", f"{summary['last_test_accuracy']:.2f} %"))
    if "test_classes" in summary:
        rows.append(("weakest classes", weakest(summary["test_classes"])))
    rows += [
        ("trained weights", f"{summary['trained_weights']:,} + head {summary['head_weights']:,}"),
        ("time", f"{summary['seconds']:.0f} s, {counted(summary['steps'], 'step')} on {summary['device']}"),
        ("weights", str(weights)),
        ("metrics", str(folder.metrics)),
        ("summary", str(folder.summary)),
        ("curves", str(folder.curves)),
    ]
    if "test_classes" in summary:
        rows.append(("confusion", str(folder.confusion)))
    return format_table(rows)


def weakest(table: list[dict[str, Any]]) -> str:
    """The classes of a `class_table` that are recognised least, in words."""
    known = sorted((row for row in table if row["images"]), key=lambda row: row["accuracy"])
    return ", ".join(f"{row['class']}: {row['accuracy']:.0f} %" for row in known[:WEAKEST])
