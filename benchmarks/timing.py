"""Timing that can be believed: contenders take turns, caches are cold, medians with their spread.

Runs are interleaved (A B C A B C ...), so that a clock that drifts or a neighbour that wakes up meets all of them. On a
GPU every run is timed by device events, after a buffer larger than the L2 cache has been overwritten.
"""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

CACHE_BYTES = 256 * 2**20  # more than any L2 cache (an H100's is 50 MB)


@dataclass(frozen=True)
class Timing:
    """Median, first and third quartile, in milliseconds."""

    median: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """Interquartile range as a share of the median."""
        return (self.high - self.low) / self.median


def interleaved(
    contenders: dict[str, Callable[[], object]],
    device: torch.device,
    *,
    repeats: int = 20,
    warmup: int = 3,
    prepare: Callable[[str], object] | None = None,
) -> dict[str, Timing]:
    """Time every contender `repeats` times, taking turns.

    Args:
        contenders: name to what is timed.
        device: where they run.
        repeats, warmup: timed and untimed turns.
        prepare: called with the contender's name before each of its runs, untimed.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    gpu = device.type == "cuda"
    flush = torch.empty(CACHE_BYTES, dtype=torch.int8, device=device) if gpu else None
    for turn in range(warmup + repeats):
        for name, run in contenders.items():
            if prepare is not None:
                prepare(name)
            if flush is not None:
                flush.zero_()
            elapsed = _time_on_gpu(run) if gpu else _time_on_cpu(run)
            if turn >= warmup:
                times[name].append(elapsed)
    return {name: summarise(values) for name, values in times.items()}


def _time_on_gpu(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Keeps the device busy while the host queues the run, so that launch gaps are not timed as work.
    torch.cuda._sleep(1_000_000)
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _time_on_cpu(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def summarise(values: list[float]) -> Timing:
    """Median and quartiles."""
    if len(values) == 1:
        return Timing(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Timing(median, low, high)


def copy_time(nbytes: int, device: torch.device, repeats: int = 20) -> Timing:
    """Time of copying so that `nbytes` are moved: half of them read, half written."""
    source = torch.empty(max(1, nbytes // 2), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return interleaved({"copy": lambda: target.copy_(source)}, device, repeats=repeats)["copy"]


def peak_memory(run: Callable[[], object], device: torch.device) -> float:
    """MiB that a run allocates on top of what is allocated before it; nan on a CPU."""
    if device.type != "cuda":
        return float("nan")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def environment(device: torch.device) -> dict[str, str]:
    """What a result depends on: device, versions, commit."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine() + " CPU",
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": commit(),
    }


def commit() -> str:
    """The repository's commit, with a plus where files differ from it."""
    folder = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=folder, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
