import json

import pytest
import torch
from layouts import write_fgvc

from mosa_fast.config import DataConfig
from mosa_fast.data import load_data
from mosa_fast.data.fgvc import MULTITASK_CLASSES, OFFSETS, SETS

pytestmark = pytest.mark.filterwarnings("ignore:.*classes, these split files name")


def load(root, task="cub", **options):
    return load_data(DataConfig(name="fgvc", task=task, root=str(root), **options), 16, 0)


def test_ids_become_labels_in_order_and_folders_become_names(tmp_path):
    splits = load(write_fgvc(tmp_path))
    assert splits.classes == ["Blue Bird", "Red Bird", "Owl"]
    assert splits.train_labels == [0] * 4 + [1] * 4 + [2] * 4
    assert splits.test.targets == [0, 0, 1, 1, 2, 2]
    assert splits.train.samples[4][0] == str(tmp_path / "images" / "007.Red_Bird" / "train_7_0.jpg")
    image, label = splits.val[2]
    assert image.shape == (3, 16, 16)
    assert image.dtype == torch.float32
    assert label == 2
    assert torch.equal(splits.val[2][0], image)  # evaluation does not augment


def test_a_class_missing_from_one_split_shifts_no_label(tmp_path):
    write_fgvc(tmp_path)
    rows = json.loads((tmp_path / "train.json").read_text())
    (tmp_path / "train_0.5.json").write_text(json.dumps({path: i for path, i in rows.items() if i != 7}))
    (tmp_path / "val.json").write_text(json.dumps({"020.Owl/val_20_0.jpg": 20}))
    splits = load(tmp_path, fraction=0.5)
    assert splits.train_labels == [0] * 4 + [2] * 4
    assert splits.val.targets == [2]
    assert splits.test.targets == [0, 0, 1, 1, 2, 2]
    (tmp_path / "test.json").write_text(json.dumps({"020.Owl/test_20_0.jpg": 20}))
    assert load(tmp_path, fraction=0.5).test.targets == [2]  # train.json still says that there is a class 7


@pytest.mark.parametrize(("task", "images"), [("nabirds", "images"), ("dogs", "Images"), ("flowers", ""), ("cars", "")])
def test_images_of_each_set_are_where_it_keeps_them(tmp_path, task, images):
    folders = ("n02085620-Silky_terrier", "0817", "n02085936-Pug") if task in ("dogs", "nabirds") else ("jpg",) * 3
    write_fgvc(tmp_path, images=images, folders=folders)
    (tmp_path / "classes.txt").write_text("817 Barn Owl (juvenile)\n2 Other\n")
    splits = load(tmp_path, task)
    if task in ("dogs", "nabirds"):
        assert splits.classes == ["Silky terrier", "Barn Owl (juvenile)", "Pug"]
    else:
        assert splits.classes == ["3", "7", "20"]  # one folder for all: the ids are all that is known
    assert splits.train[0][0].shape == (3, 16, 16)


def test_the_five_sets_as_one_task(tmp_path):
    assert OFFSETS == {"cars": 0, "cub": 196, "dogs": 396, "flowers": 516, "nabirds": 618}
    assert MULTITASK_CLASSES == 1173
    for index, task in enumerate(OFFSETS):
        write_fgvc(tmp_path / f"FGVC-{task}", images=SETS[task].images, first=100 * index)
    splits = load(tmp_path, "multitask")
    assert len(splits.classes) == 1173
    assert splits.classes[396:399] == ["dogs/Blue Bird", "dogs/Red Bird", "dogs/Owl"]
    assert sorted(set(splits.train_labels)) == [offset + i for offset in OFFSETS.values() for i in range(3)]
    path, label = splits.test.samples[-1]
    assert "FGVC-nabirds" in path
    assert label == 620


def test_wrong_files_are_named_with_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"no file .*train\.json: data\.root must hold .*mosa_fast\.data\.split"):
        load(tmp_path)
    write_fgvc(tmp_path)
    with pytest.raises(ValueError, match=r"no file .*train_0\.1\.json"):
        load(tmp_path, fraction=0.1)
    with pytest.raises(ValueError, match=r"data\.task must be one of cub, .*multitask, got 'birds'"):
        load(tmp_path, "birds")
    with pytest.raises(ValueError, match=r"data\.root is needed"):
        load_data(DataConfig(name="fgvc", task="cub"), 16, 0)
    with pytest.raises(ValueError, match=r"data\.mode is for vtab and gicd, not for fgvc"):
        load(tmp_path, mode="final")
    for text, message in (
        ("{", r"val\.json is not JSON"),
        ("[]", r"val\.json must be a mapping"),
        ('{"a.jpg": 1.5}', r"class id of a\.jpg must be a number or a name, got 1\.5"),
        ('{"a.jpg": "owl"}', "all numbers or all text"),
    ):
        (tmp_path / "val.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load(tmp_path)
    write_fgvc(tmp_path)
    (tmp_path / "images" / "020.Owl" / "test_20_1.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 of the 6 images that .*test\.json lists are missing.*test_20_1\.jpg"):
        load(tmp_path)


def test_too_many_classes_are_refused_and_too_few_are_warned_of(tmp_path, monkeypatch):
    write_fgvc(tmp_path)
    with pytest.warns(UserWarning, match="CUB_200_2011 has 200 classes, these split files name 3"):
        load(tmp_path)
    monkeypatch.setitem(SETS, "cub", type(SETS["cub"])("CUB_200_2011", 2, "images"))
    with pytest.raises(ValueError, match="CUB_200_2011 has 2 classes, but its split files name 3"):
        load(tmp_path)
