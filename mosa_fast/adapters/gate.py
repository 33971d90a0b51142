"""Who may use a bank at the same time: any number of passes, or one change of its tasks."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Gate:
    """Lets passes of any number of threads run together, and a change by itself.

    A change that waits goes before passes that come after it, or passes without a pause would keep it waiting for ever.
    A copy or a pickle is a new gate, which nobody has gone through.
    """

    def __init__(self) -> None:
        self._moved = threading.Condition()
        self._passes: Counter[int] = Counter()  # that are running, by thread
        self._changing = False  # or waiting to

    def __reduce__(self) -> Any:
        return Gate, ()

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Inside this context nobody changes anything."""
        thread = threading.get_ident()
        with self._moved:
            # A thread that is inside already goes on: the change that waits is waiting for it.
            self._moved.wait_for(lambda: thread in self._passes or not self._changing)
            self._passes[thread] += 1
        try:
            yield
        finally:
            with self._moved:
                self._passes[thread] -= 1
                self._passes += Counter()  # drops threads that have left
                self._moved.notify_all()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Inside this context there are no passes, and no other change.

        Raises:
            RuntimeError: this thread is in a pass, whose end it would wait for.
        """
        with self._moved:
            if threading.get_ident() in self._passes:
                raise RuntimeError("a bank's tasks cannot change in the middle of its own forward pass")
            self._moved.wait_for(lambda: not self._changing)
            self._changing = True
        try:
            with self._moved:
                self._moved.wait_for(lambda: not self._passes)
            yield
        finally:
            with self._moved:
                self._changing = False
                self._moved.notify_all()
