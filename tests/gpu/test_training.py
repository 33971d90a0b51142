"""A run on a GPU: as on a CPU, with CUDA graphs as without them, and resumed as if it had not been stopped."""

import signal

import pytest
from safetensors.torch import load_file
from tiny_runs import result, stopped_by_signal, tiny_run

from mosa_fast.config import DataConfig, OptimConfig
from mosa_fast.run_folder import RunFolder
from mosa_fast.training.loop import train
from mosa_fast.training.step import GraphedStep

pytestmark = pytest.mark.gpu
# 8 steps of 8 images and one of 6 in an epoch: the first are taken before the capture, those of 6 never captured.
SETTINGS = {
    "device": "cuda",
    "data": DataConfig(shots=7, image_size=32),
    "optim": OptimConfig(lr=5e-3, epochs=2, warmup_epochs=0, batch_size=8),
}
TOLERANCE = 1e-2  # AdamW makes a whole step of a gradient that is nothing but roundings
CAPTURED = SETTINGS | {"cuda_graphs": True}


@pytest.fixture
def captures(monkeypatch):
    """Step numbers at which a graph was captured."""
    found, original = [], GraphedStep._capture

    def capture(step):
        found.append(step.eager.position.steps)
        original(step)

    monkeypatch.setattr(GraphedStep, "_capture", capture)
    return found


def finished(out, *, resume=False, **settings):
    """Losses of a run's epochs, and its trained weights."""
    train(tiny_run(out, **settings), progress=False, resume=resume)
    rows, _, _ = result(out)
    return [row["train_loss"] for row in rows], load_file(RunFolder(out).adapter)


def check_equal(one, other):
    """Losses and every tensor of weights are the same but for roundings."""
    assert one[0] == pytest.approx(other[0], rel=TOLERANCE)
    assert one[1].keys() == other[1].keys()
    for name, weight in one[1].items():
        difference = (weight.double() - other[1][name].double()).norm()
        assert difference <= TOLERANCE * other[1][name].double().norm(), name


def test_a_run_learns_what_it_learns_on_a_cpu(tmp_path):
    on_gpu, on_cpu = (finished(tmp_path / device, **SETTINGS | {"device": device}) for device in ("cuda", "cpu"))
    assert on_gpu[0] == pytest.approx(on_cpu[0], rel=TOLERANCE)


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
def test_captured_steps_do_what_others_do(tmp_path, captures, precision):
    captured = finished(tmp_path / "captured", **CAPTURED | {"precision": precision})
    assert captures == [3]
    check_equal(captured, finished(tmp_path / "eager", **SETTINGS | {"precision": precision}))


@pytest.mark.parametrize(("before", "after"), [(CAPTURED, CAPTURED), (SETTINGS, CAPTURED), (CAPTURED, SETTINGS)])
def test_a_stopped_run_goes_on_captured_or_not(tmp_path, monkeypatch, captures, before, after):
    """The learning rate falls over all of the run: a graph that kept that of its capture would end elsewhere."""
    stopped_by_signal(tmp_path / "stopped", monkeypatch, signal.SIGTERM, step=5, **before)
    resumed = finished(tmp_path / "stopped", resume=True, **after)
    assert len(captures) == (before is CAPTURED) + (after is CAPTURED)
    check_equal(resumed, finished(tmp_path / "whole", **SETTINGS))
