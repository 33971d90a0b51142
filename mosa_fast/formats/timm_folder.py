"""A folder that `timm.create_model("local-dir:PATH", pretrained=True)` reads, and the Hugging Face hub shows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE  # the names that timm looks for
from safetensors.torch import save_file
from torch import Tensor

from mosa_fast.data.preprocessing import Preprocessing
from mosa_fast.formats.plain_model import MARK, PlainModel

IS_FOLDER = True
KEPT = ("first_conv", "classifier", "fixed_input_size")  # what timm says of an architecture, not of weights


def check(plain: PlainModel) -> None:
    """Raise ValueError where timm cannot make the model."""
    if plain.merged_because is not None:
        raise ValueError(f"the format timm needs a model that folds: {plain.merged_because} for the other formats")


def write(plain: PlainModel, path: Path) -> None:
    """Make the folder; timm's `load_model_config_from_path` documents what is in it."""
    model = plain.model
    settings = model.pretrained_cfg
    config = {
        "architecture": settings["architecture"],
        "num_classes": model.num_classes,
        "num_features": model.num_features,
        "model_args": plain.create_kwargs,
        "label_names": plain.classes,
        "pretrained_cfg": {name: settings[name] for name in KEPT if settings.get(name) is not None}
        | {"num_classes": model.num_classes, "custom_load": False}
        | timm_preprocessing(plain.preprocessing),
        MARK: json.loads(plain.information()[MARK]),
    }
    path.mkdir()
    (path / CONFIG_NAME).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    tensors = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, path / SAFETENSORS_SINGLE_FILE, {"format": "pt"})
    (path / SAFETENSORS_SINGLE_FILE).chmod((path / CONFIG_NAME).stat().st_mode)  # safetensors lets nobody else read it


def read(path: Path) -> Callable[[Tensor], Tensor]:
    """The model, as timm makes it."""
    return timm.create_model(f"local-dir:{path.absolute()}", pretrained=True).eval()


def is_export(path: Path) -> bool:
    """Whether `write` made it."""
    try:
        return MARK in json.loads((path / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def timm_preprocessing(preprocessing: Preprocessing) -> dict[str, Any]:
    """The fields of timm's pretrained_cfg that say the same."""
    size, resize = preprocessing.image_size, preprocessing.resize
    crop_pct = 1.0
    if resize is not None:
        # timm cuts size / crop_pct down to an integer; half a pixel more is safe where the quotient is rounded.
        crop_pct = size / resize if math.floor(size / (size / resize)) == resize else size / (resize + 0.5)
    return {
        "input_size": [3, size, size],
        "interpolation": preprocessing.interpolation,
        "crop_mode": "squash" if resize is None else "center",
        "crop_pct": crop_pct,
        "mean": list(preprocessing.mean),
        "std": list(preprocessing.std),
    }
