"""Counter-based random numbers (Philox-4x32-10; Salmon et al., SC 2011), the same on every backend.

A number is a pure function of a 64-bit key and a 128-bit counter: nothing is stored for backward, and neither the
launch grid, the rank nor the accumulation step changes what is drawn. `dropout_keep` fixes which counter belongs to
which activation; kernels implement exactly the same map.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF
Lanes = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(key: Tensor, counter: Lanes) -> Lanes:
    """Four random 32-bit words for each counter.

    Args:
        key: int64, broadcastable with the counter: the 64-bit key.
        counter: four int64 tensors, broadcastable with each other, of which the low 32 bits count.

    Returns:
        Four int64 tensors of the broadcast shape, values in [0, 2^32).
    """
    k0, k1 = key & MASK, (key >> 32) & MASK
    c0, c1, c2, c3 = torch.broadcast_tensors(*(word & MASK for word in counter))
    for _ in range(ROUNDS):
        # The product of two 32-bit words wraps in int64, but its 64 bits are the right ones.
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) ^ c1 ^ k0) & MASK,
            product1 & MASK,
            ((product0 >> 32) ^ c3 ^ k1) & MASK,
            product0 & MASK,
        )
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & MASK, (k1 + KEY_INCREMENTS[1]) & MASK
    return c0, c1, c2, c3


def dropout_threshold(probability: float) -> int:
    """An activation is dropped where its 32-bit word is below this number."""
    return min(round(probability * 2**32), MASK)


def dropout_keep(seed: Tensor, probability: float, views: int, samples: int, tokens: int, channels: int) -> Tensor:
    """Which activations survive dropout.

    The word for (view, sample, token, channel) is lane `channel % 4` of
    philox(key=seed[0], counter=(channel // 4, token, first_sample + sample, view)).

    Args:
        seed: int64 `[1]` (the key) or `[2]` (the key and `first_sample`, the global index of this batch's first
            sample: a rank or an accumulation step draws what the whole batch would have drawn).
        probability: chance to drop, in [0, 1).
        views, samples, tokens, channels: shape of the activations; samples are counted within a view.

    Returns:
        bool `[views, samples, tokens, channels]`.
    """
    device = seed.device
    first_sample = seed[1] if seed.numel() == 2 else torch.zeros((), dtype=torch.int64, device=device)

    def index(size: int, dim: int) -> Tensor:
        shape = [1, 1, 1, 1]
        shape[dim] = size
        return torch.arange(size, device=device).view(shape)

    counter = (index(-(-channels // 4), 3), index(tokens, 2), index(samples, 1) + first_sample, index(views, 0))
    words = torch.stack(philox(seed[0], counter), dim=-1).flatten(-2)[..., :channels]
    return words >= dropout_threshold(probability)
