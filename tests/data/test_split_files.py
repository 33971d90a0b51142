import json
from collections import Counter

import pytest
from layouts import write_image

from mosa_fast.config import DataConfig
from mosa_fast.data import load_data
from mosa_fast.data.split import find_images, main, make_split_files, read_labels


def rows(counts, is_test=None):
    return [(f"{name}/{index}.jpg", name, is_test) for name, count in counts.items() for index in range(count)]


def read(folder):
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_parts_are_stratified_disjoint_and_seeded(tmp_path):
    images = rows({"a": 20, "b": 40})
    counts = make_split_files(images, tmp_path / "x", val=0.25, test=0.5, fractions=(0.2, 0.5), seed=1)
    assert counts == {"train.json": 23, "val.json": 7, "test.json": 30, "train_0.5.json": 12, "train_0.2.json": 5}
    parts = read(tmp_path / "x")
    assert Counter(parts["test"].values()) == {"a": 10, "b": 20}
    assert Counter(parts["val"].values()) == {"a": 2, "b": 5}  # a quarter of 10 and of 20
    assert Counter(parts["train_0.2"].values()) == {"a": 2, "b": 3}  # a fifth of 8 and of 15
    assert sorted([*parts["train"], *parts["val"], *parts["test"]]) == sorted(path for path, _, _ in images)
    assert set(parts["train_0.2"]) < set(parts["train_0.5"]) < set(parts["train"])
    make_split_files(images, tmp_path / "again", val=0.25, test=0.5, fractions=(0.2, 0.5), seed=1)
    assert read(tmp_path / "again") == parts
    make_split_files(images, tmp_path / "other", val=0.25, test=0.5, fractions=(0.2, 0.5), seed=2)
    assert read(tmp_path / "other") != parts


def test_bad_requests_are_named(tmp_path):
    with pytest.raises(ValueError, match="class b has 2 images, too few for a test, a validation and a training image"):
        make_split_files(rows({"a": 5, "b": 2}), tmp_path)
    with pytest.raises(ValueError, match="fractions must be between 0 and 1, got 3"):
        make_split_files(rows({"a": 5}), tmp_path, fractions=(3,))
    with pytest.raises(ValueError, match=r"a/0\.jpg is listed more than once"):
        make_split_files([*rows({"a": 5}, is_test=False), ("a/0.jpg", "a", True)], tmp_path)
    assert not list(tmp_path.iterdir())
    make_split_files(rows({"a": 5}), tmp_path)
    with pytest.raises(ValueError, match=r"json exists; move it away"):
        make_split_files(rows({"a": 5}), tmp_path)


def test_the_official_test_images_of_cub_and_nabirds_stay_test_images(tmp_path):
    """CUB keeps its lists beside images/, with the ids of its own."""
    names = [f"{label:03d}.Bird/{index}.jpg" for label in (1, 2) for index in range(6)]
    numbered = list(enumerate(names, 1))
    for file, value in (
        ("images", lambda i, name: name),
        ("image_class_labels", lambda i, name: int(name[:3])),
        ("train_test_split", lambda i, name: i % 2),  # 1: training
    ):
        (tmp_path / f"{file}.txt").write_text("".join(f"{i} {value(i, name)}\n" for i, name in numbered))
    for number, name in numbered:
        write_image(tmp_path / "images" / name, number)
    make_split_files(find_images(tmp_path / "images"), tmp_path)
    parts = read(tmp_path)
    assert set(parts["test"]) == {name for number, name in numbered if number % 2 == 0}
    assert Counter(parts["train"].values()) == {1: 2, 2: 2}
    assert Counter(parts["val"].values()) == {1: 1, 2: 1}
    for text, message in (
        ("1 1\n", r"image_class_labels\.txt has no number for image 2, which .*images\.txt lists"),
        ("1 1\n2\n", r"image_class_labels\.txt, line 2: expected an image and what it has, got '2'"),
    ):
        (tmp_path / "image_class_labels.txt").write_text(text)
        with pytest.raises(ValueError, match=message):
            find_images(tmp_path / "images")


def test_a_list_of_labels_serves_sets_with_one_folder(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("jpg/image 1.jpg 5 train\njpg/image 2.jpg 5 test\n\n")
    assert read_labels(path) == [("jpg/image 1.jpg", 5, False), ("jpg/image 2.jpg", 5, True)]
    path.write_text("a.jpg cat\n")
    assert read_labels(path) == [("a.jpg", "cat", None)]
    for text, message in (
        ("a.jpg\n", "line 1: expected '<path> <class id>"),
        ("a.jpg 1 test\nb.jpg 1\n", "on every line, or on none"),
        ("", "is empty"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_labels(path)


@pytest.mark.filterwarnings("ignore:.*classes, these split files name")
def test_the_command_makes_a_set_that_loads(tmp_path, command):
    for label, name in enumerate(("Silky", "Pug")):
        for index in range(10):
            write_image(tmp_path / "Images" / name / f"{index}.jpg", 100 * label + index)

    code, out, _ = command(main, tmp_path / "Images", "--out", tmp_path, "--fractions", "0.5")
    assert code == 0
    assert "train_0.5.json: 8 images" in out
    assert "test.json: 4 images" in out
    splits = load_data(DataConfig(name="fgvc", task="dogs", root=str(tmp_path), fraction=0.5), 16, 0)
    assert splits.classes == ["Pug", "Silky"]
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [8, 2, 4]
    for arguments, message in (
        ([tmp_path / "nowhere"], "no folder"),
        ([tmp_path / "Images" / "Pug"], "must hold a folder of images for each class"),
        ([tmp_path / "Images", "--val", "2"], "--val must be between 0 and 1"),
        ([tmp_path / "Images", "--seed", "-1"], "--seed must be at least 0, got -1"),
    ):
        code, _, error = command(main, *arguments)
        assert code == 2
        assert message in error
