"""An ExportedProgram, for `torch.export.load` (and from there AOTInductor or ExecuTorch)."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from mosa_fast.formats.plain_model import MARK, PlainModel
from mosa_fast.ops.backends import backend

IS_FOLDER = False
EXAMPLES = 2  # images of the traced batch: one would be taken for a constant


def check(plain: PlainModel) -> None:
    """Every plain model can be traced."""


def write(plain: PlainModel, path: Path) -> None:
    """Save the program, with `classes.json` and `preprocessing.json` as extra files."""
    extra = {f"{name}.json": text for name, text in plain.information().items()}
    with path.open("wb") as handle:
        torch.export.save(traced(plain), handle, extra_files=extra)


def traced(plain: PlainModel) -> ExportedProgram:
    """The model as a graph of PyTorch's own operations, for batches of any size."""
    images = torch.zeros(EXAMPLES, *plain.image_shape)
    with torch.no_grad(), backend("reference"):  # kernels of ours would want this package
        return torch.export.export(plain.model, (images,), dynamic_shapes=({0: Dim("batch")},))


def read(path: Path) -> Callable[[Tensor], Tensor]:
    """The program as a module."""
    with path.open("rb") as handle:
        return torch.export.load(handle).module()


def is_export(path: Path) -> bool:
    """Whether `write` made it."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith(f"/{MARK}.json") for name in archive.namelist())
