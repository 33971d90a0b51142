"""Where a run is, in epochs, steps and seconds: counted here and nowhere else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Position:
    """The position of a run, moved on by the step and by the end of each epoch.

    Args:
        images: of the training set.
        batch_size: images of a step, over all processes.
        epochs: of the whole run.

    Attributes:
        steps_per_epoch, total_steps: how far there is to go.
        steps: steps taken.
        epochs_done: epochs that were trained, validated and logged. One whose steps are all taken is not done yet.
    """

    def __init__(self, images: int, batch_size: int, epochs: int) -> None:
        self.batch_size = batch_size
        self.epochs = epochs
        self.steps_per_epoch = -(-images // batch_size)
        self.total_steps = epochs * self.steps_per_epoch
        self.steps = self.epochs_done = 0
        self._seconds_before, self._begin = 0.0, time.perf_counter()
        self._paused = 0.0

    @property
    def epoch(self) -> int:
        """The epoch that is being trained, counted from 1."""
        return self.epochs_done + 1

    @property
    def steps_in_epoch(self) -> int:
        """Steps taken in it."""
        return self.steps - self.epochs_done * self.steps_per_epoch

    @property
    def is_last_epoch(self) -> bool:
        """Whether none comes after it."""
        return self.epoch == self.epochs

    @property
    def is_at_end(self) -> bool:
        """Whether all epochs are done."""
        return self.epochs_done == self.epochs

    @property
    def seconds(self) -> float:
        """Time that the run took, without the pauses between an interruption and its resumption."""
        return self._seconds_before + time.perf_counter() - self._begin

    @property
    def training_seconds(self) -> float:
        """Time that this process spent in steps, until now."""
        return time.perf_counter() - self._begin - self._paused

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What is done inside is not training: validation, checkpoints."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - begin

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "steps": self.steps,
            "epochs_done": self.epochs_done,
            "batch_size": self.batch_size,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: the steps were of another number of images.
        """
        if state["batch_size"] != self.batch_size:
            raise ValueError(
                f"the run was started with {state['batch_size']} images a step over all processes, not "
                f"{self.batch_size}: resume it with as many processes"
            )
        self.steps, self.epochs_done = state["steps"], state["epochs_done"]
        self._seconds_before, self._begin, self._paused = state["seconds"], time.perf_counter(), 0.0
