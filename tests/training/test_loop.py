import json
import sys
import types

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import stub_evaluate, tiny_run

import mosa_fast as mosa
from mosa_fast.backbones.embedded import create_embedded
from mosa_fast.config import DataConfig, LossConfig, MoSAConfig, OptimConfig, TrainConfig
from mosa_fast.data import load_data
from mosa_fast.data.preprocessing import Statistics, squashed
from mosa_fast.run_folder import RunFolder
from mosa_fast.training.distributed import pick_device
from mosa_fast.training.evaluation import Scores
from mosa_fast.training.loop import train


def small_run(out, **changes) -> TrainConfig:
    settings = {
        "data": DataConfig(shots=2),
        "adapter": MoSAConfig(bottleneck=4),
        "optim": OptimConfig(lr=5e-3, epochs=2, warmup_epochs=0, batch_size=20),
        "eval_every": 2,
        "out": str(out),
    }
    return TrainConfig(**settings | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run: its folder and its summary."""
    out = tmp_path_factory.mktemp("run")
    return out, train(small_run(out), progress=False)


def test_a_run_leaves_everything_it_promises_and_the_numbers_agree(finished):
    out, summary = finished
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert (out / "curves.png").stat().st_size > 1000
    assert json.loads((out / "summary.json").read_text())["test_accuracy"] == summary["test_accuracy"]
    # The file alone, on a fresh backbone, gives the reported number.
    model = mosa.load_adapter(create_embedded(10, pretrained=True), out / "adapter.safetensors").eval()
    assert model.classes == [str(digit) for digit in range(10)]
    assert model.preprocessing == squashed(32, Statistics((0.5,) * 3, (0.5,) * 3))
    images, labels = load_data(DataConfig(shots=2), 32, 3407).test.tensors
    with torch.no_grad():
        accuracy = (model(images).argmax(1) == labels).double().mean() * 100
    assert accuracy.item() == pytest.approx(summary["test_accuracy"], abs=0.13)  # one image of 800, for rounding


def test_same_seed_same_bits(finished, tmp_path):
    first = load_file(finished[0] / "adapter.safetensors")
    train(small_run(tmp_path / "again", test=False), progress=False)
    again = load_file(tmp_path / "again" / "adapter.safetensors")
    assert all(torch.equal(first[key], again[key]) for key in first)
    train(small_run(tmp_path / "other", seed=1, test=False), progress=False)
    other = load_file(tmp_path / "other" / "adapter.safetensors")
    assert not torch.equal(first["blocks.0.adapter.up.weight"], other["blocks.0.adapter.up.weight"])


def test_a_search_leaves_the_test_images_alone(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "mosa_fast.training.loop.evaluate", lambda model, loader, *_, **__: seen.append(loader) or Scores(50.0, 1.0)
    )
    summary = train(small_run(tmp_path, test=False), progress=False)
    assert "test_accuracy" not in summary
    assert [len(loader.dataset.dataset) for loader in seen] == [200]


@pytest.mark.parametrize("method", ["linear", "full", "scratch"])
def test_the_methods_to_compare_with(tmp_path, method):
    optim = OptimConfig(lr=1e-3, epochs=1, warmup_epochs=0, batch_size=20)
    summary = train(small_run(tmp_path, method=method, optim=optim, test=False), progress=False)
    names = set(load_file(tmp_path / "model.safetensors"))
    assert (names == {"head.weight", "head.bias"}) == (method == "linear")
    assert (summary["trained_weights"] == 0) == (method == "linear")


def test_the_deep_term_and_class_weights_run(tmp_path):
    loss = LossConfig(deep_reg=True, class_weights="inverse")
    optim = OptimConfig(lr=1e-3, epochs=1, warmup_epochs=0, batch_size=20)
    train(small_run(tmp_path, loss=loss, optim=optim, test=False), progress=False)


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    for name in ("cuda:99", "nonsense"):
        with pytest.raises(ValueError, match="is not available here"):
            pick_device(name)


def test_early_stopping(tmp_path, monkeypatch):
    """Two validations without a better one after the second, which is selected."""
    scores = iter([10.0, 30.0, 20.0, 30.0, 90.0])
    monkeypatch.setattr("mosa_fast.training.loop.evaluate", stub_evaluate(scores))
    summary = train(tiny_run(tmp_path, patience=2, optim=OptimConfig(epochs=9), test=False), progress=False)
    assert (summary["epochs"], summary["selected_epoch"], summary["val_accuracy"]) == (4, 2, 30.0)


def test_numbers_go_to_tensorboard_and_to_wandb(tmp_path, monkeypatch):
    event_files = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logged = []
    project = types.SimpleNamespace(log=lambda numbers, step: logged.append((step, numbers)), finish=lambda: None)
    started = []
    stub = types.SimpleNamespace(init=lambda **settings: started.append(settings) or project)
    monkeypatch.setitem(sys.modules, "wandb", stub)
    train(tiny_run(tmp_path, tensorboard=True, wandb="here", log_every=2), progress=False)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    events = event_files.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train_loss")] == [3, 6, 9]
    assert [event.value for event in events.Scalars("val_accuracy")] == [row["val_accuracy"] for row in rows]
    assert "val_loss" in events.Tags()["scalars"]
    (text,) = events.Tensors("configuration/text_summary")
    assert "    precision: fp32\n" in text.tensor_proto.string_val[0].decode()
    assert {"curves", "confusion"} <= set(events.Tags()["images"])
    assert [event.step for event in events.Scalars("running_loss")] == [2, 4, 6, 8]
    assert started[0]["project"] == "here"
    assert [numbers["val_accuracy"] for _, numbers in logged if "val_accuracy" in numbers] == [
        row["val_accuracy"] for row in rows
    ]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="wandb is not installed"):
        train(tiny_run(tmp_path, wandb="here"), progress=False, overwrite=True)
    assert RunFolder(tmp_path).is_finished  # what was there is not lost for that
