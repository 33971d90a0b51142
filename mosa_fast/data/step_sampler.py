"""Which images a step of training sees, in which order, and which of them one process works on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler


@dataclass(frozen=True)
class StepSlice:
    """One process's images of one step.

    Attributes:
        epoch: counted from 1.
        indices: of the images in the data set, at least one.
        first: place of the first of them in the step's batch, over all processes.
        count: how many of them count: all, or 0 where they only stand in for a slice without images.
        total: images of the step, over all processes.
    """

    epoch: int
    indices: list[int]
    first: int
    count: int
    total: int


class StepSampler(Sampler[StepSlice]):
    """The slices of one process, a step each, from a given step of an epoch on.

    The order is a pure function of (seed, epoch). A slice that would be empty is the step's first image, so that every
    process takes part in every step; it does not count.

    Args:
        samples: images of the data set.
        batch_size: of a step, over all processes.
        seed: of the order.
        rank, world: this process, and how many there are.
    """

    def __init__(self, samples: int, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.samples, self.batch_size, self.seed = samples, batch_size, seed
        self.rank, self.world = rank, world
        self.epoch, self.first_step = 0, 0

    def set_position(self, epoch: int, first_step: int) -> None:
        """What the next iteration gives: the steps of `epoch` from `first_step` on."""
        self.epoch, self.first_step = epoch, first_step

    def __len__(self) -> int:
        return -(-self.samples // self.batch_size)

    def __iter__(self) -> Iterator[StepSlice]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.samples).tolist()
        epoch = self.epoch
        for start in range(self.first_step * self.batch_size, self.samples, self.batch_size):
            batch = order[start : start + self.batch_size]
            first, last = rank_slice(len(batch), self.rank, self.world)
            yield StepSlice(epoch, batch[first:last] or batch[:1], first, last - first, len(batch))


def rank_slice(samples: int, rank: int, world: int) -> tuple[int, int]:
    """The part [first, last) of a step's batch that a rank works on: contiguous, sizes differ by at most one."""
    return samples * rank // world, samples * (rank + 1) // world
