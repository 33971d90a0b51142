"""Checkpoints: what a run needs to go on as if it had never stopped.

OUT/checkpoint holds, for the last complete one, `step-N.pt` (read with weights_only=True), which names the files of
trained weights that belong to it: `step-N.safetensors`, and `epoch-N.safetensors` of the epoch selected so far. The .pt
is written last and nothing is removed before it is on the disk, so whenever the process dies, a complete one is there.
Random states are not in it: order, experts and dropout are functions of the seed and the position.
"""

from __future__ import annotations

import io
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mosa_fast.adapters.adapter_file import load_trained_state, trained_state
from mosa_fast.files import write_atomically

FORMAT = "mosa_fast.checkpoint.1"
FOLDER = "checkpoint"
# What may change between the start of a run and its resumption, for it changes no result.
FREE = (
    "out",
    "device",
    "data.root",
    "data.workers",
    "loader.cache",
    "compile",
    "cuda_graphs",
    "checkpoint_every",
    "checkpoint_steps",
    "log_every",
    "tensorboard",
    "wandb",
)


def last_checkpoint(out: Path) -> Path | None:
    """The last complete checkpoint of a run's folder, or None."""
    complete = [path for path in (out / FOLDER).glob("step-*.pt") if re.fullmatch(r"step-\d+\.pt", path.name)]
    return max(complete, key=lambda path: int(path.stem.removeprefix("step-")), default=None)


def save_checkpoint(
    out: Path, step: int, state: dict[str, Any], model: nn.Module, selected: tuple[int, dict[str, Tensor]] | None
) -> Path:
    """Write a checkpoint, then remove the older ones.

    Args:
        out: the run's folder.
        step: number of steps taken.
        state: of everything but the model: numbers, strings, tensors, and lists and dicts of them.
        model: its trained weights are written.
        selected: the epoch selected so far and its weights.

    Raises:
        OSError: the files cannot be written; the checkpoint before is untouched.
    """
    folder = out / FOLDER
    weights = folder / f"step-{step:09d}.safetensors"
    _write_tensors(weights, trained_state(model))
    names: dict[str, str | None] = {"weights": weights.name, "selected": None}
    if selected is not None:
        chosen = folder / f"epoch-{selected[0]:06d}.safetensors"
        _write_tensors(chosen, selected[1])
        names["selected"] = chosen.name
    # Through memory, because torch hides the reason when a disk is full.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **names, **state}, buffer)
    path = folder / f"step-{step:09d}.pt"
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()))
    kept = {path.name, *names.values()}
    # Oldest .pt first removed, then the weights it names: never one without the other.
    for old in sorted(folder.iterdir(), key=lambda file: (file.suffix != ".pt", file.name)):
        if old.name not in kept:
            old.unlink(missing_ok=True)
    return path


def load_checkpoint(path: Path, model: nn.Module, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a checkpoint, its trained weights into the model.

    Args:
        path: as `last_checkpoint` gives it.
        model: built from the same configuration.
        config: of the run that is to go on, nested as the dataclasses are.

    Returns:
        The state that was saved, and the weights of the selected epoch (empty where there was none).

    Raises:
        ValueError: it cannot be read, or belongs to another configuration or model.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this version ({FORMAT})")
    for key, (then, now) in _differences(state["config"], config).items():
        raise ValueError(f"{path.parent.parent} was started with {key} {then}, not {now}; resume it with the same")
    load_trained_state(model, _read_tensors(path.with_name(state["weights"])), str(path.with_name(state["weights"])))
    selected = _read_tensors(path.with_name(state["selected"])) if state["selected"] else {}
    return state, selected


def remove_checkpoints(out: Path) -> None:
    """Remove the checkpoints of a run that is finished."""
    shutil.rmtree(out / FOLDER, ignore_errors=True)


def _differences(then: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    old, new = _flat(then), _flat(now)
    keys = [key for key in {**old, **new} if key not in FREE]
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    copies = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(copies, temporary))


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
