"""Data sets of torchvision, of the Hub (as local folders) and in webdataset's shards."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest
import torch
from layouts import write_cifar, write_food, write_image
from PIL import Image

from mosa_fast.config import DataConfig
from mosa_fast.data import class_count, load_data
from mosa_fast.data.check import check_splits
from mosa_fast.data.image_file import read_image
from mosa_fast.data.memory import cache_decoded


def load(task, root, **options):
    return load_data(DataConfig(name="timm", task=task, root=str(root), **options), 16, 0)


def pixels(splits):
    """Every image of every part, as the evaluation's transform gives it."""
    found = {}
    for name, part in splits.parts():
        part.transform = splits.test.transform
        found[name] = torch.stack([image for image, _ in part])
    return found


def test_torchvisions_sets_are_what_the_family_of_their_own_reads(tmp_path, monkeypatch):
    write_food(tmp_path)
    write_cifar(tmp_path, monkeypatch)
    for name, task in (("food101", "torch/food101"), ("cifar100", "torch/CIFAR_100")):
        own = load_data(DataConfig(name="gicd", task=name, root=str(tmp_path)), 16, 0)
        ours = load(task, tmp_path)
        assert ours.classes == own.classes
        assert ours.train_labels == own.train_labels
        expected, got = pixels(own), pixels(ours)
        assert all(torch.equal(got[part], expected[part]) for part in ("train", "val", "test"))


def test_a_set_of_torchvision_without_parts_is_cut_in_three(tmp_path):
    for label in range(3):
        for index in range(10):
            write_image(tmp_path / "eurosat" / "2750" / f"class{label}" / f"{index}.png", 10 * label + index)
    splits, other = (
        load_data(DataConfig(name="timm", task="torch/eurosat", root=str(tmp_path)), 16, seed) for seed in (0, 1)
    )
    assert [len(part) for _, part in splits.parts()] == [21, 3, 6]
    everything = torch.cat(list(pixels(splits).values())).flatten(1)
    assert len(torch.unique(everything, dim=0)) == 30  # nothing is in two parts
    assert splits.classes == ["class0", "class1", "class2"]
    assert splits.test.samples == other.test.samples  # the test images are the same in every run
    assert splits.train.samples != other.train.samples


def test_wrong_sets_of_torchvision_are_explained(tmp_path, monkeypatch):
    write_food(tmp_path)
    write_cifar(tmp_path, monkeypatch)
    for task, message, options in (
        ("torch/food10", r"torchvision\.datasets has no food10; it has food101", {}),
        ("food101", r"data\.task must be torch/NAME .*got 'food101'", {}),
        ("torch/dtd", r"torch/dtd cannot be read \(Dataset not found.*--data\.download true fetches it", {}),
        ("torch/food101", r"Unknown value 'huge' for argument split", {"train_split": "huge"}),
        ("torch/cifar100", r"torch/cifar100 has no part 'huge'", {"val_split": "huge"}),
    ):
        with pytest.raises(ValueError, match=message):
            load(task, tmp_path, **options)
    with pytest.raises(ValueError, match=r"data\.root is needed"):
        load_data(DataConfig(name="timm", task="torch/food101"), 16, 0)


def hub_folder(root, parts):
    """A folder as the Hub has it: `PART/CLASS/*.png`, the label a ClassLabel."""
    for number, (part, label, index) in enumerate(
        (part, label, index) for part, count in parts.items() for label in ("cat", "dog") for index in range(count)
    ):
        write_image(root / part / label / f"{index}.png", number)
    return root


def test_sets_of_the_hub(tmp_path):
    pytest.importorskip("datasets")
    folder = hub_folder(tmp_path / "pets", {"train": 6, "validation": 2, "test": 3})
    splits = load(f"hfds/{folder}", tmp_path / "cache")
    assert splits.classes == ["cat", "dog"]
    assert [len(part) for _, part in splits.parts()] == [12, 4, 6]
    assert splits.train_labels == [0] * 6 + [1] * 6
    assert torch.equal(splits.test[4][0], splits.test.transform(read_image(folder / "test" / "dog" / "1.png")))
    assert class_count(DataConfig(name="timm", task=f"hfds/{folder}", root=str(tmp_path / "cache"))) == 2
    pickle.loads(pickle.dumps(splits.train.loader))  # as workers get it where processes are spawned
    with pytest.raises(ValueError, match=r"(?i)unknown split"):
        load(f"hfds/{folder}", tmp_path / "cache", test_split="holdout")
    with pytest.raises(ValueError, match=r"hfds/.*nowhere cannot be read"):
        load(f"hfds/{tmp_path}/nowhere", tmp_path / "cache")


def test_without_a_test_part_validation_images_test_and_others_select(tmp_path):
    pytest.importorskip("datasets")
    folder = hub_folder(tmp_path / "pets", {"train": 10, "validation": 3})
    task = f"hfds/{folder}"
    splits = load(task, tmp_path / "cache", val_fraction=0.2)
    assert [len(part) for _, part in splits.parts()] == [16, 4, 6]
    named = load(task, tmp_path / "cache", val_split="validation")
    assert [len(part) for _, part in named.parts()] == [16, 6, 4]  # a fifth of the training images is the test


def write_shards(root, parts, *, info=True):
    """webdataset's shards of two: pairs of N.png and N.cls."""
    root.mkdir(exist_ok=True)
    content, number = {}, 0
    for part, count in parts.items():
        names = []
        for first in range(0, count, 2):
            names.append(f"{part}-{first // 2:04d}.tar")
            with tarfile.open(root / names[-1], "w") as archive:
                for _ in range(first, min(first + 2, count)):
                    pixels = np.random.default_rng(number).integers(0, 255, (20, 30, 3), dtype=np.uint8)
                    stream = io.BytesIO()
                    Image.fromarray(pixels).save(stream, "png")
                    for suffix, data in (("png", stream.getvalue()), ("cls", str(number % 3).encode())):
                        member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                        member.size = len(data)
                        archive.addfile(member, io.BytesIO(data))
                    number += 1
        lengths = [min(2, count - 2 * index) for index in range(len(names))]
        content[part] = {"name": part, "num_samples": count, "filenames": names, "shard_lengths": lengths}
    if info:
        (root / "info.json").write_text(json.dumps({"splits": content}))
    return root


def test_webdatasets_shards_are_read_whole_and_trained_on_in_any_order(tmp_path):
    pytest.importorskip("webdataset")
    root = write_shards(tmp_path / "shards", {"train": 13, "test": 5})
    splits = load("wds/", root, val_fraction=0.3)
    assert [len(part) for _, part in splits.parts()] == [9, 4, 5]
    assert sorted(splits.train_labels + splits.val.targets) == sorted(index % 3 for index in range(13))
    assert splits.classes == ["0", "1", "2"]
    expected = np.random.default_rng(14).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    assert torch.equal(splits.test[1][0], splits.test.transform(Image.fromarray(expected)))
    with pytest.raises(ValueError, match=r"not found in info"):
        load("wds/", root, val_split="dev")
    with pytest.raises(ValueError, match=r"data\.root is needed: the folder of the shards"):
        load("wds/", root / "nowhere")


def test_every_process_has_all_of_a_webdataset(tmp_path, monkeypatch):
    pytest.importorskip("webdataset")
    root = write_shards(tmp_path / "shards", {"train": 6, "test": 4})
    alone = load("wds/", root)
    for name, value in (("is_initialized", True), ("get_rank", 1), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    assert load("wds/", root).train_labels == alone.train_labels


def test_a_damaged_shard_is_not_passed_over(tmp_path):
    pytest.importorskip("webdataset")
    root = write_shards(tmp_path / "shards", {"train": 6, "test": 4})
    with tarfile.open(root / "test-0001.tar", "w"):
        pass
    with pytest.raises(ValueError, match=r"wds/: part test has 2 images that can be read, not 4"):
        load("wds/", root)


def test_images_that_are_in_no_file_are_cached_and_checked_as_others_are(tmp_path):
    pytest.importorskip("datasets")
    folder = hub_folder(tmp_path / "pets", {"train": 6, "test": 2})
    plain, cached = (load(f"hfds/{folder}", tmp_path / "cache", val_fraction=0.3) for _ in range(2))
    cache_decoded(cached.val)
    assert all(torch.equal(plain.val[index][0], cached.val[index][0]) for index in range(len(plain.val)))
    assert check_splits(plain)[1] == []
    write_image(folder / "test" / "cat" / "again.png", 0)  # the first training image
    problems = check_splits(load(f"hfds/{folder}", tmp_path / "other cache", val_fraction=0.3))[1]
    assert any("share an image" in problem for problem in problems)
