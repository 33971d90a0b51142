"""Whole runs on families of image files, with the embedded backbone."""

import pytest
from layouts import write_fgvc, write_vtab

from mosa_fast.config import DataConfig, ModelConfig, MoSAConfig, OptimConfig, TrainConfig
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


def test_a_run_on_blocks_without_a_seam_says_why_before_anything_is_downloaded(tmp_path):
    data = DataConfig(name="fgvc", task="cub", root=str(write_fgvc(tmp_path)), workers=0)
    with pytest.raises(ValueError, match=r"ParallelScalingBlock, which cannot be adapted: .* products and"):
        run(tmp_path, data=data, model=ModelConfig("vit_pwee_patch16_reg1_gap_256.sbb_in1k"))
