"""Runs that are killed at moments drawn by a seeded schedule end with the numbers of a run that was never killed.

Half of the moments are events (in the middle of a write, before a rename, a removal, a step), half are times, so that
validations, the start and the end of a run come in for their part too.
"""

import os
import random
import shutil
import signal
import time

import pytest
from tally import campaign
from tiny_runs import die_at, in_child, result, run_ranks, start_ranks, tiny_run, wait_for

from mosa_fast.config import LossConfig, OptimConfig
from mosa_fast.training.loop import train

SEED = 15
EVENTS = 110  # about so many has a run
SETTINGS = {"checkpoint_steps": 1, "log_every": 1, "loss": LossConfig(deep_reg=True)}
LONG = pytest.mark.slow
HALF = OptimConfig(lr=5e-3, epochs=3, warmup_epochs=0, batch_size=4)  # of two processes


def killed_after(children, seconds, victims):
    """Exit codes of processes, some of which are killed; the rest is ended as torchrun does."""
    time.sleep(seconds)
    for victim in victims:
        os.kill(children[victim], signal.SIGKILL)
    if len(victims) < len(children):
        time.sleep(1.0)
        for index, child in enumerate(children):
            if index not in victims:
                os.kill(child, signal.SIGKILL)
    return [wait_for(child) for child in children]


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=LONG)])
def test_one_process(tmp_path, kills):
    begin = time.perf_counter()
    train(tiny_run(tmp_path / "whole", **SETTINGS), progress=False)
    seconds, expected = time.perf_counter() - begin, result(tmp_path / "whole")
    dice = random.Random(SEED)
    with campaign("SIGKILL, one process", SEED, record=kills > 10) as tally:
        delivered = 0
        while delivered < kills:
            out = tmp_path / str(tally.tried)
            lives = 0
            while True:
                event = dice.randint(1, EVENTS) if dice.random() < 0.5 else None
                moment = dice.random() * seconds
                last = lives == 2  # killed twice, it is let go on to its end

                def life(event=event, out=out, last=last):
                    if event is not None and not last:
                        die_at(event)
                    train(tiny_run(out, **SETTINGS), progress=False, resume=True)

                child = in_child(life)
                codes = [wait_for(child)] if event is not None or last else killed_after([child], moment, [0])
                lives += 1
                if codes != [-signal.SIGKILL]:
                    break
                delivered += 1
            same = codes == [0] and result(out) == expected
            tally.add(None if same else f"run {tally.tried}: codes {codes}, other numbers", kills=lives - 1)
            shutil.rmtree(out)


@pytest.mark.parametrize("kills", [1, pytest.param(50, marks=LONG)])
def test_two_processes(tmp_path, kills):
    """Either rank dies, or both; both are started again."""

    def settings(out):
        return tiny_run(tmp_path / out, **SETTINGS | {"optim": HALF})

    begin = time.perf_counter()
    assert run_ranks(2, settings("whole")) == [0, 0]
    seconds, expected = time.perf_counter() - begin, result(tmp_path / "whole")
    dice = random.Random(SEED)
    with campaign("SIGKILL, two processes", SEED, record=kills > 10) as tally:
        for run in range(kills):
            out, victims = str(run), dice.choice(([0], [1], [0, 1]))
            # Later than the start, and before the end.
            codes = killed_after(start_ranks(2, settings(out)), (0.2 + 0.8 * dice.random()) * seconds, victims)
            again = run_ranks(2, settings(out), resume=True)
            same = again == [0, 0] and result(tmp_path / out) == expected
            tally.add(None if same else f"run {run}: {codes}, then {again}, other numbers")
            shutil.rmtree(tmp_path / out)


def stopped_at(step, config, monkeypatch):
    """Exit codes of two ranks, the second of which gets a SIGTERM at a step."""
    from mosa_fast.training.step import TrainStep

    original = TrainStep.advance

    def advance(taken):
        original(taken)
        if taken.position.steps == step and taken.ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(TrainStep, "advance", advance)
        return run_ranks(2, config, main=True)


def test_sigterm_to_one_rank_stops_and_saves_both_and_two_go_on_but_not_one(tmp_path, monkeypatch, capfd):
    def settings(out, **changes):
        return tiny_run(tmp_path / out, **SETTINGS | {"optim": HALF} | changes)

    assert run_ranks(2, settings("whole")) == [0, 0]
    assert stopped_at(4, settings("cut"), monkeypatch) == [143, 143]
    assert (tmp_path / "cut" / "checkpoint" / "step-000000004.pt").is_file()
    capfd.readouterr()
    assert run_ranks(1, settings("cut"), main=True, resume=True) == [2]
    assert "started with 8 images a step over all processes, not 4: resume it with as many" in capfd.readouterr().err
    assert run_ranks(2, settings("cut"), main=True, resume=True) == [0, 0]
    assert result(tmp_path / "cut") == result(tmp_path / "whole")
