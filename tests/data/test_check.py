import json
import shutil

import pytest
from layouts import write_aircraft, write_cifar, write_fgvc, write_image, write_vtab

from mosa_fast.config import DataConfig
from mosa_fast.data import check as module
from mosa_fast.data import load_data
from mosa_fast.data.check import check_splits, main

pytestmark = pytest.mark.filterwarnings("ignore:.*classes, these split files name")


def check(root, name="fgvc", task="cub", **options):
    config = DataConfig(name=name, task=task, root=str(root), **options)
    report, problems = check_splits(load_data(config, 16, 0, strict=False))
    return "\n".join(report), problems


def test_a_sound_set_is_counted(tmp_path):
    report, problems = check(write_fgvc(tmp_path))
    assert problems == []
    assert "train: 12 images of 3 classes (of 3); per class 4 (Owl) to 4 (Blue Bird), median 4, ratio 1.0" in report
    assert [line.split()[-3:] for line in report.splitlines() if line.startswith("Owl")] == [["4", "1", "2"]]


def test_files_that_cannot_be_read_are_found(tmp_path):
    write_fgvc(tmp_path)
    folder = tmp_path / "images" / "020.Owl"
    (folder / "train_20_0.jpg").write_bytes(b"not an image")
    whole = (folder / "val_20_0.jpg").read_bytes()
    (folder / "val_20_0.jpg").write_bytes(whole[: len(whole) // 2])  # the header is fine, the picture ends early
    (folder / "test_20_1.jpg").unlink()
    _, problems = check(tmp_path)
    assert len(problems) == 3
    for problem, start, words in zip(
        problems,
        ("train:", "val:", "test:"),
        ("decoded: cannot identify image file", "cannot be decoded", "cannot be read"),
        strict=True,
    ):
        assert problem.startswith(start)
        assert words in problem
        assert "<" not in problem


def test_overlaps_are_found_by_path_and_by_bytes(tmp_path):
    write_fgvc(tmp_path)
    rows = json.loads((tmp_path / "test.json").read_text())
    rows["003.Blue_Bird/train_3_0.jpg"] = 3
    (tmp_path / "test.json").write_text(json.dumps(rows))
    folder = tmp_path / "images" / "007.Red_Bird"
    shutil.copy(folder / "train_7_1.jpg", folder / "val_7_0.jpg")
    _, problems = check(tmp_path)
    assert len(problems) == 2
    assert problems[0].startswith("train and val share an image")
    assert problems[1].startswith("train and test share")
    assert problems[1].endswith("train_3_0.jpg")


def test_one_image_with_two_labels_is_found(tmp_path):
    write_fgvc(tmp_path)
    images = tmp_path / "images"
    shutil.copy(images / "003.Blue_Bird" / "train_3_0.jpg", images / "020.Owl" / "train_20_0.jpg")
    _, problems = check(tmp_path)
    assert len(problems) == 1
    assert problems[0].endswith("are the same image with labels 0 and 2")


def test_labels_out_of_range_and_absent_classes_are_told(tmp_path):
    write_vtab(tmp_path)
    write_image(tmp_path / "kitti" / "images" / "train" / "more.jpg", 99)
    with (tmp_path / "kitti" / "train800.txt").open("a") as handle:
        handle.write("images/train/more.jpg 4\n")
    (tmp_path / "kitti" / "val200.txt").write_text("images/val/000000.jpg 0\n")
    report, problems = check(tmp_path, "vtab", "kitti")
    assert "val: no image of 1, 2, 3" in report
    assert len(problems) == 1
    assert problems[0].endswith("more.jpg has label 4, not one of 0 to 3")


def test_many_problems_of_a_kind_are_shortened(tmp_path):
    write_fgvc(tmp_path)
    for path in (tmp_path / "images").rglob("train*.jpg"):
        path.write_bytes(path.name.encode())
    _, problems = check(tmp_path)
    assert len(problems) == 11
    assert problems[-1] == "train: and 2 more like these"


def test_sets_in_memory_and_without_validation_images_are_checked_too(tmp_path, monkeypatch):
    assert check_splits(load_data(DataConfig(shots=2), 32, 0))[1] == []
    assert check(write_cifar(tmp_path, monkeypatch), "gicd", "cifar100")[1] == []
    report, problems = check(write_aircraft(tmp_path), "gicd", "aircraft", mode="final")
    assert problems == []
    assert "val" not in report.replace("trainval", "")


def test_the_command_can_be_stopped_while_it_reads(tmp_path, command, monkeypatch):
    def stopped(splits):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "check_splits", stopped)
    assert command(main)[::2] == (130, "stopped before there was anything to save\n")


def test_the_command_exits_with_what_it_found(tmp_path, command):
    def run(root):
        return command(main, "--config", "fgvc/cub", f"--data.root={root}")

    write_fgvc(tmp_path)
    code, out, _ = run(tmp_path)
    assert code == 0
    assert "nothing wrong was found" in out
    (tmp_path / "images" / "020.Owl" / "train_20_0.jpg").write_bytes(b"not an image")
    code, out, _ = run(tmp_path)
    assert code == 1
    assert "train_20_0.jpg cannot be decoded" in out
    code, _, error = run("nowhere")
    assert code == 2
    assert "no file nowhere/train.json" in error
