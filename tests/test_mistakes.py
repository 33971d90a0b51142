"""What people get wrong: each is one clear line and exit code 2, and nothing hangs."""

import json
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_vit import make_tiny_vit

from mosa_fast import MoSAConfig, SparseAdapter, SparseLoRA, adapt, evaluate, export, info, predict, sweep
from mosa_fast.adapters.adapter_file import DIGEST, content_digest, read_adapter
from mosa_fast.config import DataConfig, OptimConfig, TrainConfig
from mosa_fast.data import load_data, split
from mosa_fast.ops import backends
from mosa_fast.train import main
from mosa_fast.training import checks

TINY = ["--model.name=test_vit", "--model.pretrained=false", "--data.image_size=32", "--tensorboard=false"]
FAST = [*TINY, "--optim.epochs=1", "--data.shots=1", "--optim.batch_size=10", "--out=run"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fails(capsys, *arguments, command=main):
    """The one line that a mistake leaves."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        command(list(arguments))
    lines = capsys.readouterr().err.strip().splitlines()
    assert (left.value.code, len(lines)) == (2, 1), lines
    return lines[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: null\n", "recipe.yaml: optim must be a mapping of options, got None"),
        ("optim:\n", "recipe.yaml: optim must be a mapping of options, got None"),
        ("optim: 3\n", "recipe.yaml: optim must be a mapping of options, got 3"),
        ("optim: [1]\n", "recipe.yaml: optim must be a mapping of options, got [1]"),
        ("adapter: null\n", "recipe.yaml: adapter must be a mapping of options, got None"),
        ("optim:\n  lr: 0.1\n  epochs: 2\n  lr: 0.2\n", "recipe.yaml gives lr twice, in lines 2 and 4"),
        ("seed: 1\nmethod: mosa\nseed: 2\n", "recipe.yaml gives seed twice, in lines 1 and 3"),
        ("optim: &a {lr: *a}\n", "a mapping is inside itself"),
        ("", "recipe.yaml is empty"),
        ("# nothing\n", "recipe.yaml is empty"),
        ("- 1\n", "recipe.yaml must be a mapping of options, it is a list"),
        ("optim: {lrr: 1}\n", "recipe.yaml: there is no option optim.lrr; did you mean optim.lr?"),
        ("lr: 1\n", "recipe.yaml: there is no option lr; did you mean optim.lr?"),
        ("optim: {lr: {a: 1}}\n", "recipe.yaml: there is no option optim.lr.a"),
        ("seed: null\n", "seed must be a whole number, got None"),
        ("adapter: {experts: 256}\n", "error: adapter.experts must be 1 to 255, got 256"),
        ("model: {name: 3}\n", "model.name must be text, got 3"),
    ],
)
def test_recipes(here, capsys, text, message):
    (here / "recipe.yaml").write_text(text)
    assert message in fails(capsys, "--config=recipe.yaml", *FAST)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--model.drop_path=5", "model.drop_path must be in [0, 1), got 5.0"),
        ("--model.drop_path=-1", "model.drop_path must be in [0, 1), got -1.0"),
        ("--model.drop_path=1.0", "model.drop_path must be in [0, 1), got 1.0"),
        ("--model.name=resnet18", "the model is a ResNet"),
        ("--adapter.bottleneck=100000000", "error: adapter.bottleneck must be at most 65,536, got 100000000"),
        ("--out=/dev/null/x", "Not a directory: /dev/null/x"),
        ("--out=", "out must not be empty"),
        ("--loss.add_weight=-1", "loss.add_weight must be at least 0, got -1.0"),
        ("--loss.reg_weight=-1", "loss.reg_weight must be at least 0, got -1.0"),
        ("--adapter.seed=-1", "error: adapter.seed must be at least 0, got -1"),
        (
            "--seed=99999999999999999999",
            "error: seed must be at most 9,223,372,036,854,775,807, got 99999999999999999999",
        ),
        ("--adapter.scale=nan", "adapter.scale must be a number or one of auto, trainable, got nan"),
        ("--adapter.routing=a\nb", "adapter.routing must be one of random, fixed, got a b"),
        ("--loss.views=-1", "loss.views must be one of 1, 2 or null, got -1"),
        ("--optim.epochs=1000000000000000000", "optim.epochs must be at most 1,000,000"),
        ("--optim.warmup_epochs=1.5", "optim.warmup_epochs 1.5 is longer than the run of 1 epochs"),
        ("--data.image_size=33", "test_vit cannot take images of 33 pixels: Input height (33) should be divisible"),
        ("--data.image_size=16000", "out of memory: smaller images"),
        ("--resume", "--resume goes on with the run that is there, --overwrite replaces it"),
    ],
)
def test_options(capsys, argument, message):
    assert message in fails(capsys, *FAST, "--overwrite", argument)


def test_an_unknown_option_is_only_likened_to_what_is_like_it(capsys):
    assert fails(capsys, "--bogus=1") == "error: unrecognized arguments: --bogus=1"


def test_the_largest_seed_is_one(here):
    main([*FAST, f"--seed={2**63 - 1}", f"--adapter.seed={2**63 - 1}", "--model.backbone_dropout=0.1"])


def test_warm_up_is_a_tenth_unless_it_is_given():
    assert (OptimConfig().warmup, OptimConfig(epochs=12).warmup, OptimConfig(warmup_epochs=3).warmup) == (10, 1.2, 3)
    TrainConfig(optim=OptimConfig(epochs=2, warmup_epochs=2))
    with pytest.raises(ValueError, match="longer than the run of 2 epochs"):
        TrainConfig(optim=OptimConfig(epochs=2, warmup_epochs=2.5))


def images_in(folder, count=2):
    folder.mkdir(parents=True)
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")


FOLDER = [*FAST[:-1], "--data.shots=50", "--data.name=folder", "--data.root=data", "--data.workers=0", "--out=run"]


@pytest.fixture
def data(here):
    for part in ("train", "val", "test"):
        for label in ("cat", "dog"):
            images_in(here / "data" / part / label)
    return here / "data"


@pytest.mark.timeout(60)
def test_a_pipe_that_is_called_an_image_is_named(data, capsys):
    os.mkfifo(data / "train" / "cat" / "pipe.jpg")
    assert "data/train/cat/pipe.jpg cannot be read (ValueError: not a regular file)" in fails(capsys, *FOLDER)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("target", [".", "..", "../.."])
def test_a_link_in_a_circle_is_not_followed(data, target):
    config = DataConfig(name="folder", root="data")
    before = load_data(config, 16, 0).train.samples
    (data / "train" / "cat" / "again").symlink_to(target)
    assert load_data(config, 16, 0).train.samples == before


def test_a_link_that_leads_elsewhere_is_followed(data):
    images_in(data / "elsewhere")
    (data / "train" / "cat" / "more").symlink_to(data / "elsewhere")
    (data / "train" / "dog" / "gone.png").symlink_to("nothing")
    main([*FOLDER, "--loader.corrupt=skip"])
    assert json.loads((data.parent / "run" / "summary.json").read_text())["steps"] == 1


def test_one_class_is_nothing_to_tell_apart(here, capsys):
    for part in ("train", "val", "test"):
        images_in(here / "data" / part / "cat")
    assert "there must be two classes at least, there is cat" in fails(capsys, *FOLDER)


def test_a_class_whose_name_is_not_utf8_is_named(data, capsys):
    for part in ("train", "val", "test"):
        os.rename(data / part / "dog", os.fsencode(data / part) + b"/d\xff")
    assert r"the name of class 'd\udcff' is not UTF-8" in fails(capsys, *FOLDER)


def test_a_runs_own_file_with_a_wrong_value_is_named_as_its_recipe_would_be(here, capsys):
    main(FAST)
    config = here / "run" / "config.yaml"
    config.write_text(config.read_text().replace("experts: 4", "experts: 0"))
    assert fails(capsys, "--run=run", command=evaluate.main) == "error: adapter.experts must be 1 to 255, got 0"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [", "run/config.yaml is not YAML: "),
        (b"", "run/config.yaml is empty"),
        (b"\xff", "run/config.yaml cannot be read: 'utf-8'"),
        (b"- 1\n", "run/config.yaml must be a mapping of options"),
        (b"bogus: 1\n", "there is no option bogus"),
    ],
)
def test_a_runs_own_file_that_cannot_be_read_is_named(here, capsys, content, message):
    (here / "run").mkdir()
    (here / "run" / "classes.json").write_text("[]")
    (here / "run" / "config.yaml").write_bytes(content)
    assert message in fails(capsys, "--run=run", command=evaluate.main)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"config": 3}'])
def test_a_summary_that_cannot_be_read_is_named(here, capsys, content):
    (here / "run").mkdir()
    (here / "run" / "summary.json").write_text(content)
    assert "run/summary.json cannot be read: " in fails(capsys, *FAST, "--resume")


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        (evaluate, ["--run=a", "--splitt=val"], "unrecognized arguments: --splitt=val; did you mean split?"),
        (evaluate, [], "the following arguments are required: --run"),
        (predict, ["--run=a"], "the following arguments are required: INPUT"),
        (export, ["--run=a", "--out=b", "--format=c"], "argument --format: invalid choice: 'c'"),
        (info, ["--config"], "argument --config: expected one argument"),
        (sweep, [], "the following arguments are required: --configs"),
        (sweep, ["--configs=digits", "--optim.lrr=1"], "--optim.lrr=1; did you mean optim.lr?"),
        (sweep, ["--configs=digits", "--optim.lr=-1"], "optim.lr must be at least 0, got -1.0"),
        (sweep, ["--configs=digits", "--grid", "optim.lrr=1"], "did you mean optim.lr?"),
        (sweep, ["--configs=digits", "--seeds=x"], "--seeds must be a number of seeds"),
        (sweep, ["--configs=digits", "--out=/dev/null/x"], "Not a directory: /dev/null/x/"),
        (split, [], "the following arguments are required: images"),
        (split, ["nowhere"], "no folder nowhere"),
        (split, ["data", "--fractions=a"], "--fractions must look like 0.1,0.5, got 'a'"),
        (split, ["data", "--labels=labels.txt"], "labels.txt is not text in UTF-8: "),
        (split, ["data", "--labels=good.txt", "--out=/dev/null/x"], "Not a directory: /dev/null/x"),
    ],
)
def test_words_of_the_other_commands(here, data, capsys, monkeypatch, command, words, message):
    (here / "labels.txt").write_bytes(b"a.png \xff\n")
    (here / "good.txt").write_text("".join(f"{i}.png {i % 2}\n" for i in range(40)))
    monkeypatch.setattr("sys.argv", ["program", *words])
    assert message in fails(capsys, command=lambda _: command.main())


def test_images_that_are_not_those_of_the_adapter_file_are_refused(here, capsys):
    """The digits are made in memory, and not by what the file says of images."""
    main(FAST)
    path = here / "run" / "adapter.safetensors"
    tensors, metadata = read_adapter(path)
    texts = replace(metadata, preprocessing=replace(metadata.preprocessing, mean=(0.4,) * 3)).to_texts()
    save_file(tensors, path, texts | {DIGEST: content_digest(tensors, texts)})
    line = fails(capsys, "--run=run", command=evaluate.main)
    assert "data.name digits has images of Preprocessing(" in line
    assert "cannot give images of Preprocessing(image_size=32, resize=None, mean=(0.4, 0.4, 0.4)" in line


def test_broken_class_names_of_a_run_are_named(here, capsys):
    main(FAST)
    for content in (b'["0", ', b'{"0": 1}', b"[1, 2]", b'["\xff"]', b""):
        (here / "run" / "classes.json").write_bytes(content)
        assert "run/classes.json cannot be read" in fails(capsys, "--run=run", command=evaluate.main)


@pytest.mark.parametrize("package", ["torchvision", "timm"])
def test_a_broken_package_is_named_by_training_and_by_info(monkeypatch, capsys, package):
    class Broken:
        def find_spec(self, name, *_):
            if name == package:
                raise RuntimeError(f"operator {package}::nms does not exist")

    monkeypatch.delitem(sys.modules, package)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    line = fails(capsys, *FAST)
    assert f"{package} cannot be used here (RuntimeError: operator {package}::nms does not exist)" in line
    info.main([])
    row = next(row for row in capsys.readouterr().out.splitlines() if row.startswith(package))
    assert "cannot be used: RuntimeError" in row


def test_a_backend_that_cannot_serve_is_refused_before_anything_is_replaced(here, monkeypatch, capsys):
    main(FAST)
    monkeypatch.setattr(backends, "_selected", None)  # whatever another test has chosen for the whole process
    monkeypatch.setenv("MOSA_FAST_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if backends.unavailable_reason("triton") is None:
        pytest.skip("it can serve here")
    assert "backend 'triton' cannot serve: no GPU is visible" in fails(capsys, *FAST, "--overwrite")
    assert (here / "run" / "summary.json").is_file()
    assert "backend 'triton' cannot serve" in fails(capsys, "--run=run", command=evaluate.main)
    main([*FAST, "--method=linear", "--out=linear"])  # it has no operator to serve


def test_what_will_be_slow_is_said(monkeypatch):
    cpu = torch.device("cpu")
    many = TrainConfig(data=DataConfig(name="folder", workers=10_000))
    assert "data.workers 10000: this machine has " in checks.notes(many, cpu)[0]
    assert checks.notes(TrainConfig(data=DataConfig(name="folder", workers=1)), cpu) == []
    for has in (True, False):
        monkeypatch.setattr(checks, "cpu_has_bf16", lambda has=has: has)
        lines = checks.notes(TrainConfig(precision="bf16-mixed"), cpu)
        assert [line for line in lines if "no bfloat16 arithmetic" in line] == lines
        assert len(lines) == (not has)
    assert checks.notes(TrainConfig(precision="bf16-mixed"), torch.device("cuda")) == []


def test_a_layer_of_another_width_blames_its_input():
    with pytest.raises(ValueError, match=r"x must be \[N, \.\.\., 8\], got float32 \[2, 3, 9\]"):
        SparseAdapter(8, 4)(torch.zeros(2, 3, 9))
    with pytest.raises(ValueError, match=r"x must be \[N, \.\.\., 8\], got float32 \[2, 3, 9\]"):
        SparseLoRA(8, columns=((0, 4),), rank=2)(torch.zeros(2, 3, 9), torch.zeros(2, 3, 12))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SparseAdapter(0), "dim must be at least 1, got 0"),
        (lambda: SparseAdapter(8.0), "dim must be a whole number, got 8.0"),
        (lambda: SparseLoRA(0, [(0, 4)]), "in_features must be at least 1, got 0"),
        (lambda: SparseLoRA(8, []), r"columns must be ascending ranges, none of them empty, got \[\]"),
        (lambda: SparseLoRA(8, [(4, 2)]), r"columns must be ascending ranges, none of them empty, got \[\(4, 2\)\]"),
        (lambda: SparseLoRA(8, [(0, 4), (2, 6)]), "columns must be ascending ranges"),
        (lambda: SparseAdapter(8, 4)(torch.zeros(2, 3, 8), seed=1.5), r"seed must be an int or int64 .* got 1\.5"),
        (lambda: adapt(make_tiny_vit(), {"experts": 4}), "config must be a MoSAConfig, got {'experts': 4}"),
    ],
)
def test_arguments_that_do_not_fit_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("training", [True, False])
def test_there_is_a_view_at_least(training):
    model = adapt(make_tiny_vit(), MoSAConfig(bottleneck=2)).train(training)
    for views in (0, -1):
        with pytest.raises(ValueError, match=f"views must be at least 1, got {views}"):
            model(torch.zeros(1, 3, 8, 8), views=views)
