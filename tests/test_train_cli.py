import errno
import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from mosa_fast import evaluate, predict
from mosa_fast.config import DataConfig, TrainConfig
from mosa_fast.data.transforms import evaluation_transform
from mosa_fast.train import main
from mosa_fast.training.run_data import preprocessing_of_run
from mosa_fast.training.step import TrainStep

FAST = ["--optim.epochs=1", "--data.shots=1", "--optim.batch_size=10", "--eval_every=1"]
TINY = ["--model.name=test_vit", "--model.pretrained=false", "--data.image_size=32", "--tensorboard=false", *FAST]


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "mosa_fast.train", *arguments], capture_output=True, text=True, cwd=cwd
    )


def test_without_arguments_it_trains_on_the_embedded_default(tmp_path):
    """The default run, shortened by overrides (the whole one is part of the continuous integration)."""
    done = run(*FAST, "--out=here", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for line in ("validation accuracy", "test accuracy", "trained weights", "time"):
        assert line in done.stdout
    # What it was about to do.
    for line in (
        r"train +10 images of 10 classes\n",
        r"val +200 images of 10 classes\n",
        r"test +800 images of 10 classes\n",
        r"backbone +embedded, pretrained, 32 pixels\n",
        r"trained weights +40,416 \+ head 1,930; frozen \d[\d,]+\n",
        r"steps +1: 1 epoch of 1, batches of 10 images\n",
        r"device +\w+\n",
        r"precision +fp32\n",
    ):
        assert re.search(line, done.stdout.split("validation accuracy")[0]), line
    for name in ("adapter.safetensors", "metrics.jsonl", "summary.json", "curves.png", "confusion.png"):
        assert (tmp_path / "here" / name).is_file()
        assert f"here/{name}" in done.stdout
    # Without a terminal: lines with what a bar would show.
    assert "step 1/1  epoch 1  loss" in done.stderr
    assert "images/s" in done.stderr
    assert "ETA" in done.stderr


def make_folder(root):
    """Two classes, named, one dark and one light."""
    for part in ("train", "test"):
        for label, level in (("dark", 0), ("light", 200)):
            (root / part / label).mkdir(parents=True)
            for index in range(4):
                pixels = np.random.default_rng(index).integers(level, level + 50, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / label / f"{index}.png")


def test_a_folder_of_images_is_trained_on_evaluated_again_and_predicted_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "data")
    arguments = ["--data.name=folder", "--data.root=data", "--data.workers=0", "--optim.epochs=5", "--out=here"]
    options = ["--optim.batch_size=4", "--optim.lr=0.01", "--optim.warmup_epochs=0", "--precision=bf16-mixed"]
    main([*TINY[:4], *arguments, *options])
    summary = json.loads((tmp_path / "here" / "summary.json").read_text())
    capsys.readouterr()

    evaluate.main(["--run=here"])
    assert f"test accuracy {summary['test_accuracy']:.4f} % of 8 images" in capsys.readouterr().out
    evaluate.main(["--run=here", "--split=val"])
    assert f"val accuracy {summary['val_accuracy']:.4f} %" in capsys.readouterr().out

    images = [f"data/test/{label}/{index}.png" for label in ("dark", "light") for index in range(4)]
    predict.main(["--run=here", "--top=2", *images])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == images
    right = sum(line.split()[1] == image.split("/")[2] for line, image in zip(lines, images, strict=True))
    assert 100 * right / 8 == summary["test_accuracy"]
    assert all(sum(float(word[:-1]) for word in line.split() if word.endswith("%")) > 99.8 for line in lines)
    # The resolved configuration is a recipe.
    assert yaml.safe_load((tmp_path / "here" / "config.yaml").read_text()) == summary["config"]
    main(["--config=here/config.yaml", "--optim.epochs=1", "--out=again", "--test=false"])


def test_prediction_of_digits_sees_what_training_saw(tmp_path):
    """A digit saved as an image and read back is the data set's tensor, up to the eight bits of a pixel."""
    from mosa_fast.data import load_data

    expected = load_data(DataConfig(shots=1), 32, 3407).test.tensors[0][0]
    small = torch.nn.functional.interpolate(expected[None], size=(8, 8), mode="bilinear")[0]
    transform = evaluation_transform(preprocessing_of_run(TrainConfig(data=DataConfig(image_size=32))))
    image = Image.fromarray(((small + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
    assert transform(image).shape == (3, 32, 32)
    assert transform(image).mean().item() == pytest.approx(expected.mean().item(), abs=0.05)


def fails(capsys, *arguments, command=main):
    """The one line that a mistake leaves."""
    with pytest.raises(SystemExit) as left:
        command(list(arguments))
    assert left.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optim.lr=-1"], "optim.lr must be at least 0"),
        (["--optim.lr=.nan"], "optim.lr must be"),
        (["--adapter.experts=0"], "experts must be 1 to 255"),
        (["--data.shots=500"], "data.shots must be 1 to 74"),
        (["--optim.leaning_rate=1"], "unrecognized arguments: --optim.leaning_rate=1"),
        (["--optim.bach_size=1"], "did you mean optim.batch_size?"),
        (["--batch_size=1"], "did you mean optim.batch_size?"),
        (["--precision=bf16"], "bf16-mixed"),
        (["--precision=bf16-true", "--method=full"], "bf16-true needs a frozen backbone"),
        (["--cuda_graphs=true", "--device=cpu"], "cuda_graphs needs one GPU"),
        (["--device=cuda:99"], "device 'cuda:99' is not available here"),
        (["--data.shots=None"], "data.shots must be a whole number or null, got None"),
        (["--loss.views=3"], "loss.views must be one of 1, 2 or null, got 3"),
        (["--model.name=vit_nonsense"], "timm has no model 'vit_nonsense'"),
        (["--model.name=test_vit.no"], "timm has no weights 'test_vit.no'; it has test_vit.r160_in1k"),
        (["--model.name=test_vit.no", "--method=full"], "timm has no weights 'test_vit.no'; it has test_vit.r160_in1k"),
        (["--model.name=vit_bas_patch16_224"], "timm has no model 'vit_bas_patch16_224'; it has vit_base_patch16_224,"),
        (["--data.name=folder", "--data.root=nowhere"], "no folder nowhere/train"),
        (["--config=nowhere.yaml"], "nowhere.yaml"),
        (["--config=fgvc/cubs"], "; did you mean fgvc/cub?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, *arguments)


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("optim:\n  leaning_rate: 1\n", ""),
        ("optim:\n  epoch: 1\n", "did you mean optim.epochs?"),
        ("optm:\n  lr: 1\n", "did you mean optim.lr?"),
        ("precison: fp32\n", "did you mean precision?"),
        ("optim: [1\n", "here.yaml is not YAML"),
    ],
)
def test_a_key_that_a_recipe_cannot_have_is_named_with_the_nearest(tmp_path, monkeypatch, capsys, text, nearest):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.yaml").write_text(text)
    assert nearest in fails(capsys, "--config=here.yaml")


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = [*TINY, "--optim.epochs=3", "--out=here"]
    fsync, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(list((tmp_path / "here" / "checkpoint").glob("*.pt"))) and len(calls) > 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == "error: No space left on device"
    monkeypatch.setattr(os, "fsync", fsync)
    assert not list((tmp_path / "here").rglob("*.tmp"))
    main([*arguments, "--resume"])
    assert "resumed here at step" in capsys.readouterr().out


def test_a_disk_that_is_full_while_tensors_are_written_is_one_line(tmp_path, monkeypatch, capsys):
    from safetensors import SafetensorError

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("mosa_fast.tensor_file.save_file", full)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main([*TINY, "--out=here"])
    assert left.value.code == 2
    assert "No space left on device" in capsys.readouterr().err.strip().splitlines()[-1]


def test_training_that_diverges_stops_with_a_message(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mosa_fast.training.step.mosa_loss", lambda logits, *_: logits.sum() * float("nan"))
    with pytest.raises(SystemExit) as left:
        main([*TINY, "--optim.batch_size=2", "--max_bad_steps=3", "--out=here", "--log_every=1"])
    assert left.value.code == 2
    assert "the gradients of 3 steps in a row were not finite" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_gives_the_shells_exit_code_and_resume_goes_on(tmp_path, monkeypatch, capsys, number, code):
    monkeypatch.chdir(tmp_path)
    arguments = [*TINY, "--optim.batch_size=4", "--out=here"]
    original = TrainStep.advance

    def advance(step):
        original(step)
        os.kill(os.getpid(), number)

    with monkeypatch.context() as patched:
        patched.setattr(TrainStep, "advance", advance)
        with pytest.raises(SystemExit) as left:
            main(arguments)
    assert left.value.code == code
    assert "step 1 of 3 is saved in here; go on with --resume" in capsys.readouterr().err
    assert "holds an unfinished run" in fails(capsys, *arguments)
    assert "is not finished" in fails(capsys, "--run=here", command=evaluate.main)
    main([*arguments, "--resume"])
    assert "resumed here at step 1 of 3" in capsys.readouterr().out


def test_evaluation_refuses_what_does_not_fit_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "is not the folder of a run" in fails(capsys, "--run=nowhere", command=evaluate.main)
    main([*TINY, "--out=here"])
    capsys.readouterr()
    weights = tmp_path / "here" / "adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "adapter.safetensors cannot be read" in fails(capsys, "--run=here", command=evaluate.main)
    main([*TINY, "--out=other", "--adapter.bottleneck=8"])
    capsys.readouterr()
    weights.write_bytes((tmp_path / "other" / "adapter.safetensors").read_bytes())
    assert "was saved with" in fails(capsys, "--run=here", command=evaluate.main)


def test_help_gives_every_option_its_type_default_and_meaning(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    options = [part for part in shown.split("options:")[1].split(" --")[1:] if "." in part.split()[0]]
    described = [part for part in options if "CONFIG" not in part.split()[1]]
    assert len(described) > 30
    for part in described:
        assert "(type: " in part, part
        assert "None" not in part, part  # null is what one types
        assert "default: " in part, part
        assert len(part.split("(type:")[0].split()) > 3, part


def test_prediction_transforms_as_the_data_set_of_the_run_does():
    """VTAB-1k squashes images and crops nothing; normalisation may be the backbone's own."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 64, 3), dtype=np.uint8))
    data = DataConfig(name="vtab", image_size=32, normalisation="backbone")
    out = evaluation_transform(preprocessing_of_run(TrainConfig(data=data)))(image)
    squashed = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    # The embedded backbone's statistics are 0.5 and 0.5.
    assert np.abs(out.permute(1, 2, 0).numpy() - (squashed * 2 - 1)).max() < 0.05
