"""Checkpoints: what a run needs to go on as if it had never stopped.

The folder of checkpoints holds, for the last complete one, the trained weights (safetensors) and the state of
everything else (read with weights_only=True). The weights are written first and get their name when the state is there
too, so that weights without a state were not left by a process that died: somebody lost the state. Nothing is removed
before the new one is on the disk, so whenever the process dies, a complete one is there. Random states are not in it:
order, experts and dropout are functions of the seed and the position.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from mosa_fast.adapters.adapter_file import load_trained_state, trained_state
from mosa_fast.config import TrainConfig
from mosa_fast.files import write_atomically
from mosa_fast.options import facts_of, flat
from mosa_fast.run_folder import RunFolder
from mosa_fast.tensor_file import read_tensors, write_tensors
from mosa_fast.training.distributed import Ranks
from mosa_fast.training.position import Position

# Another one where a checkpoint holds something else, and where a resumed run would draw other random numbers.
FORMAT = "mosa_fast.checkpoint.4"


class Stateful(Protocol):
    """A part of a run that saves and loads its own state: numbers, strings, tensors, and lists and dicts of them."""

    def state_dict(self) -> dict[str, Any]:
        """What it has to know to go on."""

    def load_state_dict(self, state: Any) -> Any:
        """Go on from there."""


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: the run's.
        config: of the run, as it goes on.
        ranks: the first of them writes, all read.
        model: its trained weights are kept.
        data: what the run is trained on; looked at before anything is loaded.
        position: of the run; loaded before the others.
        others: what else has a state, by the name it is kept under.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: TrainConfig,
        ranks: Ranks,
        model: nn.Module,
        data: Stateful,
        position: Position,
        **others: Stateful,
    ) -> None:
        self.folder, self.config, self.ranks, self.model, self.position = folder, asdict(config), ranks, model, position
        self.data = data
        self.parts: dict[str, Stateful] = {"position": position, **others}
        self._saved: tuple[int, int] | None = None

    def save(self) -> None:
        """Write a checkpoint, then remove the older ones; where the run has not moved since the last, that one stays.

        Raises:
            OSError: the files cannot be written; the checkpoint before is untouched.
        """
        here = (self.position.steps, self.position.epochs_done)
        # All processes take part, since some parts have something of each in their state.
        state = {} if here == self._saved else {name: part.state_dict() for name, part in self.parts.items()}
        if self.ranks.is_first and state:
            weights, pending = (
                of(self.position.steps) for of in (self.folder.checkpoint_weights, self.folder.pending_weights)
            )
            write_tensors(pending, trained_state(self.model))
            # Through memory, because torch hides the reason when a disk is full.
            buffer = io.BytesIO()
            content = {
                "format": FORMAT,
                "config": self.config,
                "data": self.data.state_dict(),
                "weights": _digest(pending),
                "state": state,
            }
            torch.save(content, buffer)
            path = self.folder.checkpoint(self.position.steps)
            write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))
            pending.replace(weights)
            # States first, then weights: never a state without the weights that belong to it.
            for old in sorted(self.folder.checkpoints.iterdir(), key=lambda file: (file.suffix != path.suffix, file)):
                if old not in (path, weights):
                    old.unlink(missing_ok=True)
        self._saved = here
        self.ranks.barrier()

    def load(self, step: int) -> None:
        """Go on from the checkpoint after so many steps.

        Raises:
            ValueError: it cannot be read, or belongs to another configuration, other data or another model.
        """
        path, weights = self.folder.checkpoint(step), self.folder.checkpoint_weights(step)
        pending = self.folder.pending_weights(step)
        if self.ranks.is_first and pending.is_file():  # the process died between the state and this
            pending.replace(weights)
        self.ranks.barrier()
        content = _read_state(path)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{path} is not a checkpoint of this version ({FORMAT})")
        for key, (then, now) in changes(content["config"], self.config).items():
            raise ValueError(f"{self.folder} was started with {key} {then}, not {now}; resume it with the same")
        self.data.load_state_dict(content["data"])
        if not weights.is_file() or _digest(weights) != content["weights"]:
            raise ValueError(f"{weights} cannot be read: it is not the file that was written with {path.name}")
        load_trained_state(self.model, read_tensors(weights), str(weights))
        for name, part in self.parts.items():
            part.load_state_dict(content["state"][name])
        self._saved = (self.position.steps, self.position.epochs_done)


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Options that differ, (then, now) by name, without those that a resumed run may change (`Facts.free`)."""
    facts = facts_of(TrainConfig)
    old, new = flat(then), flat(now)
    names = [name for name in {**old, **new} if name not in facts or not facts[name].free]
    return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _read_state(path: Path) -> Any:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch does not look at the checksums that it writes
        if damaged is not None:
            raise ValueError(f"{damaged} is damaged")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes can be any kind of nonsense
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read: {reason}") from None
