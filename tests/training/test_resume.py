import os
import random
import shutil
import signal
from contextlib import contextmanager
from itertools import repeat

import pytest
import torch
from PIL import Image
from tiny_runs import die_at, in_child, result, stopped_by_signal, stub_evaluate, tiny_run, wait_for

from mosa_fast import run_lock
from mosa_fast.config import DataConfig, LossConfig, MoSAConfig, OptimConfig
from mosa_fast.run_folder import RunFolder
from mosa_fast.training.evaluation import Scores, evaluate
from mosa_fast.training.loop import train
from mosa_fast.training.position import Position
from mosa_fast.training.signals import Interrupted, StopAsked
from mosa_fast.training.step import TrainStep

# Adapters inside the MLPs, as in runs of the usual size: the form auto would find these batches too small for it.
ADAPTER = MoSAConfig(bottleneck=4, form="mlp")
SETTINGS = {"checkpoint_steps": 1, "loss": LossConfig(deep_reg=True), "adapter": ADAPTER}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    train(tiny_run(out, **SETTINGS), progress=False)
    return result(out)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_at_any_moment_again_and_again_it_ends_bit_equal(tmp_path, uninterrupted, seed):
    dice, lives, code = random.Random(seed), 0, None
    while code != 0:
        event = dice.randint(1, 90)

        def life(event=event):
            die_at(event)
            train(tiny_run(tmp_path, **SETTINGS), progress=False, resume=True)

        code = wait_for(in_child(life))
        assert code in (0, -signal.SIGKILL)
        lives += 1
        assert lives < 40
    assert lives > 1
    assert result(tmp_path) == uninterrupted
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["step", "validation"])
def test_a_signal_saves_and_the_run_goes_on_bit_equal(tmp_path, uninterrupted, monkeypatch, number, moment):
    def send(*_):
        os.kill(os.getpid(), number)

    if moment == "step":  # in the middle of the second epoch
        original = TrainStep.advance
        monkeypatch.setattr(TrainStep, "advance", lambda s: (original(s), s.position.steps == 4 and send())[0])
    else:
        monkeypatch.setattr("mosa_fast.training.loop.evaluation_loader", _signal_first(send))
    with pytest.raises(Interrupted, match="go on with --resume") as caught:
        train(tiny_run(tmp_path, **SETTINGS), progress=False)
    assert caught.value.signal == number
    assert not (tmp_path / "summary.json").exists()
    monkeypatch.undo()
    train(tiny_run(tmp_path, **SETTINGS), progress=False, resume=True)
    assert result(tmp_path) == uninterrupted


def _signal_first(send):
    from mosa_fast.data.loading import evaluation_loader

    def loader(*args, **kwargs):
        send()
        return evaluation_loader(*args, **kwargs)

    return loader


def stopped_run(out, monkeypatch, **changes):
    """A run that was stopped after its fourth step."""
    return stopped_by_signal(out, monkeypatch, signal.SIGTERM, 4, **changes)


def test_dropout_of_the_backbone_and_the_loss_scale_are_resumed_too(tmp_path, monkeypatch):
    from mosa_fast.config import ModelConfig

    settings = {
        "model": ModelConfig(name="test_vit", pretrained=False, backbone_dropout=0.2, drop_path=0.1),
        "precision": "fp16-mixed",
    }
    train(tiny_run(tmp_path / "whole", **settings), progress=False)
    stopped_run(tmp_path / "cut", monkeypatch, **settings)
    train(tiny_run(tmp_path / "cut", **settings), progress=False, resume=True)
    assert result(tmp_path / "cut") == result(tmp_path / "whole")


def test_what_does_not_fit_is_refused_and_nothing_is_lost(tmp_path, monkeypatch):
    checkpoint = stopped_run(tmp_path, monkeypatch)
    before = {path.name: path.read_bytes() for path in checkpoint.parent.iterdir()}

    with pytest.raises(ValueError, match="holds an unfinished run: go on with --resume"):
        train(tiny_run(tmp_path), progress=False)
    other = OptimConfig(lr=1e-3, epochs=3, warmup_epochs=0, batch_size=8)
    with pytest.raises(ValueError, match=r"was started with optim\.lr 0\.005, not 0\.001"):
        train(tiny_run(tmp_path, optim=other), progress=False, resume=True)
    assert {path.name: path.read_bytes() for path in checkpoint.parent.iterdir()} == before

    weights = next(checkpoint.parent.glob("step-*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"safetensors cannot be read"):
        train(tiny_run(tmp_path), progress=False, resume=True)
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"step-000000004\.pt cannot be read"):
        train(tiny_run(tmp_path), progress=False, resume=True)


def test_a_signal_while_the_selected_weights_are_tested_changes_no_number(tmp_path, monkeypatch):
    """By then the model has the weights of another epoch than the last."""

    def run(out, **options):
        scores = iter([30.0, 20.0, 10.0])  # the first epoch is selected
        with monkeypatch.context() as patched:
            patched.setattr(
                "mosa_fast.training.loop.evaluate", lambda *args, **options: tested(*args, scores=scores, **options)
            )
            return train(tiny_run(out), progress=False, **options)

    def tested(model, loader, *rest, scores, **options):
        if len(loader.dataset.dataset) == 200:
            return Scores(next(scores), loss=1.0)
        tests.append(1)
        if len(tests) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(model, loader, *rest, **options)

    tests, stop_at = [], None
    whole = run(tmp_path / "whole")
    assert whole["selected_epoch"] == 1
    assert whole["test_accuracy"] != whole["last_test_accuracy"]
    tests, stop_at = [], 2
    with pytest.raises(Interrupted):
        run(tmp_path / "cut")
    again = run(tmp_path / "cut", resume=True)
    for key in ("test_accuracy", "last_test_accuracy", "selected_epoch"):
        assert again[key] == whole[key]


def test_a_run_that_is_out_of_patience_trains_no_further_when_it_is_resumed(tmp_path, monkeypatch):
    def stop(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        raise StopAsked

    scores = (accuracy or stop() for accuracy in (30.0, 20.0, None))
    monkeypatch.setattr("mosa_fast.training.loop.evaluate", stub_evaluate(scores))
    with pytest.raises(Interrupted):  # in the test
        train(tiny_run(tmp_path, patience=1), progress=False)
    monkeypatch.setattr("mosa_fast.training.loop.evaluate", stub_evaluate(repeat(50.0)))
    summary = train(tiny_run(tmp_path, patience=1), progress=False, resume=True)
    assert (summary["epochs"], summary["selected_epoch"]) == (2, 1)


def test_another_number_of_images_a_step_is_refused(tmp_path, monkeypatch):
    stopped_run(tmp_path, monkeypatch)
    monkeypatch.setattr("mosa_fast.training.loop.Position", lambda images, size, epochs: Position(images, 16, epochs))
    with pytest.raises(ValueError, match="was started with 8 images a step over all processes, not 16"):
        train(tiny_run(tmp_path), progress=False, resume=True)


@pytest.mark.parametrize("version", [1, 3])  # 3: as today's, but for the numbers that a run draws
def test_a_checkpoint_of_another_version_is_refused(version, tmp_path, monkeypatch):
    checkpoint = stopped_run(tmp_path, monkeypatch)
    torch.save(torch.load(checkpoint) | {"format": f"mosa_fast.checkpoint.{version}"}, checkpoint)
    with pytest.raises(ValueError, match=r"is not a checkpoint of this version \(mosa_fast\.checkpoint\.4\)"):
        train(tiny_run(tmp_path), progress=False, resume=True)


def folder_of_images(root, per_class=4):
    for part in ("train", "val", "test"):
        for label, level in (("dark", 0), ("light", 200)):
            (root / part / label).mkdir(parents=True, exist_ok=True)
            for index in range(per_class):
                Image.new("RGB", (40, 40), (level, 10 * index, 0)).save(root / part / label / f"{index}.png")
    return {"data": DataConfig(name="folder", root=str(root), image_size=32, workers=0)}


def test_a_run_goes_on_with_the_data_it_was_started_on_wherever_they_lie(tmp_path, monkeypatch):
    settings = folder_of_images(tmp_path / "a") | {"optim": OptimConfig(epochs=3, warmup_epochs=0, batch_size=4)}
    stopped_run(tmp_path / "run", monkeypatch, **settings)
    (tmp_path / "a").rename(tmp_path / "moved")
    settings["data"].root = str(tmp_path / "moved")
    shutil.copytree(tmp_path / "run", tmp_path / "other")

    def resume(out):
        return train(tiny_run(tmp_path / out, **settings), progress=False, resume=True)

    added = tmp_path / "moved" / "train" / "dark" / "9.png"
    Image.new("RGB", (40, 40)).save(added)
    with pytest.raises(ValueError, match="started on other data: train had 8 images, now 9; resume it with the same"):
        resume("run")
    added.unlink()
    first = tmp_path / "moved" / "test" / "light" / "0.png"
    Image.new("RGB", (41, 40), (99, 98, 97)).save(first)
    with pytest.raises(ValueError, match="started on other data: test had other files, sizes or labels"):
        resume("run")
    Image.new("RGB", (40, 40), (200, 0, 0)).save(first)
    assert resume("run")["steps"] == 6


def test_data_with_other_classes_are_called_other_data(tmp_path, monkeypatch):
    """Not a head that does not fit."""
    settings = folder_of_images(tmp_path / "a") | {"optim": OptimConfig(epochs=3, warmup_epochs=0, batch_size=4)}
    stopped_run(tmp_path / "run", monkeypatch, **settings)
    for part in ("train", "val", "test"):
        shutil.copytree(tmp_path / "a" / part / "dark", tmp_path / "a" / part / "another")
    with pytest.raises(ValueError, match="started on other data: train had 8 images, now 12"):
        train(tiny_run(tmp_path / "run", **settings), progress=False, resume=True)


def test_weights_that_lost_their_state_are_not_thrown_away_in_silence(tmp_path, monkeypatch):
    checkpoint = stopped_run(tmp_path, monkeypatch)
    kept = checkpoint.read_bytes()
    checkpoint.unlink()
    for options in ({"resume": True}, {}):
        with pytest.raises(ValueError, match=r"step-000000004\.safetensors is without step-000000004\.pt"):
            train(tiny_run(tmp_path), progress=False, **options)
    checkpoint.write_bytes(kept)
    assert train(tiny_run(tmp_path), progress=False, resume=True)["steps"] == 9


def test_what_died_between_a_state_and_its_weights_name_goes_on(tmp_path, monkeypatch):
    checkpoint = stopped_run(tmp_path, monkeypatch)
    folder = RunFolder(tmp_path)
    folder.checkpoint_weights(4).rename(folder.pending_weights(4))
    assert checkpoint.is_file()
    assert train(tiny_run(tmp_path), progress=False, resume=True)["steps"] == 9


def test_a_finished_run_is_neither_replaced_nor_changed_unless_that_is_asked_for(tmp_path, capsys):
    first = train(tiny_run(tmp_path), progress=False)
    before = result(tmp_path)
    with pytest.raises(ValueError, match="holds a finished run, of 20.*replace it with --overwrite"):
        train(tiny_run(tmp_path), progress=False)
    longer = OptimConfig(lr=5e-3, epochs=4, warmup_epochs=0, batch_size=8)
    with pytest.raises(
        ValueError, match=r"holds a finished run with optim\.epochs 3, not 4 \(the learning rate came to"
    ):
        train(tiny_run(tmp_path, optim=longer), progress=False, resume=True)
    other = OptimConfig(lr=1e-3, epochs=3, warmup_epochs=0, batch_size=8)
    with pytest.raises(ValueError, match=r"holds a finished run with optim\.lr 0\.005, not 0\.001: choose another"):
        train(tiny_run(tmp_path, optim=other), progress=False, resume=True)
    assert result(tmp_path) == before
    capsys.readouterr()
    assert train(tiny_run(tmp_path, log_every=1), resume=True) == first  # an option that changes no result
    assert capsys.readouterr().out == f"{tmp_path} holds this run, finished: nothing to do\n"
    assert train(tiny_run(tmp_path, optim=longer), progress=False, overwrite=True)["steps"] == 12


def test_an_unfinished_run_is_replaced_where_that_is_asked_for(tmp_path, monkeypatch):
    stopped_run(tmp_path, monkeypatch)
    other = OptimConfig(lr=1e-3, epochs=1, warmup_epochs=0, batch_size=8)
    assert train(tiny_run(tmp_path, optim=other), progress=False, overwrite=True)["steps"] == 3


def test_two_runs_at_once_do_not_share_a_folder(tmp_path, uninterrupted, monkeypatch):
    """The second is refused while the first is running, and leaves it alone."""
    original, refusals = TrainStep.advance, []

    def advance(step):
        original(step)
        if step.position.steps == 5:
            for options in ({}, {"resume": True}, {"overwrite": True}):
                refusals.append(wait_for(in_child(lambda options=options: refused(options))))

    def refused(options):
        run_lock._held.clear()  # as in a process that was not forked from the first
        with pytest.raises(ValueError, match=f"is in use by process {os.getppid()} on "):
            train(tiny_run(tmp_path, **SETTINGS), progress=False, **options)

    monkeypatch.setattr(TrainStep, "advance", advance)
    train(tiny_run(tmp_path, **SETTINGS), progress=False)
    assert refusals == [0, 0, 0]
    assert result(tmp_path) == uninterrupted


def test_a_run_that_finishes_before_the_next_one_has_the_folder_is_not_lost(tmp_path, monkeypatch):
    """It holds the folder when the second looks at it, and has finished when the second gets it."""
    summaries = []

    @contextmanager
    def lock_late(folder):
        with monkeypatch.context() as first:
            first.setattr("mosa_fast.training.loop.lock_folder", run_lock.lock_folder)
            summaries.append(train(tiny_run(folder.path), progress=False))
        with run_lock.lock_folder(folder):
            yield

    monkeypatch.setattr("mosa_fast.training.loop.lock_folder", lock_late)
    with pytest.raises(ValueError, match="holds a finished run, of 20"):
        train(tiny_run(tmp_path / "refused"), progress=False)
    assert RunFolder(tmp_path / "refused").read_summary() == summaries[0]
    assert train(tiny_run(tmp_path / "resumed"), progress=False, resume=True) == summaries[1]
    assert RunFolder(tmp_path / "resumed").read_summary() == summaries[1]


def test_a_finished_run_is_not_run_again(tmp_path, monkeypatch):
    first = train(tiny_run(tmp_path), progress=False)
    monkeypatch.setattr("mosa_fast.training.loop.build_model", None)
    assert train(tiny_run(tmp_path), progress=False, resume=True) == first
