"""Whole runs on families of image files, with the embedded backbone."""

import json

import pytest
import torch
from layouts import write_fgvc, write_vtab

from mosa_fast.adapters.adapter_file import save_adapter
from mosa_fast.config import DataConfig, ModelConfig, MoSAConfig, OptimConfig, TrainConfig
from mosa_fast.data import load_data
from mosa_fast.data.loading import batches
from mosa_fast.data.preprocessing import Statistics, squashed
from mosa_fast.evaluate import evaluate_run
from mosa_fast.run_folder import RunFolder
from mosa_fast.training.evaluation import Scores
from mosa_fast.training.finished_run import open_run
from mosa_fast.training.loop import train

pytestmark = pytest.mark.filterwarnings("ignore:.*classes, these split files name")


def run(out, **settings):
    optim = OptimConfig(lr=1e-3, epochs=2, warmup_epochs=0, batch_size=8, **settings.pop("optim", {}))
    adapter = MoSAConfig(bottleneck=4)
    return train(TrainConfig(adapter=adapter, optim=optim, out=str(out / "run"), **settings), progress=False)


def test_without_validation_images_the_last_epoch_is_reported(tmp_path):
    data = DataConfig(name="vtab", task="kitti", root=str(write_vtab(tmp_path)), mode="final", workers=0)
    summary = run(tmp_path, data=data)
    assert summary["val_accuracy"] is None
    assert summary["selected_epoch"] == 2
    assert summary["test_accuracy"] == summary["last_test_accuracy"]


def test_a_linear_probe_with_sgd_and_the_backbones_normalisation(tmp_path):
    data = DataConfig(name="fgvc", task="cub", root=str(write_fgvc(tmp_path)), normalisation="backbone", workers=0)
    summary = run(tmp_path, data=data, method="linear", optim={"optimizer": "sgd"})
    assert summary["trained_weights"] == 0
    assert summary["val_accuracy"] is not None


def test_a_finished_run_is_evaluated_with_the_preprocessing_that_its_adapter_file_states(tmp_path, monkeypatch):
    """Whatever this version would make of the configuration."""
    data = DataConfig(name="fgvc", task="cub", root=str(write_fgvc(tmp_path)), workers=0)
    run(tmp_path, data=data, test=False)
    stated = squashed(32, Statistics((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    folder = RunFolder(tmp_path / "run")
    model = open_run(folder).load_model()
    model.preprocessing = stated
    save_adapter(model, folder.adapter)
    seen = []

    def evaluate(model, loader, *_):
        seen.append(next(batches(loader)).images[0])
        return Scores(50.0, loss=1.0)

    monkeypatch.setattr("mosa_fast.training.evaluation.evaluate", evaluate)
    evaluate_run(open_run(folder), "test")
    expected = load_data(data, 32, 3407, stated).test[0][0]
    assert torch.equal(seen[0], expected)
    assert not torch.equal(seen[0], load_data(data, 32, 3407).test[0][0])


def test_a_run_on_blocks_without_a_seam_says_why_before_anything_is_downloaded(tmp_path):
    data = DataConfig(name="fgvc", task="cub", root=str(write_fgvc(tmp_path)), workers=0)
    with pytest.raises(ValueError, match=r"ParallelScalingBlock, which cannot be adapted: .* products and"):
        run(tmp_path, data=data, model=ModelConfig("vit_pwee_patch16_reg1_gap_256.sbb_in1k"))


def test_a_run_on_mixtures_learns_and_is_the_same_in_parts(tmp_path):
    root = str(write_fgvc(tmp_path))
    rows = []
    for accumulate in (1, 2):
        data = DataConfig(name="fgvc", task="cub", root=root, workers=0, mixup=0.2, cutmix=1.0, augment="randaugment")
        out = tmp_path / str(accumulate)
        run(out, data=data, optim={"accumulate": accumulate}, test=False)
        rows.append([json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()])
    assert rows[0][1]["train_loss"] < rows[0][0]["train_loss"]
    for one, other in zip(*rows, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
