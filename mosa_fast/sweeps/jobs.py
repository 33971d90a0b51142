"""The trainings of a sweep, so many at a time: what asks for them, and who gets the next free process."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Protocol, TypeVar, runtime_checkable

from mosa_fast.sweeps.records import Records
from mosa_fast.sweeps.runs import Run, Start, Summary, as_process

T = TypeVar("T")
# Gives runs, gets their summaries (None: it failed), until it returns what it found.
Job = Generator[list[Run], list[Summary | None], T]


@runtime_checkable
class Cancellable(Protocol):
    """A Start whose trainings do not get the signals that this process gets."""

    def cancel(self) -> None:
        """Tell them to stop, and start none any more."""


def execute(jobs: Sequence[Job[T]], processes: int, records: Records, start: Start = as_process) -> list[T]:
    """What the jobs return. A free process always takes a run of the first job that has one.

    Args:
        jobs: the first come first.
        processes: runs at the same time.
        records: knows finished runs, and gets every one.
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
                    running[pool.submit(run.execute, start, records.find)] = (job, place, run)
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
