"""An ONNX file: input `images`, output `logits`, batches of any size, class names and preprocessing in its metadata."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mosa_fast.formats.plain_model import MARK, PlainModel
from mosa_fast.formats.torch_export import EXAMPLES
from mosa_fast.ops.backends import backend

IS_FOLDER = False
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
MOST_BYTES = 2**31  # of a protobuf message
INPUT, OUTPUT, BATCH = "images", "logits", "batch"


def check(plain: PlainModel) -> None:
    """Raise ValueError where a package is missing, or the weights are too many for one file."""
    _check_packages()
    size = sum(tensor.numel() * tensor.element_size() for tensor in plain.model.state_dict().values())
    if size >= MOST_BYTES:
        raise ValueError(f"{size / 1e9:.1f} GB of weights are too many for an ONNX file (2 GB): take torch-export")


def write(plain: PlainModel, path: Path) -> None:
    """Trace and save the model."""
    example = torch.zeros(EXAMPLES, *plain.image_shape)
    with torch.no_grad(), backend("reference"):  # ONNX knows no kernels of ours
        program: Any = torch.onnx.export(
            plain.model,
            (example,),
            dynamo=True,
            verbose=False,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: BATCH},),
        )
    program.model.metadata_props.update(plain.information())
    program.save(path)


def read(path: Path) -> Callable[[Tensor], Tensor]:
    """The model in onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def is_export(path: Path) -> bool:
    """Whether `write` made it."""
    _check_packages()
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        return False
    try:
        return any(fact.key == MARK for fact in onnx.load(path, load_external_data=False).metadata_props)
    except DecodeError:
        return False


def _check_packages() -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"the format onnx needs {' and '.join(missing)}: pip install 'mosa_fast[onnx]'")
