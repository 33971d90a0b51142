"""Runs of a sweep as tasks of Ray, on as many machines as its cluster has (https://docs.ray.io).

A task gets the CPUs and GPUs it asks for, on a machine that has them free. Where its machine or process dies, Ray
starts it anew on another, and the run goes on from its last checkpoint; the training is the task's own process, so that
the one that died cannot go on beside it. The folder of the runs and this package must be the same on all machines.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any

TOLD_TO_STOP = 130  # exit code of a training that SIGINT has stopped
RETRIES = 20  # of a task whose process died; what a run itself reports as an error is not tried again


def fitting(cpus: float, gpus: float) -> int:
    """How many runs the cluster has room for now, at least one."""
    import ray

    room = ray.cluster_resources()
    return max(1, int(min(room.get(name, 0) // asked for name, asked in (("CPU", cpus), ("GPU", gpus)) if asked)))


def connect() -> None:
    """Join the cluster that RAY_ADDRESS names; without it, start one on this machine.

    Raises:
        ValueError: Ray is not installed, or does not answer.
    """
    try:
        import ray
    except ImportError:
        raise ValueError('--engine ray needs the package ray: pip install "mosa_fast[ray]"') from None
    try:
        ray.init(ignore_reinit_error=True)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ValueError(f"no cluster of Ray: {str(error).splitlines()[0]}") from None


class Tasks:
    """What starts a training as a task and waits for its exit code; it joins the cluster.

    Args:
        cpus, gpus: that a task asks for.
    """

    def __init__(self, cpus: float, gpus: float) -> None:
        connect()
        import ray

        # A process for each run: a GPU's memory is free again when it is over.
        self._task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES, max_calls=1)(train_here)
        self._lock, self._running, self._cancelled = threading.Lock(), set[Any](), False

    def __call__(self, words: Sequence[str]) -> int:
        """Train; the exit code."""
        import ray

        with self._lock:
            if self._cancelled:
                return TOLD_TO_STOP
            task = self._task.remote(list(words), os.getcwd())
            self._running.add(task)
        try:
            return ray.get(task)
        except (ray.exceptions.TaskCancelledError, KeyboardInterrupt):
            return TOLD_TO_STOP
        finally:
            self._running.discard(task)

    def cancel(self) -> None:
        """Tell all trainings to stop, as Ctrl-C tells one; they save a checkpoint. None is started any more."""
        import ray

        with self._lock:
            self._cancelled = True
            for task in list(self._running):
                ray.cancel(task)


def train_here(words: list[str], folder: str) -> int:
    """Train in this process; the exit code that `python -m mosa_fast.train` would have.

    Args:
        words: of the command line.
        folder: what its relative paths start from.
    """
    from mosa_fast.train import main

    os.chdir(folder)
    try:
        main(words)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0
