"""One training of a sweep: what decides its result, whether it is done, and how it is started."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from mosa_fast.config import TrainConfig
from mosa_fast.options import facts_of, flat
from mosa_fast.recipes import load_recipe
from mosa_fast.run_folder import RunFolder
from mosa_fast.sweeps.table import Options

STOPPED = (130, 143, -2, -15)  # exit codes of a run that SIGINT or SIGTERM stopped
Summary = dict[str, Any]
Start = Callable[[Sequence[str]], int]  # trains as the words of a command line say, and gives its exit code


@dataclass(frozen=True)
class Run:
    """One training: a recipe with the options that come after it.

    Attributes:
        recipe: its file.
        options: words of the command line.
        folder: of the run.
        result: entry of the summary without which the run is not done.
        labels: what a record says the run is.
    """

    recipe: Path
    options: Options
    folder: RunFolder
    result: str
    labels: Mapping[str, Any] = field(default_factory=dict)

    def identity(self) -> dict[str, Any]:
        """What the run is asked for; kept beside it."""
        return {"recipe": load_recipe(self.recipe), "options": list(self.options)}

    def digest(self) -> str:
        """Of `identity`, without what changes no result: the same for two runs that end with the same numbers."""
        return _digest(self.identity())

    def made_by(self) -> str | None:
        """The commit that trained it; None where that is not known."""
        return (_read(self.folder.read_sweep) or {}).get("commit")

    def summary(self) -> Summary | None:
        """The finished run's summary, None if it is not finished.

        Raises:
            ValueError: the folder holds a run with other settings.
        """
        kept = _read(self.folder.read_sweep)
        if kept is not None and self.folder.holds_a_run and _digest(kept) != self.digest():
            raise ValueError(f"{self.folder} was made with other settings: choose another --out, or remove it")
        summary = _read(self.folder.read_summary)
        return summary if kept is not None and summary is not None and summary.get(self.result) is not None else None

    def execute(self, start: Start, find: Callable[[Run], Summary | None] = lambda run: None) -> Summary | None:
        """Train unless it is done; the summary, or None if the run failed.

        Args:
            start: what trains.
            find: looks for the summary of a run of which nothing is in its folder.

        Raises:
            ValueError: the folder holds a run with other settings.
            KeyboardInterrupt: the run was told to stop.
        """
        done = self.summary()
        if done is None and not self.folder.holds_a_run:
            done = find(self)
        if done is not None:
            return done
        self.folder.write_sweep(self.identity() | {"commit": commit()})
        words = ["--config", str(self.recipe), *self.options, "--resume", f"--out={self.folder}"]
        code = start(words)
        if code in STOPPED or code < 0:
            raise KeyboardInterrupt
        return self.summary() if code == 0 else None


def as_process(words: Sequence[str]) -> int:
    """Train in a process of its own on this machine; its exit code."""
    return subprocess.run([sys.executable, "-m", "mosa_fast.train", *words]).returncode


@lru_cache
def commit() -> str | None:
    """The commit that this package is at, with a plus where files differ from it; None outside of a repository."""
    folder = Path(__file__).parent
    words = ["describe", "--always", "--exclude=*", "--dirty=+", "--abbrev=10"]
    try:
        git = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True)
    except OSError:
        return None
    return git.stdout.strip() if git.returncode == 0 else None


def essential(words: Sequence[str]) -> list[str]:
    """Options as "--name=value", without those that change no result (`Facts.free`)."""
    joined: list[str] = []
    for word in words:
        if word.startswith("--") or not joined:
            joined.append(word)
        else:
            joined[-1] += f"={word}"
    free = {name for name, facts in facts_of(TrainConfig).items() if facts.free}
    return [word for word in joined if word.removeprefix("--").split("=")[0] not in free]


def without_free(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's options by full name, without those that change no result."""
    facts = facts_of(TrainConfig)
    return {name: value for name, value in flat(recipe).items() if name not in facts or not facts[name].free}


def _digest(identity: Mapping[str, Any]) -> str:
    essence = [without_free(identity.get("recipe", {})), essential(identity.get("options", []))]
    return hashlib.sha256(json.dumps(essence, sort_keys=True).encode()).hexdigest()[:16]


def _read(read: Any) -> dict[str, Any] | None:
    """The contents of a file, None if it is missing or cut short."""
    try:
        return read()
    except (OSError, ValueError):
        return None
