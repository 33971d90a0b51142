"""Runs specs: every contender in turns, their checks, their memory, within the minutes of a suite."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import CASES, COPY, Contender, free_memory, operator_work
from benchmarks.contenders import best_backend
from benchmarks.machine import environment, speeds
from benchmarks.results import KEY, MEASURED, NO_TIME, Row
from benchmarks.spec import CONFIG, EVALUATIONS, OPERATORS, Spec
from benchmarks.suite import Suite
from benchmarks.timing import (
    MIB,
    Clock,
    Deadline,
    Timing,
    interleaved,
    peak_memory,
    saved_memory,
    synchronize,
)


def run_suite(
    suite: Suite,
    device: torch.device,
    *,
    save: Callable[[dict[str, Any]], None] = lambda results: None,
    clock: Clock = time.perf_counter,
) -> dict[str, Any]:
    """All rows, with what they depend on.

    Args:
        suite: what to run.
        device: where.
        save: called with what there is after every spec: a run that is cut short leaves that.
        clock: seconds.
    """
    started = clock()
    deadline = Deadline.after(60 * suite.minutes, clock)
    torch._dynamo.config.cache_size_limit = 64  # every block, shape and route is compiled, on purpose
    results: dict[str, Any] = {
        "environment": environment(device),
        "machine": speeds(device),
        "config": asdict(CONFIG),
        "seconds": 0.0,
        "left_out": [],
        "rows": [],
    }
    weight = sum(spec.weight for spec in suite.specs)
    for spec in suite.specs:
        if deadline.left() > 0:
            results["rows"] += measure(spec, device, deadline.part(spec.weight, weight), suite.contenders)
        else:
            results["left_out"].append(asdict(spec))
            print(f"{spec}: left out, {NO_TIME}", file=sys.stderr)
        weight -= spec.weight
        results["seconds"] = round(clock() - started, 1)
        save(results)
    return results


def measure(
    spec: Spec, device: torch.device, deadline: Deadline | None = None, contenders: Collection[str] = ()
) -> list[Row]:
    """The rows of one spec: one a contender and mode, with times, or with the reason why there are none.

    Args:
        spec: what to measure.
        device: where.
        deadline: contenders run fewer times where there is less time, but at least once; those for whose one run there
            is no time left are left out, never the first one.
        contenders: those that take part; all of the case's where empty.
    """
    preparation = _Preparation(spec, device, deadline or Deadline())
    for name, make in CASES[spec.case](spec, device).items():
        if not contenders or name in contenders:
            preparation.add(name, make)
    rows = [row for index in range(len(spec.modes)) for row in _rows(preparation, index)]
    del preparation
    free_memory()
    return rows


class _Preparation:
    """Contenders of a spec: made, run once, and checked; in the order of the case, while there is time.

    Attributes:
        names: all of them.
        ready: those that can be timed.
        reasons: why the others cannot.
        saved: MiB that a run keeps for its backward; under torch.compile it cannot be seen.
    """

    def __init__(self, spec: Spec, device: torch.device, deadline: Deadline) -> None:
        self.spec, self.device, self.deadline = spec, device, deadline
        self.names: list[str] = []
        self.ready: dict[str, Contender] = {}
        self.reasons: dict[str, str] = {}
        self.saved: dict[str, float] = {}
        self._slowest, self._runs = 0.0, [0.0]  # seconds: of a preparation, and of one run of each that is ready

    def add(self, name: str, make: Callable[[], Contender] | str) -> None:
        """Prepare one more, or keep the reason why there is none."""
        self.names.append(name)
        if isinstance(make, str):
            self.reasons[name] = make
            return
        # For another one as slow as the slowest so far, and then for one turn of all.
        needed = self._slowest + (sum(self._runs) + max(self._runs)) * len(self.spec.modes)
        if self.ready and self.deadline.left() < needed:
            self.reasons[name] = NO_TIME
            return
        started = self.deadline.clock()
        try:
            contender = make()
            seconds, found = self._run(contender)
            wrong = contender.wrong(self.spec, found)
        except Exception as error:  # a contender that breaks must not take the others' numbers with it
            self.reasons[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
        else:
            if wrong is None:
                self.ready[name] = contender
                self._runs.append(seconds)
            else:
                self.reasons[name] = f"wrong: {wrong}"
            self._slowest = max(self._slowest, self.deadline.clock() - started)

    def _run(self, contender: Contender) -> tuple[float, dict[str, Tensor]]:
        """Seconds of a run that compiles nothing, and results; what it saves for its backward is counted."""
        run = contender.work["all"].run
        found: dict[str, Tensor] = {}
        if not contender.typical or contender.compiled:
            found = contender.results()
            first = run
        else:

            def first() -> None:
                found.update(contender.results())

        if contender.compiled:
            run()
        started = self.deadline.clock()
        if contender.compiled or self.spec.case in EVALUATIONS:
            first()
        else:
            self.saved[contender.name] = round(saved_memory(first), 2)
        synchronize(self.device)
        return self.deadline.clock() - started, found


def _rows(preparation: _Preparation, index: int) -> Iterator[Row]:
    """The rows of the spec's mode of that index; with them they are printed."""
    spec, ready, mode = preparation.spec, preparation.ready, preparation.spec.modes[index]
    works = {name: contender.work[mode] for name, contender in ready.items()}
    part = preparation.deadline.part(1, len(spec.modes) - index)
    timings = interleaved(works, preparation.device, repeats=spec.repeats, deadline=part)
    for name in preparation.names:
        row: Row = {field: getattr(spec, field) for field in KEY[:-2]} | {"mode": mode, "contender": name}
        row |= dict.fromkeys(MEASURED) | {"reason": preparation.reasons.get(name)}
        if name in ready:
            row |= _time(spec, timings[name], timings.get(COPY))
            if preparation.device.type == "cuda":
                row["peak_mib"] = round(peak_memory(works[name]), 1)
            if spec.case in OPERATORS:
                row["operations"], row["planned_bytes"] = operator_work(spec, mode)
            if mode == "all":
                state = ready[name].state_bytes
                row["saved_mib"] = preparation.saved.get(name)
                row["state_mib"] = None if state is None else round(state / MIB, 2)
        print(line(row), flush=True)
        yield row


def _time(spec: Spec, timing: Timing, copy: Timing | None) -> Row:
    return {
        "runs": timing.runs,
        "ms": round(timing.median, 4),
        "low": round(timing.low, 4),
        "high": round(timing.high, 4),
        "images_per_s": round(spec.images / timing.median * 1e3, 2),
        "of_copy": None if copy is None else round(copy.median / timing.median, 4),
    }


def profile(spec: Spec, device: torch.device, times: int = 3) -> None:
    """Run ours a few times and print what it plans to move, for a profiler to compare its counts with."""
    make = CASES[spec.case](spec, device)[f"ours, {best_backend(device)}"]
    assert not isinstance(make, str)  # the best backend is one that can serve
    contender = make()
    for _ in range(times):
        contender.work["all"].run()
    synchronize(device)
    print(spec)
    for mode in ("forward", "backward"):
        print(f"planned bytes {mode}: {operator_work(spec, mode)[1]}")


def line(row: Row) -> str:
    """A row to read while the suite runs."""
    mode = "" if row["mode"] == "all" else row["mode"]
    start = f"{row['case']:11}{row['images']:4} x {row['tokens']:<5}{row['precision']:11}{mode:9}{row['contender']:26}"
    if row["ms"] is None:
        return f"{start} not timed: {row['reason']}"
    return f"{start}{row['ms']:10.2f} ms  [{row['low']:.2f}, {row['high']:.2f}]  {row['images_per_s']:10.1f} images/s"
