"""The weights that a finished run leaves, and its model with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mosa_fast.adapters.adapter_file import load_adapter, load_trained_state, save_adapter, trained_state
from mosa_fast.config import TrainConfig
from mosa_fast.files import write_atomically
from mosa_fast.methods import METHODS
from mosa_fast.run_folder import RunFolder
from mosa_fast.training.model import build_model
from mosa_fast.training.precision import store_frozen


def weights_file(folder: RunFolder, method: str) -> Path:
    """The file that a method's trained weights are in."""
    return folder.adapter if METHODS[method].has_adapters else folder.model


def save_trained(model: Any, folder: RunFolder, method: str) -> None:
    """Write what was trained to the method's file."""
    path = weights_file(folder, method)
    if METHODS[method].has_adapters:
        save_adapter(model, path)
    else:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in trained_state(model).items()}
        write_atomically(path, lambda temporary: save_file(tensors, temporary))


def load_run_model(folder: RunFolder, config: TrainConfig, classes: list[str]) -> nn.Module:
    """A run's model with its selected weights, on the CPU, in evaluation mode.

    Raises:
        ValueError: the run is not finished, or its weights cannot be read or do not fit.
    """
    weights = weights_file(folder, config.method)
    if not folder.is_finished or not weights.is_file():
        raise ValueError(f"{folder} is not finished (no {weights.name} and {folder.summary.name}); resume it first")
    model: Any = build_model(config, len(classes))
    store_frozen(model, config.precision)
    if METHODS[config.method].has_adapters:
        model.classes = classes  # a file of other classes is refused
        return load_adapter(model, weights).eval()
    try:
        load_trained_state(model, load_file(weights), str(weights))
    except SafetensorError as error:
        raise ValueError(f"{weights} cannot be read: {error}") from None
    return model.eval()
