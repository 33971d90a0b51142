"""Draws of experts and dropout seeds, as tensors made outside the layers (docs/method.md, Routing).

One 64-bit seed decides everything random about a training pass through the adapters. It is a function of the run's
seed and the step, so every rank draws the same experts, a resumed run goes on with the same draws, gradient
checkpointing recomputes with them, and a captured CUDA graph only needs the step as a device tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mosa_fast.ops.philox import philox
from mosa_fast.ops.prepare_weights import PreparedWeights

# First words of the counter, one for each purpose, so that no two purposes draw the same numbers.
_PASS, _STEP = 1, 2


@dataclass
class Routing:
    """What the adapted blocks of a model need for one pass.

    Attributes:
        experts: int32 `[adapters, V, 2]`: the (down, up) expert of every adapter and view.
        seeds: int64 `[adapters, 2]`: dropout key and global index of the first sample (ops.philox.dropout_keep).
    """

    experts: Tensor
    seeds: Tensor


class BlockRouting(NamedTuple):
    """One block's part of a Routing, for a pass that is running.

    Attributes:
        experts: int32 `[n, V, 2]`, for each of the block's n adapters in the order they run.
        seeds: int64 `[n, 2]`.
        fork: the block is given B samples and makes V * B of them.
        prepared: for each adapter what kernels read of its weights; None where it prepares that by itself.
    """

    experts: Tensor
    seeds: Tensor
    fork: bool = False
    prepared: Sequence[PreparedWeights] | None = None


def step_seed(seed: int, step: int | Tensor, first_sample: int = 0, device: torch.device | None = None) -> Tensor:
    """The seed of one training step, int64 `[2]`: (64-bit key, global index of this batch's first sample).

    Args:
        seed: the run's seed.
        step: number of the step; a device tensor where a CUDA graph is to advance it.
        first_sample: global index of the first sample of this rank's or micro-batch's part.
        device: where to make it.
    """
    # Filled on the device: a copy from the host would make it wait, and cannot be captured in a CUDA graph.
    key = torch.full((), seed, dtype=torch.int64, device=device)
    zero = torch.zeros_like(key)
    if not isinstance(step, Tensor):
        step = torch.full((), step, dtype=torch.int64, device=device)
    return torch.stack([_key64(philox(key, (zero + _STEP, step, zero, zero))), zero + first_sample])


def draw(seed: Tensor, layers: int, views: int, experts: int) -> Routing:
    """Independent uniform experts for every layer, view and projection, and a dropout seed for every layer.

    Args:
        seed: int64 `[1]` or `[2]` as `step_seed` makes it.
        layers: number of adapters L.
        views: stochastic passes V of the batch.
        experts: number of experts E.
    """
    key, device = seed[0], seed.device
    first_sample = seed[1] if seed.numel() == 2 else torch.zeros_like(key)
    zero = torch.zeros_like(key)
    # One call: of each layer, the dropout key and then the experts of every view.
    layer, column = torch.arange(layers, device=device)[:, None], torch.arange(1 + views, device=device)
    words = philox(key, (zero + _PASS, layer, column, zero))
    # Where E does not divide 2^32, the smallest ids come a little more often: by less than one in 2^32 draws.
    drawn = torch.stack(words[:2], dim=-1)[:, 1:] % experts
    keys = _key64(words)[:, 0]
    return Routing(drawn.to(torch.int32), torch.stack([keys, first_sample.expand(layers)], dim=-1))


def as_seed(seed: Tensor | int | None, device: torch.device) -> Tensor:
    """A seed as the functions here and the operators take it, int64 `[1]` or `[2]`; None: a fresh one.

    Raises:
        ValueError: it is neither an int nor an int64 tensor of one or two elements.
    """
    if seed is None:
        return random_seed(device)
    if isinstance(seed, int):
        # Filled on the device: a copy from the host would make it wait.
        return torch.full((1,), seed, dtype=torch.int64, device=device)
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.numel() not in (1, 2):
        found = f"{seed.dtype} {list(seed.shape)}" if isinstance(seed, Tensor) else repr(seed)
        raise ValueError(f"seed must be an int or int64 [1] or [2], got {found}")
    return seed if seed.ndim == 1 else seed.reshape(-1)


def random_seed(device: torch.device) -> Tensor:
    """A fresh seed, int64 `[1]`, from torch's random state on that device."""
    low, high = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    return torch.randint(low, high, (1,), dtype=torch.int64, device=device)


def _key64(words: tuple[Tensor, ...]) -> Tensor:
    return words[0] | (words[1] << 32)
