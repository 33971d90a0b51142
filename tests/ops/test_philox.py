import math

import pytest
import torch

from mosa_fast.ops.philox import dropout_keep, dropout_scale, dropout_threshold, philox

# Known answers of Philox-4x32-7, from the Random123 distribution (kat_vectors): counter, key, result.
KNOWN = [
    ([0] * 4, [0] * 2, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A],
    ),
]
SEED = (-(2**62) + 3, 2**31 - 2)


def philox_of_integers(key: int, counter: list[int]) -> list[int]:
    """Philox-4x32-7 as the paper's section 4.2 has it, in Python's integers."""
    left, right = [counter[0], counter[2]], [counter[1], counter[3]]
    for number in range(7):
        products = left[0] * 0xD2511F53, left[1] * 0xCD9E8D57
        keys = [(key >> 32 * lane) + number * weyl & 2**32 - 1 for lane, weyl in enumerate((0x9E3779B9, 0xBB67AE85))]
        left = [products[1 - lane] >> 32 ^ right[lane] ^ keys[lane] for lane in range(2)]
        right = [products[1 - lane] & 2**32 - 1 for lane in range(2)]
    return [left[0], right[0], left[1], right[1]]


def signed(word: int, bits: int) -> int:
    """The integer of so many bits that two's complement makes of them."""
    return word - 2**bits if word >= 2 ** (bits - 1) else word


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    words = philox(torch.tensor(signed(key[1] << 32 | key[0], 64)), tuple(torch.tensor(c) for c in counter))
    assert [int(w) for w in words] == expected
    assert philox_of_integers(key[1] << 32 | key[0], counter) == expected


def test_a_grid_of_counters_draws_what_each_of_them_does():
    axes = (torch.arange(3).view(3, 1, 1), torch.tensor(7), torch.arange(5), torch.arange(2).view(2, 1))
    before = [axis.clone() for axis in axes]
    together = philox(torch.tensor(SEED[0]), axes)
    assert all(torch.equal(axis, old) for axis, old in zip(axes, before, strict=True))
    for i, j, k in torch.cartesian_prod(torch.arange(3), torch.arange(2), torch.arange(5)).tolist():
        assert [int(word[i, j, k]) for word in together] == philox_of_integers(SEED[0], [i, 7, k, j])


@pytest.mark.parametrize("probability", [0.37, 0.5, 0.1])
def test_a_channel_is_kept_by_its_half_of_its_lane(probability):
    views, samples, tokens, channels = 2, 3, 2, 21
    keep = dropout_keep(torch.tensor(SEED), probability, views, samples, tokens, channels)
    assert keep.shape == (views, samples, tokens, channels)
    for view, sample, token in torch.cartesian_prod(*map(torch.arange, (views, samples, tokens))).tolist():
        for channel in range(channels):
            words = philox_of_integers(SEED[0], [channel // 8, token, SEED[1] + sample, view])
            number = words[channel % 8 // 2] >> 16 * (channel % 2) & 0xFFFF
            assert keep[view, sample, token, channel] == (number >= dropout_threshold(probability))


@pytest.mark.parametrize("probability", [0.1, 0.3, 0.5, 0.9])
def test_dropout_frequency(probability):
    keep = dropout_keep(torch.tensor([5]), probability, 2, 16, 40, 64).float()
    for dims in ((0, 1, 2), (0, 1, 2, 3)):  # of every channel, and of all
        count = keep.numel() // keep.mean(dims).numel()
        error = math.sqrt(probability * (1 - probability) / count)
        assert ((keep.mean(dims) - (1 - probability)).abs() < 4.5 * error).all()


def test_channels_of_one_call_and_neighbours_are_independent():
    keep = dropout_keep(torch.tensor([11]), 0.3, 2, 32, 64, 16)
    columns = keep.flatten(0, 2).T.float()
    correlation = torch.corrcoef(columns) - torch.eye(16)
    assert correlation.abs().max() < 4.5 / math.sqrt(columns.shape[1])
    for dim in range(3):  # neighbours along the views, samples and tokens
        size = keep.shape[dim] - 1
        both = torch.stack([keep.narrow(dim, start, size).flatten() for start in (0, 1)]).float()
        assert torch.corrcoef(both)[0, 1].abs() < 4.5 / math.sqrt(both.shape[1])


@pytest.mark.parametrize("probability", [0.1, 0.25, 0.37, 1 / 3, 0.999, 1 - 2**-30, 1e-7])
def test_the_scale_is_that_of_the_probability_that_is_drawn(probability):
    """The mean over all 65,536 numbers is one, whatever the probability is rounded to."""
    threshold, scale = dropout_threshold(probability), dropout_scale(probability)
    assert abs(threshold / 65536 - probability) <= (0.5 if probability < 0.9999 else 1) / 65536
    assert (65536 - threshold) * scale / 65536 == pytest.approx(1, abs=1e-15)


def test_the_ends_of_the_range():
    assert dropout_keep(torch.tensor([5]), 1e-7, 1, 4, 9, 8).all()
    assert dropout_scale(1e-7) == 1
    nearly_all = dropout_keep(torch.tensor([5]), 1 - 2**-30, 2, 64, 64, 64)  # 8 of 524,288 are to be expected
    assert 0 < nearly_all.sum() < 30


def test_a_part_of_the_batch_draws_what_the_whole_batch_does():
    whole = dropout_keep(torch.tensor([5]), 0.5, 2, 12, 3, 6)
    part = dropout_keep(torch.tensor([5, 8]), 0.5, 2, 4, 3, 6)
    assert torch.equal(whole[:, 8:], part)


def test_a_narrower_bottleneck_draws_the_first_channels():
    wide, narrow = (dropout_keep(torch.tensor([5]), 0.5, 2, 3, 4, channels) for channels in (24, 13))
    assert torch.equal(wide[..., :13], narrow)


def test_views_samples_tokens_and_channels_differ():
    keep = dropout_keep(torch.tensor([5]), 0.5, 2, 8, 8, 64)
    for dim in range(4):
        first, second = keep.select(dim, 0), keep.select(dim, 1)
        assert 0.3 < (first == second).float().mean() < 0.7
