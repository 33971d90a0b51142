"""The runs of docs/evidence.md as rows: a method at a setting, with its accuracies by seed. Also the words for them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mosa_fast.sweeps.records import read_records
from mosa_fast.sweeps.runs import essential

STEPS = 520  # of the shortest schedule, about
YARDSTICK = "dense"
METHODS = {
    "linear": "linear probe",
    "bias": "biases",
    "dense": "dense adapter",
    "dense_two_views": "dense adapter, two views",
    "random_mask": "one fixed expert of four",
    "lora": "LoRA",
    "mosa_e2": "**MoSA**, E = 2",
    "mosa_e4": "**MoSA**, E = 4",
    "mosa_e2_one_view": "MoSA, E = 2, one view",
    "mosa_e4_one_view": "MoSA, E = 4, one view",
    "mosa_e4_none": "MoSA, E = 4, share none",
    "mosl_e4": "MoSL, E = 4",
    "full": "full fine-tuning",
    "scratch": "from scratch",
}
DATA = {"fashion_mnist": "Fashion-MNIST", "digits": "digits"}
# 97.5 % quantiles of Student's t, from one degree of freedom on.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Setting(NamedTuple):
    """What methods are compared at: data set, training images a class, multiple of the shortest schedule."""

    data: str
    shots: int
    schedule: int

    @property
    def title(self) -> str:
        """For people."""
        longer = "" if self.schedule == 1 else f", {self.schedule} times the steps"
        return f"{DATA[self.data]}, {self.shots} images a class{longer}"


class Estimate(NamedTuple):
    """A mean over seeds with its standard error, NaN for one seed."""

    mean: float
    error: float
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """The estimate from a value for each seed."""
        error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        return cls(statistics.mean(values), error, len(values))

    @property
    def reach(self) -> float:
        """Half of the 95 % interval."""
        return STUDENT[min(self.seeds - 2, len(STUDENT) - 1)] * self.error if self.seeds > 1 else float("nan")

    @property
    def verdict(self) -> str:
        """Of a difference: ahead or behind where the interval leaves out zero."""
        if self.seeds < 2:
            return ""
        return "level" if abs(self.mean) <= self.reach else "ahead" if self.mean > 0 else "behind"


@dataclass
class Row:
    """A method at a setting.

    Attributes:
        tests: test accuracy in percent by seed.
        trained: weights, with the head.
        point: what was tuned, by option.
        searched: runs of the search.
    """

    tests: dict[int, float] = field(default_factory=dict)
    trained: int = 0
    point: dict[str, str] = field(default_factory=dict)
    searched: int = 0

    @property
    def accuracy(self) -> Estimate:
        """Over the seeds."""
        return Estimate.of(list(self.tests.values()))

    def minus(self, other: Row) -> Estimate | None:
        """The paired difference to another row; None where they have no seed in common."""
        common = sorted(self.tests.keys() & other.tests.keys())
        return Estimate.of([self.tests[seed] - other.tests[seed] for seed in common]) if common else None


Evidence = dict[Setting, dict[str, Row]]  # rows by method, in the order of METHODS


def read(path: Path) -> list[dict[str, Any]]:
    """The records of a file.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return read_records(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def collect(records: Iterable[Mapping[str, Any]]) -> Evidence:
    """Rows by setting; of two runs of the same thing the later counts."""
    found: Evidence = {}
    for record in records:
        options = dict(option.removeprefix("--").split("=", 1) for option in essential(record["options"]))
        schedule = round(record["steps"] / STEPS)
        setting = Setting(options.get("data.name", "fashion_mnist"), int(options["data.shots"]), schedule)
        row = found.setdefault(setting, {}).setdefault(record["recipe"].removeprefix("evidence/"), Row())
        if record["search"]:
            row.searched += 1
        else:
            row.tests[record["seed"]] = record["test_accuracy"]
            row.trained = record["trained_weights"] + record["head_weights"]
            row.point = {name: options[name] for name in ("optim.lr", "adapter.scale") if name in options}
    tested = {
        setting: {name: rows[name] for name in METHODS if name in rows and rows[name].tests}
        for setting, rows in found.items()
    }
    return {setting: tested[setting] for setting in sorted(tested, key=_order) if tested[setting]}


def _order(setting: Setting) -> tuple[int, int, int]:
    return list(DATA).index(setting.data), setting.schedule, setting.shots
