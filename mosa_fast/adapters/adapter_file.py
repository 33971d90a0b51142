"""Adapter files: what was trained, with owner maps, as safetensors; the frozen backbone is not in them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mosa_fast.adapters.model import adapt, adapters
from mosa_fast.adapters.vision_transformer import AdaptedVisionTransformer
from mosa_fast.backbones.heads import classifiers
from mosa_fast.config import MoSAConfig
from mosa_fast.files import write_atomically
from mosa_fast.nn import SparseProjection

FORMAT = "mosa_fast.adapter.1"


def save_adapter(model: AdaptedVisionTransformer, path: str | Path) -> None:
    """Write adapters (weights, W0, owner maps), head and anything else that is trained to a safetensors file.

    Raises:
        ValueError: the model has no adapters.
    """
    metadata = {"format": FORMAT, "config": json.dumps(_config(model).to_dict())}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in trained_state(model).items()}
    write_atomically(Path(path), lambda temporary: save_file(tensors, temporary, metadata))


def load_adapter(model: VisionTransformer, path: str | Path) -> AdaptedVisionTransformer:
    """Read a file of `save_adapter` into a model, in place.

    Args:
        model: the same backbone: a plain timm model, which gets adapters and a head of the file's size, or one that
            was adapted with the same configuration.
        path: the file.

    Returns:
        The same model.

    Raises:
        ValueError: the file is not an adapter file, or does not fit the model; the message lists what is missing or
            unexpected.
        FileNotFoundError: there is no such file.
    """
    tensors, config = _read(Path(path))
    if isinstance(model, AdaptedVisionTransformer):
        if _config(model) != config:
            raise ValueError(f"{path} was saved with {config}, but the model has {_config(model)}")
        load_trained_state(model, tensors, str(path))
        return model
    # Tried on a copy without data first: a file that does not fit leaves the model as it was.
    check_trained_state(_prepare(_on_meta(model), config, tensors), tensors, str(path))
    adapted = _prepare(model, config, tensors)
    load_trained_state(adapted, tensors, str(path))
    return adapted


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Everything a trained model has beyond its frozen backbone: trained tensors, adapters' buffers, heads."""
    kept = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if isinstance(model, AdaptedVisionTransformer):
        parts: list[nn.Module] = [*adapters(model), *classifiers(model)]
        names = {module: name for name, module in model.named_modules()}
        for module in parts:
            kept |= {f"{names[module]}.{key}" for key in module.state_dict()}
    return {name: tensor for name, tensor in model.state_dict().items() if name in kept}


def load_trained_state(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Load what `trained_state` gave, if it fits; see `check_trained_state`."""
    check_trained_state(model, tensors, source)
    model.load_state_dict(tensors, strict=False)


def check_trained_state(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Check names, shapes and owner maps against a model; ValueError names `source` and lists what does not fit."""
    own = model.state_dict()
    problems = [f"missing {name}" for name in trained_state(model) if name not in tensors]
    for name, tensor in tensors.items():
        if name not in own:
            problems.append(f"unexpected {name}")
        elif own[name].shape != tensor.shape:
            problems.append(f"{name} is {list(tensor.shape)}, the model's is {list(own[name].shape)}")
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"{source} does not fit this model: {shown}")
    for name, module in model.named_modules():
        if isinstance(module, SparseProjection):
            module.check(name, tensors)


def _prepare(model: VisionTransformer, config: MoSAConfig, tensors: dict[str, Tensor]) -> AdaptedVisionTransformer:
    """Adapters, and a head of the file's size, for a plain model."""
    saved_head = tensors.get("head.bias")
    if saved_head is not None and saved_head.shape[0] != model.num_classes:
        model.reset_classifier(saved_head.shape[0])
    return adapt(model, config)


def _on_meta(model: VisionTransformer) -> VisionTransformer:
    """A copy of the structure on the meta device; no data is copied."""
    copies: dict[int, object] = {}
    for parameter in model.parameters():
        copies[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    for buffer in model.buffers():
        copies[id(buffer)] = buffer.to("meta")
    return copy.deepcopy(model, copies)


def _config(model: nn.Module) -> MoSAConfig:
    if not isinstance(model, AdaptedVisionTransformer):
        raise ValueError(f"{type(model).__name__} has no adapters; call adapt(model, config) first")
    return model.mosa_config


def _read(path: Path) -> tuple[dict[str, Tensor], MoSAConfig]:
    if not path.is_file():
        raise FileNotFoundError(f"no adapter file at {path}")
    try:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
            tensors: dict[str, Tensor] = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is not an adapter file of this version ({metadata.get('format')!r}, not {FORMAT!r})")
    return tensors, MoSAConfig.from_dict(json.loads(metadata["config"]))
