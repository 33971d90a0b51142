"""Speed is that of the steps."""

import re
import sys
import types

import pytest

from mosa_fast.run_folder import RunFolder
from mosa_fast.training import position as module
from mosa_fast.training.loggers import Loggers, Progress, Speedometer
from mosa_fast.training.position import Position


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test turns."""

    class Clock:
        now = 100.0

        def perf_counter(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def steps(position, clock, count, seconds):
    position.steps += count
    clock.now += seconds


def test_validation_and_checkpoints_do_not_count(clock):
    position = Position(images=80, batch_size=8, epochs=3)
    speed = Speedometer(position)
    steps(position, clock, 10, 4.0)
    with position.pause():
        clock.now += 1000.0
    assert speed.read() == 20
    assert speed.read() == 20  # no step since
    steps(position, clock, 5, 1.0)
    assert speed.read() == 40  # of these steps alone
    state = position.state_dict()
    resumed = Position(images=80, batch_size=8, epochs=3)
    resumed.load_state_dict(state)
    assert resumed.seconds == 1005.0
    assert Speedometer(resumed).read() == 0


def test_every_line_shows_the_speed_since_the_line_before(clock, capsys):
    """However often the losses were read in between, and at the last step of an epoch too."""
    position = Position(images=160, batch_size=16, epochs=2)
    progress = Progress(position, enabled=True)
    for _ in range(2):
        for _ in range(5):
            steps(position, clock, 2, 2.0)
            progress.update({"loss": "1"})  # not shown: less than a minute
        with position.pause():
            clock.now += 60.0
        progress.update({"epoch": "1"}, epoch_end=True)
    assert re.findall(r"images/s (\d+)", capsys.readouterr().err) == ["16", "16"]


def test_what_weights_and_biases_has_against_a_run_is_one_line(tmp_path, monkeypatch):
    def init(**settings):
        raise RuntimeError("api_key not configured\nand more")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with pytest.raises(ValueError, match=r"^Weights & Biases cannot be logged to: api_key not configured$"):
        Loggers(RunFolder(tmp_path), {"wandb": "here", "tensorboard": False}, Position(8, 8, 1), enabled=True)


def test_a_run_is_one_at_weights_and_biases_however_its_folder_is_called(tmp_path, monkeypatch):
    started = []
    stub = types.SimpleNamespace(init=lambda **settings: started.append(settings))
    monkeypatch.setitem(sys.modules, "wandb", stub)

    def begin(place):
        folder = RunFolder(tmp_path / place / "runs" / "birds")
        Loggers(folder, {"wandb": "here", "tensorboard": False}, Position(8, 8, 1), enabled=True)
        return folder

    folder = begin("one")
    begin("one")  # resumed
    begin("other")
    folder.start_anew()
    begin("one")
    assert {settings["name"] for settings in started} == {"runs-birds"}
    first, resumed, other, overwritten = (settings["id"] for settings in started)
    assert first == resumed
    assert len({first, other, overwritten}) == 3
