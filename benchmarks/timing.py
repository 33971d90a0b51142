"""Timing that can be believed: contenders take turns, caches are cold, medians with their spread.

Runs are interleaved (A B C A B C ...), so that a clock that drifts or a neighbour that wakes up meets all of them. On a
GPU every run is timed by device events, after a buffer larger than the L2 cache has been overwritten.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

CACHE_BYTES = 256 * 2**20  # more than any L2 cache (an H100's is 50 MB)
MIB = 2**20
Clock = Callable[[], float]  # seconds


@dataclass(frozen=True)
class Deadline:
    """A moment by which something should be done.

    Attributes:
        at: the clock's time of that moment.
        clock: the time now, in seconds.
    """

    at: float = float("inf")
    clock: Clock = time.perf_counter

    @classmethod
    def after(cls, seconds: float, clock: Clock = time.perf_counter) -> Deadline:
        """So many seconds from now."""
        return cls(clock() + seconds, clock)

    def left(self) -> float:
        """Seconds from now to the deadline; negative where it has passed."""
        return self.at - self.clock()

    def part(self, weight: float, of: float) -> Deadline:
        """An earlier deadline, after `weight / of` of the time that is left."""
        return Deadline(self.clock() + max(0.0, self.left()) * weight / of, self.clock)


@dataclass(frozen=True)
class Work:
    """Something to time.

    Attributes:
        run: what is timed.
        prepare: what comes, untimed, before each run.
    """

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Timing:
    """Median, first and third quartile, in milliseconds, of so many runs."""

    median: float
    low: float
    high: float
    runs: int


def interleaved(
    works: dict[str, Work],
    device: torch.device,
    *,
    repeats: int = 20,
    warmup: int = 2,
    deadline: Deadline | None = None,
) -> dict[str, Timing]:
    """Time every work up to `repeats` times, taking turns.

    Fewer times where another turn, as long as the last one, would end after the deadline, but always once. The first
    turns are a warm-up and do not count: `warmup` of them, or half of the turns where there was time for few.

    Args:
        works: by name.
        device: where they run.
        repeats, warmup: timed and untimed turns.
        deadline: of all turns together; its clock times the runs on a CPU. None: there is none.
    """
    deadline = deadline or Deadline()
    times: dict[str, list[float]] = {name: [] for name in works}
    gpu = device.type == "cuda"
    flush = torch.empty(CACHE_BYTES, dtype=torch.int8, device=device) if gpu else None
    turns, turn_seconds = 0, 0.0
    while turns < warmup + repeats and (turns == 0 or turn_seconds <= deadline.left()):
        started = deadline.clock()
        for name, work in works.items():
            work.prepare()
            if flush is not None:
                flush.zero_()
            times[name].append(_time_on_gpu(work.run) if gpu else _time_on_cpu(work.run, deadline.clock))
        turns, turn_seconds = turns + 1, deadline.clock() - started
    return {name: summarise(values[min(warmup, turns // 2) :]) for name, values in times.items()}


def _time_on_gpu(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Keeps the device busy while the host queues the run, so that launch gaps are not timed as work.
    torch.cuda._sleep(1_000_000)
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _time_on_cpu(run: Callable[[], object], clock: Clock) -> float:
    start = clock()
    run()
    return (clock() - start) * 1e3


def summarise(values: list[float]) -> Timing:
    """Median and quartiles."""
    if len(values) == 1:
        return Timing(values[0], values[0], values[0], 1)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, low, high, len(values))


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(work: Work) -> float:
    """MiB that a run allocates on the GPU on top of what is allocated before it."""
    work.prepare()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work.run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def saved_memory(run: Callable[[], object]) -> float:
    """MiB of distinct activations that a run keeps for its backward; the same on every device."""
    storages: dict[int, int] = {}
    kept = []  # alive, so that no address comes twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor if tensor._base is None else tensor._base, torch.nn.Parameter):  # nor a transposed one
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            kept.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storages.values()) / MIB
