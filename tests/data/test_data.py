import random

import numpy as np
import pytest
import torch
from PIL import Image

from mosa_fast.backbones.create import channel_statistics
from mosa_fast.config import DataConfig, ModelConfig
from mosa_fast.data import load_data
from mosa_fast.data.preprocessing import IMAGENET, Statistics, cropped
from mosa_fast.data.stratify import stratified_split
from mosa_fast.data.transforms import evaluation_transform, train_transform


def keys(dataset):
    return {image.numpy().tobytes() for image, _ in dataset}


def test_stratified_split_takes_its_part_of_every_class():
    labels = [0] * 10 + [1] * 20 + [2] * 3
    first, second = stratified_split(labels, 0.1, seed=0)
    assert np.bincount(np.array(labels)[first]).tolist() == [1, 2, 1]
    assert sorted(first + second) == list(range(33))
    assert stratified_split(labels, 0.1, seed=0) == (first, second)
    assert np.bincount(np.array(labels)[stratified_split(labels, 2, 0)[0]]).tolist() == [2, 2, 2]
    with pytest.raises(ValueError, match="class 2 has 3 images, 4 are asked for"):
        stratified_split(labels, 4, 0)


def test_digits_are_balanced_disjoint_and_their_test_images_never_change():
    first, second = (load_data(DataConfig(shots=10), 32, seed) for seed in (1, 2))
    assert torch.bincount(torch.tensor(first.train_labels)).tolist() == [10] * 10
    assert [len(part) for part in (first.train, first.val, first.test)] == [100, 200, 800]
    parts = [keys(part) for part in (first.train, first.val, first.test)]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    assert keys(second.test) == parts[2]
    assert keys(second.train) != parts[0]
    image, _ = first.train[0]
    assert image.shape == (3, 32, 32)
    assert image.min() >= -1
    assert image.max() <= 1
    assert len(load_data(DataConfig(shots=None), 32, 1).train) == 797
    with pytest.raises(ValueError, match=r"data.shots must be 1 to 74 for digits, got 75"):
        load_data(DataConfig(shots=75), 32, 1)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 10), ("test", 2)):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 255, (40, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{index}.png")
    return tmp_path


def test_a_folder_without_val_cuts_it_from_train(folder):
    splits = load_data(DataConfig(name="folder", root=str(folder), val_fraction=0.2), 16, 0)
    assert splits.classes == ["cat", "dog"]
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [16, 4, 4]
    assert splits.train_labels == [splits.train[i][1] for i in range(16)]
    assert not {path for path, _ in splits.train.samples} & {path for path, _ in splits.val.samples}
    first, again = (splits.val[0][0] for _ in range(2))
    assert torch.equal(first, again)  # evaluation does not augment
    assert first.shape == (3, 16, 16)


def test_a_folder_with_val_uses_it(folder):
    (folder / "test").rename(folder / "val")
    with pytest.raises(ValueError, match="no folder .*test"):
        load_data(DataConfig(name="folder", root=str(folder)), 16, 0)


def test_bad_folders_are_named(folder):
    with pytest.raises(ValueError, match=r"data\.root is needed"):
        load_data(DataConfig(name="folder"), 16, 0)
    (folder / "train" / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        load_data(DataConfig(name="folder", root=str(folder)), 16, 0)
    (folder / "train" / "empty").rmdir()
    (folder / "test" / "dog").rename(folder / "test" / "wolf")
    with pytest.raises(ValueError, match=r"classes of test are not those of train; they differ in dog, wolf"):
        load_data(DataConfig(name="folder", root=str(folder)), 16, 0)
    with pytest.raises(ValueError, match=r"data\.name must be one of digits, fashion_mnist, folder"):
        load_data(DataConfig(name="imagenet"), 16, 0)


@pytest.mark.parametrize(("size", "resized"), [(224, 256), (384, 438), (448, 512)])
def test_transform_gives_the_size_and_imagenet_statistics(size, resized):
    grey = Image.new("RGB", (500, 600), (124, 116, 104))  # the ImageNet mean
    for transform in (train_transform(cropped(size), DataConfig()), evaluation_transform(cropped(size))):
        out = transform(grey)
        assert out.shape == (3, size, size)
        assert out.abs().max() < 0.02
        assert transform.transforms[1].size == [resized]


def test_images_can_be_normalised_as_the_backbone_wants(folder):
    config = DataConfig(name="folder", root=str(folder), normalisation="backbone")
    assert channel_statistics(ModelConfig(name="vit_base_patch16_224.orig_in21k")) == ((0.5,) * 3, (0.5,) * 3)
    own = Statistics((0.5,) * 3, (0.5,) * 3)
    image = load_data(config, 16, 0, cropped(16, own)).test[0][0]
    mean, std = (torch.tensor(values)[:, None, None] for values in IMAGENET)
    assert torch.allclose(load_data(config, 16, 0).test[0][0] * std + mean, image * 0.5 + 0.5, atol=1e-6)
    with pytest.raises(ValueError, match=r"data\.normalisation is for folder, .* and timm, not for digits"):
        load_data(DataConfig(normalisation="backbone"), 32, 0)


@pytest.mark.parametrize(
    "options",
    [
        {"crop_scale": 0.3},
        {"random_erasing": 1.0},
        *({"augment": name} for name in ("randaugment", "autoaugment", "trivial", "augmix")),
    ],
)
def test_augmentations_change_training_images_only_and_draw_from_torch_alone(folder, options):
    config = DataConfig(name="folder", root=str(folder), **options)
    splits, plain = load_data(config, 16, 0), load_data(DataConfig(name="folder", root=str(folder)), 16, 0)
    assert torch.equal(splits.test[0][0], plain.test[0][0])

    def images(splits, seed):
        torch.manual_seed(seed)
        return torch.stack([splits.train[index][0] for index in range(8)])

    np.random.seed(0)
    random.seed(0)
    first = images(splits, 1)
    assert torch.equal(first, images(splits, 1))
    assert not torch.equal(first, images(splits, 2))
    assert not torch.equal(first, images(plain, 1))
    with pytest.raises(ValueError, match=r"is for folder, fgvc, gicd and timm, not for vtab"):
        load_data(DataConfig(name="vtab", task="dtd", root=str(folder), **options), 16, 0)
