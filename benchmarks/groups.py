"""Rows of a result grouped by what was timed, and the words for a group: what tables and plots have in common."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.cases import COPY
from benchmarks.contenders import CONTENDERS, NO_ADAPTER, NO_ADAPTER_APART
from benchmarks.results import KEY, Row
from benchmarks.spec import BANKS, OPERATORS

MODES = {"all": "forward and backward", "forward": "forward", "backward": "backward"}
SUBJECTS = {
    "operator": "the adapter alone",
    "lora": "low-rank pairs on q and v alone",
    "block": "a block with its adapter",
    "step": "a training step",
    "methods": "a training step of every method",
    "evaluation": "evaluation",
    **{name: f"a batch of images of {tasks} task{'' if tasks == 1 else 's'}" for name, tasks in BANKS.items()},
}
LINEAR = "linear"
Group = tuple[Any, ...]  # case, backbone, images, tokens, precision, mode


def groups(results: dict[str, Any]) -> dict[Group, list[Row]]:
    """Rows by what they measure, in order."""
    found: dict[Group, list[Row]] = {}
    for row in results["rows"]:
        found.setdefault(tuple(row[field] for field in KEY[:-1]), []).append(row)
    return found


def timed(rows: Iterable[Row]) -> dict[str, Row]:
    """Rows that have a time, by contender."""
    return {row["contender"]: row for row in rows if row["ms"] is not None}


def subject(group: Group) -> str:
    """What was timed: "the adapter alone, forward and backward"."""
    case, mode = str(group[0]), group[-1]
    name = SUBJECTS.get(case, case)
    return f"{name}, {MODES[mode]}" if case in (*OPERATORS, "block") else name


def shape(group: Group) -> str:
    """On what: "vit_tiny_patch16_224, 8 images of 197 tokens, fp32"."""
    _, backbone, images, tokens, precision, _ = group
    return f"{backbone}, {images} image{'' if images == 1 else 's'} of {tokens} tokens, {precision}"


def yardstick(group: Group, contender: str) -> str:
    """The contender that another one's time is divided by: the same without adapters, and the same views in common.

    Of operators it is the copy of the bytes that they plan to move; of the methods of a run, the linear probe.
    """
    if group[0] in OPERATORS:
        return COPY
    if group[0] == "methods":
        return LINEAR
    apart = contender not in CONTENDERS or not CONTENDERS[contender].views_together
    return NO_ADAPTER_APART if group[0] == "step" and apart else NO_ADAPTER


def yardstick_words(group: Group) -> str:
    """What the yardstick does: "the linear probe"."""
    words = dict.fromkeys(OPERATORS, "a copy of the planned bytes") | {"methods": "the linear probe"}
    return words.get(str(group[0]), "the same work without adapters")


def heading(results: dict[str, Any]) -> str:
    """Where and with what the results were measured."""
    e = results["environment"]
    threads = f"{e['threads']} thread{'' if e['threads'] == 1 else 's'}"
    return (
        f"{e['device']}, {threads}, torch {e['torch']}, triton {e['triton']}, commit {e['commit']}; "
        f"adapters with r = {results['config']['bottleneck']}, E = {results['config']['experts']}."
    )
