"""Every spec gets its part of a suite's time, by a clock that only advances when something runs."""

import pytest
import torch

from benchmarks import measure, suite
from benchmarks.cases import CASES, Contender
from benchmarks.results import NO_TIME
from benchmarks.spec import Spec
from benchmarks.timing import Deadline, Work, interleaved

CPU = torch.device("cpu")
CONTENDERS = ("no adapter", "ours", "paper", "dense", "lora", "one more", "another")


class Clock:
    now = 100.0

    def __call__(self):
        return self.now

    def work(self, seconds):
        def run():
            self.now += seconds

        return Work(run)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def measured(clock, monkeypatch):
    """Runs a suite of specs whose contenders all take a given time: (results, seconds it took)."""

    def run(minutes, *specs):
        seconds = {f"model {index}": seconds for index, (seconds, _) in enumerate(specs)}

        def case(spec, device):
            def contender(name):
                work = clock.work(seconds[spec.backbone])

                def results():
                    work.run()
                    return {"output": torch.ones(1)}

                return Contender(name, {"all": work}, results)

            return {name: lambda name=name: contender(name) for name in CONTENDERS}

        monkeypatch.setitem(CASES, "fake", case)
        monkeypatch.setattr(measure, "speeds", lambda device: {})
        made = [Spec("fake", f"model {index}", 1, "fp32", weight=weight) for index, (_, weight) in enumerate(specs)]
        start = clock()
        results = measure.run_suite(suite.Suite(tuple(made), minutes), CPU, clock=clock)
        return results, clock() - start

    return run


def runs(results):
    """Timed runs by spec and contender."""
    found = {}
    for row in results["rows"]:
        found.setdefault(row["backbone"], {})[row["contender"]] = row["runs"] or 0
    return list(found.values())


def test_a_part_is_of_the_time_that_is_left(clock):
    whole = Deadline.after(60, clock)
    clock.now += 20
    assert whole.left() == 40
    assert whole.part(1, 4).left() == 10
    clock.now += 50
    assert whole.left() == -10
    assert whole.part(1, 4).left() == 0


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(1000, 5), (14, 5), (13, 4), (8, 2), (6, 2), (4, 1), (2, 1), (0, 1)],  # a turn takes 2 seconds; 2 warm up
)
def test_repeats_follow_from_the_time(clock, seconds, expected):
    works = {"a": clock.work(0.5), "b": clock.work(1.5)}
    start = clock()
    timings = interleaved(works, CPU, repeats=5, warmup=2, deadline=Deadline.after(seconds, clock))
    assert {name: timing.runs for name, timing in timings.items()} == {"a": expected, "b": expected}
    assert timings["a"].median == 500
    assert timings["b"].median == 1500
    assert clock() - start <= max(seconds, 2)


def test_what_comes_before_a_run_is_not_timed(clock):
    works = {"a": Work(run=clock.work(1).run, prepare=clock.work(5).run)}
    timing = interleaved(works, CPU, repeats=3, deadline=Deadline(clock=clock))["a"]
    assert (timing.low, timing.median, timing.high) == (1000, 1000, 1000)


def test_where_there_is_time_everything_runs_as_often_as_it_says(measured):
    results, seconds = measured(2, (0.01, 1), (0.5, 1))
    assert all(set(found.values()) == {10} for found in runs(results))
    assert seconds == pytest.approx(7 * 13 * 0.51)


def test_a_slow_spec_has_fewer_repeats_and_leaves_the_others_their_time(measured):
    results, seconds = measured(2, (3.0, 1), *[(0.01, 1)] * 7)
    slow, *quick = runs(results)
    assert len(quick) == 7
    assert all(set(found.values()) == {10} for found in quick)
    assert slow["no adapter"] == 1
    assert seconds < 120


def test_the_last_spec_has_what_the_others_left(measured):
    results, seconds = measured(2, *[(0.01, 1)] * 7, (3.0, 1))
    assert set(runs(results)[-1].values()) == {2}  # 21 seconds to prepare it, 21 each turn, and one turn to warm up
    assert seconds <= 120


def test_a_weight_buys_repeats(measured):
    first, _ = measured(2, (0.5, 1), (0.5, 1), (0.5, 1), (0.5, 1), (0.5, 1), (0.5, 1))
    second, _ = measured(2, (0.5, 3), (0.5, 1), (0.5, 1), (0.5, 1), (0.5, 1), (0.5, 1))
    assert runs(second)[0]["ours"] > runs(first)[0]["ours"]


def test_contenders_that_nobody_has_time_for_have_a_reason_and_every_spec_a_row(measured):
    results, seconds = measured(2, *[(5.0, 1)] * 8)
    assert not results["left_out"]
    found = runs(results)
    assert len(found) == 8
    assert all(row["no adapter"] >= 1 for row in found)
    assert {row["reason"] for row in results["rows"] if row["runs"] is None} == {NO_TIME}
    assert seconds <= 120


def test_after_its_time_a_suite_leaves_specs_out(measured, capsys):
    results, _ = measured(0.5, (40.0, 1), (1.0, 1))
    assert [spec["backbone"] for spec in results["left_out"]] == ["model 1"]
    assert [row["contender"] for row in results["rows"] if row["runs"]] == ["no adapter"]
    assert f"model 1 1 x 197 fp32: left out, {NO_TIME}" in capsys.readouterr().err


def test_a_run_that_is_cut_short_leaves_what_it_has(clock, monkeypatch):
    monkeypatch.setattr(measure, "speeds", lambda device: {})

    def stopped(spec, *arguments):
        if spec.backbone == "second":
            raise KeyboardInterrupt
        return [{"backbone": spec.backbone}]

    monkeypatch.setattr(measure, "measure", stopped)
    specs = tuple(Spec("operator", name, 1, "fp32") for name in ("first", "second"))
    saved = []
    with pytest.raises(KeyboardInterrupt):
        measure.run_suite(suite.Suite(specs, 1), CPU, clock=clock, save=lambda results: saved.extend(results["rows"]))
    assert saved == [{"backbone": "first"}]
