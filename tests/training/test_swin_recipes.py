"""The five recipes of Swin train and evaluate: on a small model of the family, and pictures of one colour a class."""

import json

import pytest
import timm
from layouts import SIZE, write_fgvc
from PIL import Image

from mosa_fast import evaluate
from mosa_fast.data.fgvc import SETS
from mosa_fast.nn.mixture import adapters
from mosa_fast.run_options import parse
from mosa_fast.training import loop, losses
from mosa_fast.training.loop import train

pytestmark = pytest.mark.filterwarnings("ignore:.*classes, these split files name")
# 14 x 14 tokens, then 7 x 7: windows of seven, shifted in the first stage.
SMALL = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
COLOURS = ("red", "green", "blue")


@pytest.fixture
def made(monkeypatch):
    """The models that runs make: small ones in place of the one that a recipe names."""
    create, build, models = timm.create_model, loop.build_model, []

    def small(name, **arguments):
        assert name == "swin_base_patch4_window7_224.ms_in22k"
        return create(name, **SMALL | arguments)

    monkeypatch.setattr(timm, "create_model", small)
    monkeypatch.setattr(loop, "build_model", lambda *given: models.append(build(*given)) or models[-1])
    return models


def write_pictures(root, task):
    write_fgvc(root, images=SETS[task].images, folders=("001.A", "002.B", "003.C"))
    for part in ("train", "val", "test"):
        for name, label in json.loads((root / f"{part}.json").read_text()).items():
            colour = COLOURS[(3, 7, 20).index(label)]
            Image.new("RGB", SIZE, colour).save(root / SETS[task].images / name)
    return root


@pytest.mark.parametrize("task", SETS)
def test_a_recipe_of_swin_trains_and_evaluates(task, tmp_path, monkeypatch, made, command):
    terms = []
    deep = losses.deep_distance
    monkeypatch.setattr(losses, "deep_distance", lambda outputs: terms.append(len(outputs)) or deep(outputs))
    words = {"data.root": write_pictures(tmp_path / "data", task), "data.image_size": 56, "data.workers": 0}
    words |= {"model.pretrained": "false", "device": "cpu", "tensorboard": "false", "out": tmp_path / "run"}
    words |= {"optim.epochs": 8, "optim.warmup_epochs": 0, "optim.batch_size": 6, "optim.lr": 5e-3}
    options = [f"--{name}={value}" for name, value in words.items()]
    config = parse(["--config", f"swin/{task}", *options])[0]
    summary = train(config, progress=False)

    assert (config.model.drop_path, config.loss.deep_reg) == (0.5, task == "cars")
    assert set(terms) == ({4} if task == "cars" else set())  # all of its four blocks
    layers = list(adapters(made[0]))
    assert [adapter.down.weight.shape[1] for adapter in layers] == [16, 16, 32, 32]
    assert all(adapter.up.weight.any() for adapter in layers)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["train_loss"] < 0.7 * rows[0]["train_loss"]
    assert summary["test_accuracy"] > 50  # of three classes
    code, out, error = command(evaluate.main, "--run", tmp_path / "run")
    assert code == 0, error
    assert f"{summary['test_accuracy']:.2f}" in out
