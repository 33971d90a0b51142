import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_image_file import write_folder

from mosa_fast.config import DataConfig, LossConfig
from mosa_fast.data import load_data
from mosa_fast.data.loading import batches, train_loader
from mosa_fast.data.mixing import Mixing
from mosa_fast.training.losses import mosa_loss

ZEROS, ONES = (torch.zeros(3, 20, 30), 0), (torch.ones(3, 20, 30), 2)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0)])
def test_targets_say_what_part_of_the_image_is_of_which_class(mixup, cutmix):
    parts = []
    for seed in range(300):
        image, target = Mixing(4, mixup, cutmix).mix(ZEROS, ONES, np.random.default_rng(seed))
        assert image.shape == (3, 20, 30)
        torch.testing.assert_close(target, torch.tensor([1 - image.mean(), 0, image.mean(), 0]))
        assert len(image.unique()) == 1 if mixup else set(image.unique().tolist()) <= {0.0, 1.0}
        parts.append(image.mean().item())
    assert np.std(parts) > 0.2
    assert abs(np.mean(parts) - 0.5) < 0.1 if mixup else 0.2 < np.mean(parts) < 0.5  # boxes are cut off at the edges
    assert ZEROS[0].sum() == 0


def test_with_both_half_of_the_images_get_the_one_and_half_the_other():
    dice = [np.random.default_rng(seed) for seed in range(300)]
    mixed = [Mixing(4, 1.0, 1.0).mix(ZEROS, ONES, one)[0] for one in dice]
    even = sum(len(image.unique()) == 1 and 0 < image[0, 0, 0] < 1 for image in mixed)
    assert 110 < even < 190


def test_two_of_one_class_are_wholly_of_it():
    _, target = Mixing(3, 1.0, 0.0).mix(ONES, (ZEROS[0], 2), np.random.default_rng(0))
    torch.testing.assert_close(target, torch.tensor([0.0, 0.0, 1.0]))


def epoch(splits, config, number, **options):
    loader = train_loader(splits.train, 4, 7, mixing=Mixing.of(config, 2), **options)
    loader.batch_sampler.set_position(number, 0)
    return list(batches(loader))


def test_mixtures_are_a_function_of_seed_epoch_and_image(tmp_path):
    config = DataConfig(name="folder", root=str(write_folder(tmp_path)), val_fraction=0.25, mixup=0.5, cutmix=0.5)
    splits = load_data(config, 16, 0)
    whole = epoch(splits, config, 0)
    for batch in whole:
        assert batch.labels.shape == (len(batch.images), 2)
        torch.testing.assert_close(batch.labels.sum(1), torch.ones(len(batch.images)))
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole, epoch(splits, config, 0, workers=2), strict=True))
    assert not torch.equal(whole[0].images, epoch(splits, config, 1)[0].images)
    ranks = [epoch(splits, config, 0, rank=rank, world=2) for rank in range(2)]
    for name in ("images", "labels"):
        together = torch.cat([getattr(ranks[rank][0], name) for rank in range(2)])
        assert torch.equal(together, getattr(whole[0], name))
    assert Mixing.of(DataConfig(), 10) is None


def test_an_unreadable_partner_is_named(tmp_path):
    config = DataConfig(name="folder", root=str(write_folder(tmp_path)), val_fraction=0.25, mixup=0.5)
    splits = load_data(config, 16, 0)
    broken = splits.train.samples[0][0]
    with open(broken, "wb"):
        pass
    with pytest.raises(ValueError, match="cannot be read"):
        epoch(splits, config, 0)


def test_the_loss_of_a_mixture_is_the_mixture_of_the_losses():
    torch.manual_seed(0)
    logits, first, second = torch.randn(12, 5), torch.randint(5, (6,)), torch.randint(5, (6,))
    part, weights, config = torch.rand(6, 1), torch.rand(5), LossConfig(views=2, add_weight=0.5)
    mixed = part * F.one_hot(first, 5) + (1 - part) * F.one_hot(second, 5)
    own = [F.cross_entropy(view, first, weights, reduction="none") for view in logits.chunk(2)]
    other = [F.cross_entropy(view, second, weights, reduction="none") for view in logits.chunk(2)]
    one, two = ((part[:, 0] * a + (1 - part[:, 0]) * b).mean() for a, b in zip(own, other, strict=True))
    consistency = mosa_loss(logits, first, config, weights) - (own[0].mean() + 0.5 * own[1].mean())
    torch.testing.assert_close(mosa_loss(logits, mixed, config, weights), one + 0.5 * two + consistency)
