import pytest
import torch

from mosa_fast.ops.philox import dropout_keep, philox

# Known answers of Philox-4x32-10, from the Random123 distribution: counter, key, result.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected):
    high = key[1] - 2**32 if key[1] >= 2**31 else key[1]
    words = philox(torch.tensor((high << 32) | key[0]), tuple(torch.tensor(c) for c in counter))
    assert [int(w) for w in words] == expected


def test_dropout_frequency():
    keep = dropout_keep(torch.tensor([5]), 0.3, 2, 16, 9, 37)
    assert keep.shape == (2, 16, 9, 37)
    assert abs(keep.float().mean() - 0.7) < 0.02


def test_a_part_of_the_batch_draws_what_the_whole_batch_does():
    whole = dropout_keep(torch.tensor([5]), 0.5, 2, 12, 3, 6)
    part = dropout_keep(torch.tensor([5, 8]), 0.5, 2, 4, 3, 6)
    assert torch.equal(whole[:, 8:], part)


def test_views_samples_tokens_and_channels_differ():
    keep = dropout_keep(torch.tensor([5]), 0.5, 2, 8, 8, 64)
    for dim in range(4):
        first, second = keep.select(dim, 0), keep.select(dim, 1)
        assert 0.3 < (first == second).float().mean() < 0.7
