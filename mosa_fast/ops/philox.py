"""Counter-based random numbers (Philox-4x32-7; Salmon et al., SC 2011), the same on every backend.

A number is a pure function of a 64-bit key and a 128-bit counter: nothing is stored for backward, and neither the
launch grid, the rank nor the accumulation step changes what is drawn. `dropout_keep` fixes which counter belongs to
which activation; kernels implement exactly the same map.

Seven rounds are the fewest of Philox-4x32 that pass BigCrush (the paper's table 2; its authors advise ten, for a margin
that dropout does not need). A decision of dropout takes 16 of the 128 bits of a call: eight decisions a call.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF
CHANNELS = 8  # channels of one call
LEVELS = 2**16  # values of a channel's number
Lanes = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(key: Tensor, counter: Lanes) -> Lanes:
    """Four random 32-bit words for each counter.

    Args:
        key: int64, without dimensions: the 64-bit key.
        counter: four int64 tensors, broadcastable with each other, of which the low 32 bits count.

    Returns:
        Four int64 tensors of the broadcast shape, values in [0, 2^32).
    """
    w0, w1, w2, w3 = counter
    c0, c1, c2, c3 = (word.bitwise_and_(MASK) for word in _philox(key, (w0 & MASK, w1 & MASK, w2 & MASK, w3 & MASK)))
    return c0, c1, c2, c3


def _philox(key: Tensor, counter: Lanes) -> Lanes:
    """`philox`, whose words have anything above their 32 bits, and that may write into the counter."""
    # On a CPU memory is what takes the time, and of few numbers the calls. So the counter is broadcast by the rounds
    # (on a grid, the words of the first two are no larger than two of its axes), words are cut to 32 bits only where
    # they are multiplied, and they are changed in place.
    keys0, keys1 = (
        torch.arange(0, ROUNDS * increment, increment, device=key.device).add_(start)
        for increment, start in zip(KEY_INCREMENTS, (key, key >> 32), strict=True)
    )
    c0, c1, c2, c3 = counter
    for k0, k1 in zip(keys0.unbind(), keys1.unbind(), strict=True):
        # The product of two 32-bit words wraps in int64, but its 64 bits are the right ones.
        product0 = c0.bitwise_and_(MASK).mul_(MULTIPLIERS[0])
        product1 = c2.bitwise_and_(MASK).mul_(MULTIPLIERS[1])
        c0, c2 = _xor(product1 >> 32, c1.bitwise_xor_(k0)), _xor(product0 >> 32, c3.bitwise_xor_(k1))
        c1, c3 = product1, product0
    return c0, c1, c2, c3


def _xor(word: Tensor, other: Tensor) -> Tensor:
    return word.bitwise_xor_(other) if word.shape == other.shape else word ^ other


def dropout_threshold(probability: float) -> int:
    """An activation is dropped where its 16-bit number is below this one: the probability in steps of 1 / 65,536.

    Less than half a step drops nothing; and something is always kept, since the probability is below one.
    """
    return min(round(probability * LEVELS), LEVELS - 1)


def dropout_scale(probability: float) -> float:
    """What a kept activation is multiplied by: 1 / (1 - p) of the p that is drawn, so that the expectation is exact."""
    return LEVELS / (LEVELS - dropout_threshold(probability))


def dropout_keep(seed: Tensor, probability: float, views: int, samples: int, tokens: int, channels: int) -> Tensor:
    """Which activations survive dropout.

    The number of (view, sample, token, channel) is a half of lane `channel % 8 // 2`, the low one of an even channel
    and the high one of an odd channel, of philox(key=seed[0], counter=(channel // 8, token, first_sample + sample,
    view)).

    Args:
        seed: int64 `[1]` (the key) or `[2]` (the key and `first_sample`, the global index of this batch's first
            sample: a rank or an accumulation step draws what the whole batch would have drawn).
        probability: chance to drop, in [0, 1); rounded to a multiple of 1 / 65,536.
        views, samples, tokens, channels: shape of the activations; samples are counted within a view.

    Returns:
        int16 `[views, samples, tokens, channels]`: 1 for those that do, 0 for the others.
    """
    device = seed.device
    first_sample = seed[1] if seed.numel() == 2 else 0

    def index(size: int, dim: int) -> Tensor:
        shape = [1, 1, 1, 1]
        shape[dim] = size
        return torch.arange(size, device=device).view(shape)

    counter = (index(-(-channels // CHANNELS), 3), index(tokens, 2), index(samples, 1) + first_sample, index(views, 0))
    words = torch.stack([word.to(torch.int32) for word in _philox(seed[0], counter)], dim=-1)
    numbers = words.view(torch.int16).flatten(-2)[..., :channels]  # low half first: all of torch's platforms but s390x
    # As signed numbers, since torch compares no unsigned ones of 16 bits: half the range lower, and so in order. In
    # place, where truth is 1: on a CPU to make bools, and to turn them into numbers, takes six times as long.
    return numbers.bitwise_xor_(-LEVELS // 2).ge_(dropout_threshold(probability) - LEVELS // 2)
