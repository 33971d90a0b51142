"""Tiny data sets in the layouts that the families read, as real image files."""

import gzip
import hashlib
import json
import pickle

import numpy as np
import torch
from PIL import Image

SIZE = (40, 30)


def write_image(path, seed):
    """A random picture; one seed, one picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_fgvc(root, images="images", ids=(3, 7, 20), folders=("003.Blue_Bird", "007.Red_Bird", "020.Owl"), first=0):
    """Split files of VPT: 4 training, 1 validation and 2 test images of each class."""
    number = first
    for part, count in (("train", 4), ("val", 1), ("test", 2)):
        rows = {}
        for class_id, folder in zip(ids, folders, strict=True):
            for index in range(count):
                name = f"{folder}/{part}_{class_id}_{index}.jpg" if folder else f"{part}_{class_id}_{index}.jpg"
                write_image(root / images / name, number)
                rows[name] = class_id
                number += 1
        (root / f"{part}.json").write_text(json.dumps(rows))
    return root


def write_vtab(root, task="kitti", classes=4):
    """The folders of NOAH: two images of each class in train800, one in val200 and test."""
    lists = {"train800": [], "val200": [], "test": []}
    number = 0
    for name, folder, count in (("train800", "train", 2), ("val200", "val", 1), ("test", "test", 1)):
        for index in range(count * classes):
            path = f"images/{folder}/{index:06d}.jpg"
            write_image(root / task / path, number)
            lists[name].append(f"{path} {index % classes}")
            number += 1
    lists["train800val200"] = lists["train800"] + lists["val200"]
    for name, lines in lists.items():
        (root / task / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root


def write_aircraft(root):
    """torchvision's FGVC-Aircraft: 3 of its 100 variants have images."""
    data = root / "fgvc-aircraft-2013b" / "data"
    data.mkdir(parents=True)
    variants = [f"Variant {index:02d}/A" for index in range(100)]
    (data / "variants.txt").write_text("\n".join(variants) + "\n")
    number, lines = 0, {"train": [], "val": [], "test": []}
    for part, count in (("train", 2), ("val", 1), ("test", 1)):
        for variant in variants[:3]:
            for _ in range(count):
                write_image(data / "images" / f"{number:07d}.jpg", number)
                lines[part].append(f"{number:07d} {variant}")
                number += 1
    lines["trainval"] = lines["train"] + lines["val"]
    for part, rows in lines.items():
        (data / f"images_variant_{part}.txt").write_text("\n".join(rows) + "\n")
    return root


def write_food(root):
    """torchvision's Food-101: 2 of its classes, 10 training images each."""
    number = 0
    for part, count in (("train", 10), ("test", 2)):
        rows = {}
        for name in ("apple_pie", "waffles"):
            rows[name] = [f"{name}/{number + index}" for index in range(count)]
            for path in rows[name]:
                write_image(root / "food-101" / "images" / f"{path}.jpg", number)
                number += 1
        (root / "food-101" / "meta").mkdir(exist_ok=True, parents=True)
        (root / "food-101" / "meta" / f"{part}.json").write_text(json.dumps(rows))
    return root


def write_cifar(root, monkeypatch):
    """torchvision's CIFAR-100 in its pickles, whose digests are put in place of the real ones."""
    from torchvision.datasets import CIFAR100

    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    digests = {}
    content = {"meta": {"fine_label_names": [f"class{index}" for index in range(100)]}}
    for name, count in (("train", 10), ("test", 1)):
        labels = [index % 5 for index in range(5 * count)]
        content[name] = {"data": rng.integers(0, 255, (len(labels), 3072), dtype=np.uint8), "fine_labels": labels}
    for name, value in content.items():
        (folder / name).write_bytes(pickle.dumps(value))
        digests[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR100, "train_list", [["train", digests["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", digests["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": digests["meta"]})
    return root


def write_fashion_mnist(root):
    """The four gzipped idx files, with 12 training and 2 test images of each class; the pixels by the files' names."""
    root.mkdir(parents=True, exist_ok=True)
    written = {}
    for seed, (name, count) in enumerate((("train", 120), ("t10k", 20))):
        pixels = np.random.default_rng(seed).integers(0, 255, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
            (root / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
        written[name] = torch.from_numpy(pixels)
    return written
