"""How predictions are printed: lines of text, JSON, or CSV, each as soon as it is there.

A format is a context manager of the file and whether there are several runs; it gives a function that prints an answer.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, TextIO


class Answer(NamedTuple):
    """What a run says of an image.

    Attributes:
        image: name of the file.
        run: folder of the run.
        ranking: its most probable classes and their probabilities, best first.
    """

    image: str
    run: str
    ranking: list[tuple[str, float]]


Write = Callable[[Answer], object]


@contextmanager
def text(out: TextIO, several_runs: bool) -> Iterator[Write]:
    """A line for each answer: image, run where there are several, classes with their probabilities in per cent."""

    def write(answer: Answer) -> None:
        words = [
            answer.image,
            *[f"{answer.run}:"] * several_runs,
            *(f"{name} {100 * p:.1f}%" for name, p in answer.ranking),
        ]
        out.write("  ".join(words) + "\n")

    yield write


@contextmanager
def json_array(out: TextIO, several_runs: bool) -> Iterator[Write]:
    """One array, a line for each answer: `{"image": "", "run": "", "classes": [{"class": "", "probability": 0.5}]}`."""
    before = "[\n"

    def write(answer: Answer) -> None:
        nonlocal before
        classes = [{"class": name, "probability": p} for name, p in answer.ranking]
        out.write(before + json.dumps({"image": answer.image, "run": answer.run, "classes": classes}))
        before = ",\n"

    yield write
    out.write("[]\n" if before == "[\n" else "\n]\n")


@contextmanager
def csv_rows(out: TextIO, several_runs: bool) -> Iterator[Write]:
    """A row for each class of each answer: image, run, rank from 1, class, probability."""
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(("image", "run", "rank", "class", "probability"))

    def write(answer: Answer) -> None:
        for rank, (name, p) in enumerate(answer.ranking, 1):
            rows.writerow((answer.image, answer.run, rank, name, f"{p:.6f}"))

    yield write


FORMATS: dict[str, Callable[[TextIO, bool], AbstractContextManager[Write]]] = {
    "text": text,
    "json": json_array,
    "csv": csv_rows,
}
