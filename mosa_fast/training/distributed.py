"""Several processes: started by torchrun, joined by torch.distributed. One process needs none of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run.

    Attributes:
        rank, world: number of this process, and how many there are.
        device: where it computes.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files and speaks."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes; the argument is left as it is."""
        if self.world > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """All processes' values of one shape, `[world, ...]`."""
        rows = values.new_zeros(self.world, *values.shape)
        rows[self.rank] = values
        return self.sum(rows)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process (a synchronisation of all)."""
        if self.world == 1:
            return flag
        return bool(self.sum(torch.tensor(int(flag), device=self.device)).item())

    def from_first(self, function: Callable[[], Result]) -> Result:
        """What a function returns in the first process, the only one to call it, in all of them; or what it raises.

        Raises:
            ValueError, OSError: as the function does.
            RuntimeError: in the other processes, where the function raises anything else.
        """
        if self.world == 1:
            return function()
        outcome: list[Any] = [None, None, ""]
        if self.is_first:
            try:
                outcome[0] = function()
            except Exception as error:
                # The others wait for this process whatever happens to it; not every error can be sent to them as it is.
                kind = next((kind for kind in (ValueError, OSError) if isinstance(error, kind)), RuntimeError)
                sent = str(error) if kind is not RuntimeError else f"the first process: {type(error).__name__}: {error}"
                dist.broadcast_object_list([None, kind, sent], 0)
                raise
        dist.broadcast_object_list(outcome, 0)
        result, kind, message = outcome
        if kind is not None:
            raise kind(message)
        return result

    def agree(self, tensors: Iterable[Tensor]) -> None:
        """Give all processes the first one's values, in place."""
        for tensor in tensors if self.world > 1 else ():
            dist.broadcast(tensor, 0)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def join_ranks(device_name: str) -> Iterator[Ranks]:
    """Join the processes that torchrun started; without torchrun there is one.

    Raises:
        ValueError: the device is not there.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        yield Ranks(0, 1, pick_device(device_name))
        return
    device = pick_device(device_name)
    if device.type == "cuda":
        device = pick_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(rank, world, device)
    finally:
        dist.destroy_process_group()


def pick_device(name: str) -> torch.device:
    """The device that a configuration names; "auto" is a GPU where there is one.

    Raises:
        ValueError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with suppress(RuntimeError):
        device = torch.device(name)
        if device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < torch.cuda.device_count()):
            return device
    raise ValueError(f"device {name!r} is not available here")
