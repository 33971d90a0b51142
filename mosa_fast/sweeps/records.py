"""The finished runs of a sweep as lines of JSON, which stand for the runs where their folders are not there."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from functools import cache
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mosa_fast.recipes import load_recipe
from mosa_fast.sweeps.runs import Run, Summary, essential, without_free

KEPT = (  # of a run's summary, in its record
    *("val_accuracy", "test_accuracy", "last_test_accuracy", "selected_epoch", "epochs", "steps", "bad_steps"),
    *("trained_weights", "head_weights", "seconds", "device", "versions"),
)
LABELS = ("recipe", "options", "seed", "search")
DIGEST = "digest"


class Records:
    """A file with a line of JSON for every finished run.

    Args:
        path: the file; None: nothing is known or written.

    Raises:
        ValueError: a line that is not the last is broken.
        OSError: it cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._known: dict[str, list[dict[str, Any]]] = {}
        self._doubted: set[str] = set()
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("ab").close()  # better now than after the first run
            for record in read_records(path):
                self._known.setdefault(_key(record), []).append(record)

    def find(self, run: Run) -> Summary | None:
        """The record of a run with the same name, options, seed and purpose, if its recipe was the same, too.

        That is what its digest tells (`Run.digest`). A record of before there were digests counts if the commit that
        it was made by is here and has the same recipe; which options got the seed is then taken for granted.
        """
        for record in reversed(self._known.get(_key(run.labels), [])):
            if record.get(run.result) is None:
                continue
            if (record[DIGEST] == run.digest()) if DIGEST in record else _had_the_recipe(record, run):
                return record
            self._doubt(record)
        return None

    def add(self, run: Run, summary: Summary) -> None:
        """Append a run, unless it is there."""
        if self.path is None or not run.folder.is_finished:  # where its folder has no such run, it was found here
            return
        own = {"commit": run.made_by(), DIGEST: run.digest()}
        known = [record for record in self._known.get(_key(run.labels), []) if record.get(run.result) is not None]
        # A line of before there were digests is told by its commit.
        if any(all(record.get(name, value) == value for name, value in own.items()) for record in known):
            return
        record = {**run.labels, **own, **{name: summary[name] for name in KEPT if name in summary}}
        self._known.setdefault(_key(run.labels), []).append(record)
        with self.path.open("ab+") as file:
            file.seek(0)
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)  # what a kill cut short is not glued to this one
            file.write(json.dumps(record).encode() + b"\n")

    def _doubt(self, record: Mapping[str, Any]) -> None:
        name = str(record["recipe"])
        if name not in self._doubted:
            self._doubted.add(name)
            print(f"note: {self.path} has runs of {name} that may be of another recipe: not counted", file=sys.stderr)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file; a last line that a kill cut short, which has no newline, is left out.

    Raises:
        OSError: it cannot be read.
        ValueError: another line is broken.
    """
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is broken: {error}") from None
        if not _is_record(record):
            raise ValueError(f"{path}, line {number} is broken: no record of a run")
        found.append(record)
    return found


def _is_record(value: Any) -> bool:
    if not isinstance(value, dict) or not value.keys() >= set(LABELS):
        return False
    return isinstance(value["options"], list) and all(isinstance(word, str) for word in value["options"])


def _key(labels: Mapping[str, Any]) -> str:
    """What tells records of different runs from each other."""
    return json.dumps([labels["recipe"], essential(labels["options"]), labels["seed"], labels["search"]])


def _had_the_recipe(record: Mapping[str, Any], run: Run) -> bool:
    """Whether the commit that a record was made by has the run's recipe, as it is now."""
    then = recipe_at(record.get("commit"), run.recipe)
    return then is not None and without_free(then) == without_free(load_recipe(run.recipe))


@cache
def recipe_at(commit: str | None, path: Path) -> dict[str, Any] | None:
    """A recipe as a commit of its repository has it, with its bases; None where there is no telling."""
    if commit is None or commit.endswith("+"):  # files differed from it
        return None
    path = path.resolve()

    def git(*words: str) -> bytes:
        return subprocess.run(["git", "-C", str(path.parent), *words], capture_output=True, check=True).stdout

    try:
        root = Path(git("rev-parse", "--show-toplevel").decode().rstrip("\n"))
        archive = git("-C", str(root), "archive", commit, "--", "*.yaml")
        with TemporaryDirectory() as folder, tarfile.open(fileobj=BytesIO(archive)) as files:
            for member in filter(tarfile.TarInfo.isfile, files):
                copy = Path(folder, member.name)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(files.extractfile(member).read())  # type: ignore[union-attr]
            return load_recipe(Path(folder, path.relative_to(root)))
    except (OSError, subprocess.CalledProcessError, ValueError):
        return None
