"""What a finished run leaves: the weights that it trained, and everything that is needed to use them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mosa_fast.adapters.adapter_file import load_trained_state, save_adapter, trained_state
from mosa_fast.adapters.metadata import read_metadata
from mosa_fast.adapters.model import load_adapter
from mosa_fast.config import TrainConfig
from mosa_fast.data.preprocessing import Preprocessing
from mosa_fast.methods import METHODS
from mosa_fast.run_folder import RunFolder
from mosa_fast.tensor_file import read_tensors, write_tensors
from mosa_fast.training.distributed import pick_device
from mosa_fast.training.model import build_model
from mosa_fast.training.precision import autocast, input_dtype, store_frozen
from mosa_fast.training.run_data import preprocessing_of_run


def weights_file(folder: RunFolder, method: str) -> Path:
    """The file that a method's trained weights are in."""
    return folder.adapter if METHODS[method].has_adapters else folder.model


def save_trained(model: Any, folder: RunFolder, method: str) -> None:
    """Write what was trained to the method's file."""
    path = weights_file(folder, method)
    if METHODS[method].has_adapters:
        save_adapter(model, path)
    else:
        write_tensors(path, trained_state(model))


@dataclass(frozen=True)
class FinishedRun:
    """A run that came to its end.

    Attributes:
        folder: its files.
        config: its configuration; `data.image_size` is set.
        classes: names of the classes, by label.
        preprocessing: what its evaluation does to an image.
        device: to compute on.
    """

    folder: RunFolder
    config: TrainConfig
    classes: list[str]
    preprocessing: Preprocessing
    device: torch.device

    def __str__(self) -> str:
        return str(self.folder)

    @property
    def weights(self) -> Path:
        """The file of the trained weights."""
        return weights_file(self.folder, self.config.method)

    def load_model(self) -> nn.Module:
        """The model with the selected weights, on the device, in evaluation mode.

        Frozen weights are stored as the run's precision has them.

        Raises:
            ValueError: the weights cannot be read or do not fit.
        """
        model: Any = build_model(self.config, len(self.classes))
        store_frozen(model, self.config.precision)
        if METHODS[self.config.method].has_adapters:
            model.classes = self.classes  # a file of other classes is refused
            return load_adapter(model, self.weights).eval().to(self.device)
        load_trained_state(model, read_tensors(self.weights), str(self.weights))
        return model.eval().to(self.device)

    @torch.no_grad()
    def logits(self, model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """Logits `[B, classes]`, float32, of preprocessed images `[B, 3, H, W]`, in the run's precision."""
        with autocast(self.config.precision, self.device):
            return model(images.to(self.device, input_dtype(self.config.precision), non_blocking=True)).float()


def open_run(folder: RunFolder, device: str | None = None) -> FinishedRun:
    """The run in a folder, for whatever is done with a run after its end.

    Args:
        folder: of the run.
        device: to compute on; None: the run's own.

    Raises:
        ValueError: it is not the folder of a run, the run is not finished, its files cannot be read, or there is no
            such device.
    """
    from mosa_fast.run_options import read_run  # with jsonargparse, which a training from code does without

    config, classes = read_run(folder)
    weights = weights_file(folder, config.method)
    if not folder.is_finished or not weights.is_file():
        raise ValueError(f"{folder} is not finished (no {weights.name} and {folder.summary.name}); resume it first")
    # An adapter file says what its images were like, whatever this version would do.
    in_file = read_metadata(weights).preprocessing if METHODS[config.method].has_adapters else None
    preprocessing = in_file or preprocessing_of_run(config)
    return FinishedRun(folder, config, classes, preprocessing, pick_device(device or config.device))
