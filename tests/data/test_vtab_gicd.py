import numpy as np
import pytest
import torch
from layouts import write_aircraft, write_cifar, write_food, write_vtab
from PIL import Image

from mosa_fast.config import DataConfig
from mosa_fast.data import load_data
from mosa_fast.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from mosa_fast.data.vtab import GROUPS, TASKS


def load(name, root, task, **options):
    return load_data(DataConfig(name=name, task=task, root=str(root), **options), 16, 0)


def test_vtab_has_its_nineteen_tasks():
    assert {group: len(tasks) for group, tasks in GROUPS.items()} == {"Natural": 7, "Specialized": 4, "Structured": 8}
    assert len(TASKS) == 19


def test_vtab_tunes_on_800_and_200_and_finally_trains_on_all(tmp_path):
    write_vtab(tmp_path)
    tune, final = (load("vtab", tmp_path, "kitti", mode=mode) for mode in ("tune", "final"))
    assert [len(part) for part in (tune.train, tune.val, tune.test)] == [8, 4, 4]
    assert tune.classes == ["0", "1", "2", "3"]
    assert final.val is None  # nothing is left to select with
    assert sorted(final.train.samples) == sorted(tune.train.samples + tune.val.samples)
    assert final.test.samples == tune.test.samples


def test_vtab_resizes_to_a_square_without_augmentation(tmp_path):
    splits = load("vtab", write_vtab(tmp_path), "kitti")
    path, _ = splits.train.samples[0]
    resized = Image.open(path).convert("RGB").resize((16, 16), Image.Resampling.BILINEAR)
    expected = (np.asarray(resized, np.float32) / 255 - IMAGENET_MEAN) / IMAGENET_STD
    for _ in range(2):
        np.testing.assert_allclose(splits.train[0][0].permute(1, 2, 0), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("images/train/000000.jpg 4", r"train800\.txt, line 9: label 4 is not in 0 to 3"),
        ("images/train/000000.jpg -1", "label -1 is not in 0 to 3"),
        ("images/train/000000.jpg", r"line 9: expected 'images/<split>/000000\.jpg <label>'"),
        ("images/train/000000.jpg cat", "line 9: expected"),
        ("images/train/9.jpg 1", r"1 of the 9 images that .*train800\.txt lists are missing"),
    ],
)
def test_wrong_lines_of_vtab_are_named(tmp_path, line, message):
    write_vtab(tmp_path)
    with (tmp_path / "kitti" / "train800.txt").open("a") as handle:
        handle.write(line + "\n")
    with pytest.raises(ValueError, match=message):
        load("vtab", tmp_path, "kitti")


def test_missing_lists_of_vtab_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no file .*dtd/train800\.txt: data\.root must hold dtd/train800\.txt"):
        load("vtab", tmp_path, "dtd")
    write_vtab(tmp_path)
    (tmp_path / "kitti" / "test.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"test\.txt is empty"):
        load("vtab", tmp_path, "kitti")
    with pytest.raises(ValueError, match=r"data\.task must be one of cifar, .*got None"):
        load("vtab", tmp_path, None)


def test_aircraft_tunes_on_its_val_and_finally_trains_on_trainval(tmp_path):
    write_aircraft(tmp_path)
    tune, final = (load("gicd", tmp_path, "aircraft", mode=mode) for mode in ("tune", "final"))
    assert [len(part) for part in (tune.train, tune.val, tune.test)] == [6, 3, 3]
    assert len(tune.classes) == 100
    assert tune.classes[1] == "Variant 01/A"
    assert tune.train_labels == [0, 0, 1, 1, 2, 2]
    assert final.val is None
    assert sorted(final.train.samples) == sorted(tune.train.samples + tune.val.samples)
    first, second = (tune.train[0][0] for _ in range(2))
    assert not torch.equal(first, second)  # training augments, unlike the published code's
    (tmp_path / "fgvc-aircraft-2013b" / "data" / "images" / "0000003.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 of the 6 images .*0000003\.jpg"):
        load("gicd", tmp_path, "aircraft")


def test_food_and_cifar_hold_a_stratified_tenth_out(tmp_path, monkeypatch):
    write_food(tmp_path)
    write_cifar(tmp_path, monkeypatch)
    for task, per_class, classes in (("food101", 10, 2), ("cifar100", 10, 5)):
        splits = load("gicd", tmp_path, task)
        counts = torch.bincount(torch.tensor(splits.train_labels)).tolist()
        assert counts == [per_class - 1] * classes
        assert torch.bincount(torch.tensor(splits.val.targets)).tolist() == [1] * classes
        assert splits.train[0][0].shape == (3, 16, 16)
        final = load("gicd", tmp_path, task, mode="final")
        assert final.val is None
        assert len(final.train) == per_class * classes
    food = load("gicd", tmp_path, "food101")
    assert food.classes == ["apple_pie", "waffles"]
    assert not {path for path, _ in food.train.samples} & {path for path, _ in food.val.samples}
    cifar = load("gicd", tmp_path, "cifar100")
    assert cifar.classes[4] == "class4"
    before = cifar.train.data.copy()
    for index in range(len(cifar.train)):
        cifar.train[index]
    assert np.array_equal(cifar.train.data, before)
    rows = {row.tobytes() for row in cifar.train.data}
    assert not rows & {row.tobytes() for row in cifar.val.data}


@pytest.mark.parametrize("task", ["cifar100", "aircraft", "food101"])
def test_missing_gicd_files_are_one_line_that_says_how_to_get_them(tmp_path, task):
    with pytest.raises(ValueError, match=rf"{task} cannot be read from .*--data\.download true fetches it"):
        load("gicd", tmp_path, task)


def test_options_of_other_families_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data\.fraction is for fgvc, not for vtab"):
        load("vtab", tmp_path, "kitti", fraction=0.1)
    with pytest.raises(ValueError, match=r"data\.download is for fashion_mnist, gicd and timm, not for folder"):
        load_data(DataConfig(name="folder", root=str(tmp_path), download=True), 16, 0)
