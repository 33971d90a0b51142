import numpy as np
import pytest
import torch
from PIL import Image

from mosa_fast.config import DataConfig
from mosa_fast.data import load_data
from mosa_fast.data.loading import batches, drop_unreadable, evaluation_loader, train_loader
from mosa_fast.data.memory import cache_decoded
from mosa_fast.data.step_sampler import StepSampler


@pytest.fixture
def folder(tmp_path):
    """Two classes of 6 training and 3 test images, all different."""
    dice = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 3), ("test", 3)):
        for label in ("a", "b"):
            (tmp_path / part / label).mkdir(parents=True)
            for index in range(count):
                pixels = dice.integers(0, 255, (20 + index, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / label / f"{index}.png")
    return tmp_path


def load(folder):
    return load_data(DataConfig(name="folder", root=str(folder)), 16, 0)


def order(sampler):
    return [index for step in sampler for index in step.indices]


def test_the_order_is_a_function_of_seed_and_epoch():
    sampler = StepSampler(50, 8, seed=3)
    sampler.set_position(2, 0)
    whole = order(sampler)
    assert sorted(whole) == list(range(50))
    sampler.set_position(2, 4)
    assert order(sampler) == whole[32:]
    sampler.set_position(3, 0)
    assert order(sampler) != whole
    other = StepSampler(50, 8, seed=4)
    other.set_position(2, 0)
    assert order(other) != whole


def test_ranks_together_have_every_batch_of_one_process():
    whole = list(StepSampler(20, 9, seed=0))
    ranks = [list(StepSampler(20, 9, 0, rank, 3)) for rank in range(3)]
    for step in range(2):
        assert [index for rank in ranks for index in rank[step].indices] == whole[step].indices
    # of the last two images the first rank has none: it stands in with one that does not count
    one, other = whole[2].indices
    assert [rank[2].indices for rank in ranks] == [[one], [one], [other]]
    assert [(rank[2].first, rank[2].count, rank[2].total) for rank in ranks] == [(0, 0, 2), (0, 1, 2), (1, 1, 2)]
    assert (whole[0].first, whole[0].count, whole[0].total) == (0, 9, 9)


def test_every_image_is_evaluated_by_one_rank():
    dataset = load_data(DataConfig(shots=1), 32, 0).val
    loaders = [evaluation_loader(dataset, 32, rank=rank, world=3) for rank in range(3)]
    labels = [batch.labels for loader in loaders for batch in batches(loader)]
    assert sorted(torch.cat(labels).tolist()) == sorted(dataset.tensors[1].tolist())


def test_random_crops_depend_on_neither_workers_nor_resumption_but_on_the_epoch(folder):
    def epoch(workers, number, first=0):
        loader = train_loader(load(folder).train, 4, 7, workers=workers)
        loader.batch_sampler.set_position(number, first)
        torch.rand(3)  # whatever state torch is in
        return [batch.images for batch in batches(loader)]

    plain = epoch(0, 1)
    for other in (epoch(2, 1), [*epoch(0, 1)[:1], *epoch(2, 1, first=1)]):
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))
    assert not torch.equal(plain[0].sum((1, 2, 3)).sort()[0], epoch(0, 2)[0].sum((1, 2, 3)).sort()[0])


def test_a_cached_data_set_gives_the_same_images_without_its_files(folder):
    def epoch(dataset, workers=0):
        loader = train_loader(dataset, 4, 7, workers=workers)
        return [batch.images for batch in batches(loader)]

    plain = epoch(load(folder).train)
    splits = load(folder)
    cache_decoded(splits.train, splits.val)
    for path in (folder / "train").rglob("*.png"):
        path.unlink()
    for workers in (0, 2):
        assert all(torch.equal(a, b) for a, b in zip(plain, epoch(splits.train, workers), strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_is_fatal_and_named(folder, workers):
    (folder / "train" / "b" / "3.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"train/b/3\.png cannot be read \(UnidentifiedImageError") as caught:
        list(batches(train_loader(load(folder).train, 4, 0, workers=workers)))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"train/b/3\.png cannot be read"):
        cache_decoded(load(folder).train)


def test_or_left_out_and_named(folder, capsys):
    whole = (folder / "train" / "b" / "3.png").read_bytes()
    (folder / "train" / "b" / "3.png").write_bytes(whole[: len(whole) // 2])
    (folder / "test" / "a" / "0.png").write_bytes(b"")
    splits = drop_unreadable(load(folder))
    assert (len(splits.train), len(splits.val), len(splits.test)) == (11, 6, 5)
    assert splits.train_labels == [0] * 6 + [1] * 5
    assert [splits.train[index][1] for index in range(11)] == splits.train_labels
    named = capsys.readouterr().err
    assert "train/b/3.png cannot be read" in named
    assert "test/a/0.png cannot be read" in named
    before = [splits.train[index][0].shape for index in range(11)]
    cache_decoded(splits.train, splits.test)  # what was left out is not read again
    assert [splits.train[index][0].shape for index in range(11)] == before
    for path in (folder / "train" / "a").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="class 'a' has no training image that can be read"):
        drop_unreadable(load(folder))
