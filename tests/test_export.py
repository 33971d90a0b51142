"""An exported run is read by programs that know nothing of this package, and says the same as the run."""

import json
import os
import subprocess
import sys

import pytest
import torch
from finished_runs import finished_run, short_run
from PIL import Image
from safetensors.torch import save_file

from mosa_fast.config import DataConfig, MoSAConfig
from mosa_fast.data import load_data
from mosa_fast.data.preprocessing import Preprocessing, cropped, squashed
from mosa_fast.data.transforms import evaluation_transform
from mosa_fast.export import main
from mosa_fast.formats import FORMATS, onnx_file, torch_export
from mosa_fast.formats.timm_folder import timm_preprocessing

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

# What a stranger does with an export: it opens it, asks for class names and preprocessing, and looks at images.
READERS = {
    "timm": """
import timm
model = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
settings = model.pretrained_cfg
classes = list(settings["label_names"])
size, mean, interpolation = settings["input_size"][-1], list(settings["mean"]), settings["interpolation"]
""",
    "torch-export": """
extra = {"classes.json": "", "preprocessing.json": ""}
model = torch.export.load(path, extra_files=extra).module()
classes, facts = json.loads(extra["classes.json"]), json.loads(extra["preprocessing.json"])
size, mean, interpolation = facts["image_size"], facts["mean"], facts["interpolation"]
""",
    "onnx": """
import onnxruntime
session = onnxruntime.InferenceSession(path)
model = lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
facts = session.get_modelmeta().custom_metadata_map
classes, facts = json.loads(facts["classes"]), json.loads(facts["preprocessing"])
size, mean, interpolation = facts["image_size"], facts["mean"], facts["interpolation"]
""",
}
QUESTIONS = """
with torch.no_grad():
    logits = torch.cat([model(part) for part in case["images"].split([1, 399, 400])])
accuracy = 100 * (logits.argmax(1) == case["labels"]).double().mean().item()
assert "mosa_fast" not in sys.modules
answers = {"accuracy": accuracy, "classes": classes, "size": size, "mean": mean, "interpolation": interpolation}
print(json.dumps(answers))
"""


def ask(form, path, case):
    code = "import json, sys, torch\nfrom safetensors.torch import load_file\ntorch.set_num_threads(1)\n"
    code += f"path, case = {str(path)!r}, load_file({str(case)!r})\n{READERS[form]}{QUESTIONS}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=path.parent)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def test_images(tmp_path_factory):
    images, labels = load_data(DataConfig(), 32, 3407).test.tensors
    path = tmp_path_factory.mktemp("case") / "test.safetensors"
    save_file({"images": images.contiguous(), "labels": labels}, path)
    return path


@pytest.mark.parametrize("form", FORMATS)
def test_the_reported_accuracy_is_that_of_the_export(form, digits_run, test_images, tmp_path, command):
    path = tmp_path / "new" / "export.pt2"
    code, out, _ = command(main, "--run", digits_run, "--format", form, "--out", path)
    assert code == 0
    assert float(out.split("largest difference from the run's logits: ")[1].split()[0]) < 1e-5
    assert os.listdir(path.parent) == ["export.pt2"]
    assert ask(form, path, test_images) == {
        "accuracy": digits_run.read_summary()["test_accuracy"],
        "classes": [str(digit) for digit in range(10)],
        "size": 32,
        "mean": [0.5] * 3,
        "interpolation": "bilinear",
    }


def test_a_run_in_half_precision_is_exported_in_float32(test_images, tmp_path, command):
    run = finished_run(tmp_path / "run", precision="bf16-mixed")
    code, out, _ = command(main, "--run", run, "--format", "timm", "--out", tmp_path / "export")
    assert code == 0
    assert float(out.split("largest difference from the run's logits: ")[1].split()[0]) < 1e-5
    accuracy = ask("timm", tmp_path / "export", test_images)["accuracy"]
    # bfloat16 decides otherwise on an image or two that are on the fence.
    assert accuracy == pytest.approx(run.read_summary()["test_accuracy"], abs=0.5)


def test_adapters_that_do_not_fold_are_merged_where_the_format_allows(tmp_path, command):
    run = short_run(tmp_path / "run", adapter=MoSAConfig(bottleneck=4, placement="pfeiffer"))
    code, _, error = command(main, "--run", run, "--format", "timm", "--out", tmp_path / "timm")
    assert code == 2
    assert "a pfeiffer adapter does not read what the MLP reads" in error
    assert error.count("\n") == 1
    for form in ("torch-export", "onnx"):
        code, out, _ = command(main, "--run", run, "--format", form, "--out", tmp_path / form)
        assert code == 0
        assert "merged, not folded: blocks.0 cannot be folded exactly: a pfeiffer adapter" in out
    assert sorted(os.listdir(tmp_path)) == ["onnx", "run", "torch-export"]
    with (tmp_path / "torch-export").open("rb") as file:
        program = torch.export.load(file)
    assert not [node for node in program.graph.nodes if "mosa_fast" in str(node.target)]


@pytest.mark.parametrize("method", ["linear", "lora"])
def test_other_methods_are_models_of_timm(method, tmp_path, command):
    run = short_run(tmp_path / "run", method=method)
    code, out, _ = command(main, "--run", run, "--format", "timm", "--out", tmp_path / "timm")
    assert code == 0
    assert "merged" not in out


def test_only_an_earlier_export_is_replaced(digits_run, tmp_path, command):
    folder, file, pipe = tmp_path / "folder", tmp_path / "file", tmp_path / "pipe"
    folder.mkdir()
    (folder / "config.json").write_text('{"architecture": "test_vit"}')
    file.write_text("mine")
    os.mkfifo(pipe)
    for form in FORMATS:
        for out in (folder, file, pipe):
            code, _, error = command(main, "--run", digits_run, "--format", form, "--out", out)
            assert code == 2
            assert f"{out} is there already and is no earlier export as {form}" in error
    assert file.read_text() == "mine"
    out = tmp_path / "export"
    assert command(main, "--run", digits_run, "--format", "timm", "--out", out)[0] == 0
    before = (out / "model.safetensors").stat().st_ino
    assert command(main, "--run", digits_run, "--format", "timm", "--out", out)[0] == 0
    assert (out / "model.safetensors").stat().st_ino != before
    assert command(main, "--run", digits_run, "--format", "onnx", "--out", out)[0] == 2
    (out / "README.md").write_text("mine")
    code, _, error = command(main, "--run", digits_run, "--format", "timm", "--out", out)
    assert code == 2
    assert "export is not replaced: what else is in it would be lost (README.md)" in error
    assert error.count("\n") == 1
    assert (out / "README.md").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["export", "file", "folder", "pipe"]


@pytest.mark.parametrize("value", [0.1, float("nan")])
def test_an_export_that_says_something_else_leaves_no_file(value, digits_run, tmp_path, command, monkeypatch):
    assert command(main, "--run", digits_run, "--format", "torch-export", "--out", tmp_path / "old")[0] == 0
    earlier = (tmp_path / "old").read_bytes()
    read = torch_export.read
    monkeypatch.setattr(torch_export, "read", lambda path: lambda images: read(path)(images) + value)
    for name in ("old", "new"):
        code, _, error = command(main, "--run", digits_run, "--format", "torch-export", "--out", tmp_path / name)
        assert code == 2
        assert "logits differ from the run's by" in error
        assert error.count("\n") == 1
    assert os.listdir(tmp_path) == ["old"]
    assert (tmp_path / "old").read_bytes() == earlier


def test_what_onnx_needs_is_said(digits_run, tmp_path, command, monkeypatch):
    options = ("--run", digits_run, "--format", "onnx", "--out", tmp_path / "export")
    with monkeypatch.context() as patch:
        patch.setattr(onnx_file, "MOST_BYTES", 1000)
        assert "too many for an ONNX file" in command(main, *options)[2]
    monkeypatch.setattr(onnx_file, "PACKAGES", ("onnx", "no_such_package"))
    code, _, error = command(main, *options)
    assert code == 2
    assert "the format onnx needs no_such_package: pip install 'mosa_fast[onnx]'" in error


@pytest.mark.parametrize(
    "preprocessing", [cropped(224), cropped(384), squashed(32), Preprocessing(100, 117, interpolation="bicubic")]
)
def test_timm_prepares_images_as_the_run_does(preprocessing):
    from timm.data import create_transform

    image = Image.effect_noise((301, 257), 64).convert("RGB")
    transform = create_transform(**timm_preprocessing(preprocessing))
    torch.testing.assert_close(transform(image), evaluation_transform(preprocessing)(image))
