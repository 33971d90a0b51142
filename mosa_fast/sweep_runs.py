"""The trainings of a sweep: processes of their own, so many at a time, each with a line in a file when it is done."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from mosa_fast.recipes import load_recipe
from mosa_fast.run_folder import RunFolder
from mosa_fast.sweep_table import Options

STOPPED = (130, 143, -2, -15)  # exit codes of a run that SIGINT or SIGTERM stopped
KEPT = (  # of a run's summary, in its record
    *("val_accuracy", "test_accuracy", "last_test_accuracy", "selected_epoch", "epochs", "steps", "bad_steps"),
    *("trained_weights", "head_weights", "seconds", "device", "versions"),
)

Summary = dict[str, Any]
Start = Callable[[Sequence[str]], int]  # trains as the words of a command line say, and gives its exit code
T = TypeVar("T")
# Gives runs, gets their summaries (None: it failed), until it returns what it found.
Job = Generator[list["Run"], list[Summary | None], T]


@runtime_checkable
class Cancellable(Protocol):
    """A Start whose trainings do not get the signals that this process gets."""

    def cancel(self) -> None:
        """Tell them to stop, and start none any more."""


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
        """What decides the run's result; kept beside it."""
        return {"recipe": load_recipe(self.recipe), "options": list(self.options)}

    def summary(self) -> Summary | None:
        """The finished run's summary, None if it is not finished.

        Raises:
            ValueError: the folder holds a run with other settings.
        """
        kept = _read(self.folder.read_sweep)
        if kept is not None and {**kept, **self.identity()} != kept and self.folder.holds_a_run:
            raise ValueError(f"{self.folder} was made with other settings: choose another --out, or remove it")
        summary = _read(self.folder.read_summary)
        return summary if kept is not None and summary is not None and summary.get(self.result) is not None else None

    def execute(self, start: Start) -> Summary | None:
        """Train unless it is done; the summary, or None if the run failed.

        Args:
            start: what trains.

        Raises:
            KeyboardInterrupt: the run was told to stop.
        """
        done = self.summary()
        if done is not None:
            return done
        self.folder.write_sweep(self.identity() | {"commit": commit()})
        words = ["--config", str(self.recipe), *self.options, "--resume", f"--out={self.folder}"]
        code = start(words)
        if code in STOPPED or code < 0:
            raise KeyboardInterrupt
        return self.summary() if code == 0 else None


class Records:
    """A file with a line of JSON for every finished run.

    Args:
        path: the file; None: nothing is written.

    Raises:
        ValueError: a line that is not the last is broken.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        found = read_records(path) if path is not None and path.is_file() else []
        self._known = {_key(record) for record in found}

    def add(self, run: Run, summary: Summary) -> None:
        """Append a run, unless it is there."""
        if self.path is None:
            return
        made_by = (_read(run.folder.read_sweep) or {}).get("commit")
        record = {**run.labels, "commit": made_by, **{name: summary[name] for name in KEPT if name in summary}}
        if _key(record) not in self._known:
            self._known.add(_key(record))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as file:
                file.seek(0)
                content = file.read()
                file.truncate(content.rfind(b"\n") + 1)  # what a kill cut short is not glued to this one
                file.write(json.dumps(record).encode() + b"\n")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file; a last line that a kill cut short, which has no newline, is left out.

    Raises:
        OSError: it cannot be read.
        ValueError: another line is broken.
    """
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            record = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is broken: {error}") from None
        if record is not None:
            found.append(record)
    return found


def as_process(words: Sequence[str]) -> int:
    """Train in a process of its own on this machine; its exit code."""
    return subprocess.run([sys.executable, "-m", "mosa_fast.train", *words]).returncode


def execute(jobs: Sequence[Job[T]], processes: int, records: Records, start: Start = as_process) -> list[T]:
    """What the jobs return. A free process always takes a run of the first job that has one.

    Args:
        jobs: the first come first.
        processes: runs at the same time.
        records: gets every finished run.
        start: what trains.

    Raises:
        ValueError: a folder holds a run with other settings.
        KeyboardInterrupt: a run was told to stop.
    """
    found: dict[int, T] = {}
    waiting: dict[int, deque[tuple[int, Run]]] = {}
    summaries: dict[int, list[Summary | None]] = {}
    running: dict[Future[Summary | None], tuple[int, int, Run]] = {}

    def advance(job: int) -> None:
        """Hand a job its summaries and take its next runs; one that asks for none is asked again."""
        while not waiting.get(job):
            try:
                runs = next(jobs[job]) if job not in summaries else jobs[job].send(summaries[job])
            except StopIteration as end:
                found[job] = end.value
                return
            waiting[job], summaries[job] = deque(enumerate(runs)), [None] * len(runs)

    for job in range(len(jobs)):
        advance(job)
    pool = ThreadPoolExecutor(processes)  # its threads wait for trainings
    try:
        while len(found) < len(jobs):
            for job in sorted(waiting):
                while waiting[job] and len(running) < processes:
                    place, run = waiting[job].popleft()
                    running[pool.submit(run.execute, start)] = (job, place, run)
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                job, place, run = running.pop(future)
                summary = summaries[job][place] = future.result()
                if summary is not None:
                    records.add(run, summary)
                if not waiting[job] and all(other != job for other, _, _ in running.values()):
                    advance(job)
    except BaseException:
        if isinstance(start, Cancellable):  # processes of this machine's have got the user's Ctrl-C themselves
            start.cancel()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return [found[job] for job in range(len(jobs))]


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


def _key(record: Mapping[str, Any]) -> str:
    """What tells records of different runs from each other."""
    return json.dumps({name: value for name, value in record.items() if name not in KEPT}, sort_keys=True)


def _read(read: Any) -> dict[str, Any] | None:
    """The contents of a file, None if it is missing or cut short."""
    try:
        return read()
    except (OSError, ValueError):
        return None
