import gzip

import numpy as np
import pytest
import torch
from layouts import write_fashion_mnist
from torchvision.datasets import FashionMNIST

from mosa_fast.config import DataConfig
from mosa_fast.data import class_count, load_data
from mosa_fast.data import fashion_mnist as module


@pytest.fixture(autouse=True)
def _few_validation_images(monkeypatch):
    monkeypatch.setattr(module, "VAL_PER_CLASS", 3)


def load(root, seed=1, size=32, **options):
    config = DataConfig(name="fashion_mnist", root=str(root), **{"shots": 4} | options)
    return load_data(config, size, seed)


def pictures(dataset):
    return {image.numpy().tobytes() for image, _ in dataset}


def test_training_and_validation_images_are_drawn_by_the_seed_and_test_images_never_change(tmp_path):
    write_fashion_mnist(tmp_path)
    first, second = load(tmp_path), load(tmp_path, seed=2)
    assert torch.bincount(torch.tensor(first.train_labels)).tolist() == [4] * 10
    assert [len(part) for part in (first.train, first.val, first.test)] == [40, 30, 20]
    assert pictures(first.test) == pictures(second.test)
    assert pictures(first.train) != pictures(second.train)
    assert pictures(first.val) != pictures(second.val)
    assert not pictures(first.train) & pictures(first.val)
    assert len(load(tmp_path, shots=None).train) == 120 - 30
    assert class_count(DataConfig(name="fashion_mnist")) == len(first.classes) == 10


def test_images_are_enlarged_and_scaled(tmp_path):
    pixels = write_fashion_mnist(tmp_path)["t10k"]
    image, label = load(tmp_path).test[3]
    assert (image.shape, image.dtype, label) == ((3, 32, 32), torch.float32, 3)
    assert torch.equal(image[0], image[2])
    as_they_are, _ = load(tmp_path, size=28).test[3]
    assert torch.allclose(as_they_are[0], pixels[3] / 255 * 2 - 1)


def test_files_may_be_gzipped_or_not_and_lie_where_torchvision_puts_them(tmp_path):
    write_fashion_mnist(tmp_path / "a")
    folder = tmp_path / "b" / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for path in (tmp_path / "a").iterdir():
        (folder / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    assert pictures(load(tmp_path / "a").train) == pictures(load(tmp_path / "b").train)
    assert FashionMNIST(tmp_path / "b")._check_exists()  # this is torchvision's layout


def test_idx_files_are_read(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    header = bytes([0, 0, 8, 3]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    (tmp_path / "array.gz").write_bytes(gzip.compress(header + array.tobytes()))
    assert torch.equal(module.read_idx(tmp_path / "array.gz"), torch.from_numpy(array))


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no train-images-idx3-ubyte.* --data\.download true fetches it"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"data\.root is needed"):
        load_data(DataConfig(name="fashion_mnist"), 32, 1)
    write_fashion_mnist(tmp_path)
    with pytest.raises(ValueError, match=r"class 0 has 9 images, 10 are asked for"):
        load(tmp_path, shots=10)
    with pytest.raises(ValueError, match=r"data\.shots must be 1 to 5800"):
        load(tmp_path, shots=5801)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz is not a whole idx file"):
        load(tmp_path)


def test_a_download_that_fails_is_one_line(tmp_path, monkeypatch):
    def fail(root, download):
        raise RuntimeError("Error downloading it")

    monkeypatch.setattr(module, "FashionMNIST", fail)
    with pytest.raises(ValueError, match="Fashion-MNIST cannot be downloaded to .*: Error downloading it"):
        load(tmp_path, download=True)
