import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

FAST = ["--optim.epochs=1", "--data.shots=1", "--optim.batch_size=10", "--eval_every=1"]


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
    for name in ("adapter.safetensors", "metrics.jsonl", "summary.json", "curves.png"):
        assert (tmp_path / "here" / name).is_file()
        assert f"here/{name}" in done.stdout


def test_a_folder_of_images_works(tmp_path):
    for part in ("train", "test"):
        for label in ("a", "b"):
            (tmp_path / "data" / part / label).mkdir(parents=True)
            for index in range(4):
                pixels = np.random.default_rng(index).integers(0, 255, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / part / label / f"{index}.png")
    arguments = ["--data.name", "folder", "--data.root", "data", "--data.image_size", "32", "--optim.epochs", "1"]
    arguments += ["--data.workers", "0"]
    done = run(*arguments, "--model.name", "vit_tiny_patch16_224", "--model.pretrained", "false", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optim.lr=-1"], "optim.lr must be at least 0"),
        (["--adapter.experts=0"], "experts must be 1 to 255"),
        (["--data.shots=500"], "data.shots must be 1 to 74"),
        (["--optim.leaning_rate=1"], "optim.leaning_rate"),
        (["--device=cuda:99"], "device 'cuda:99' is not available here"),
        (["--model.name=vit_nonsense"], "timm has no model 'vit_nonsense'"),
        (["--data.name=folder", "--data.root=nowhere"], "no folder nowhere/train"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, arguments, message):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
