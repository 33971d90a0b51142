"""Adapter files: what was trained, with owner maps, as safetensors; the frozen backbone is not in them.

Tensors are named as timm names the modules they belong to, whatever wraps these: `blocks.0.adapter.down.weight`.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mosa_fast.adapters.model import AdaptedModel, adapt, adapters
from mosa_fast.adapters.wrapper import Wrapper, unwrapped, unwrapped_name
from mosa_fast.backbones.heads import classifiers, heads
from mosa_fast.config import MoSAConfig
from mosa_fast.files import write_atomically
from mosa_fast.nn import SparseProjection

FORMAT = "mosa_fast.adapter.1"


def save_adapter(model: nn.Module, path: str | Path) -> None:
    """Write adapters (weights, W0, owner maps), head and anything else that is trained to a safetensors file.

    Args:
        model: adapted; it may be wrapped by torch.compile or DistributedDataParallel.
        path: the file.

    Raises:
        ValueError: the model has no adapters.
    """
    model = unwrapped(model)
    config = next(adapters(model)).config
    metadata = {"format": FORMAT, "config": json.dumps(config.to_dict())}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in trained_state(model).items()}
    write_atomically(Path(path), lambda temporary: save_file(tensors, temporary, metadata))


def load_adapter(model: nn.Module, path: str | Path) -> AdaptedModel:
    """Read a file of `save_adapter` into a model.

    Args:
        model: the same backbone: a plain timm model, which gets adapters and a head of the file's size in place, or
            one that was adapted with the same configuration.
        path: the file.

    Returns:
        The adapted model: the given one, or one around it.

    Raises:
        ValueError: the file is not an adapter file, or does not fit the model; the message lists what is missing or
            unexpected.
        FileNotFoundError: there is no such file.
    """
    tensors, config = _read(Path(path))
    model = unwrapped(model)
    if isinstance(model, AdaptedModel):
        if model.mosa_config != config:
            raise ValueError(f"{path} was saved with {config}, but the model has {model.mosa_config}")
        load_trained_state(model, tensors, str(path))
        return model
    # Checked on a copy without data first, so that a file that does not fit leaves the model as it was.
    check_trained_state(_prepare(_on_meta(model), config, tensors), tensors, str(path))
    adapted = _prepare(model, config, tensors)
    load_trained_state(adapted, tensors, str(path))
    return adapted


def timm_names(model: nn.Module) -> dict[str, str]:
    """The name that every entry of the model's state_dict has without wrappers of any kind, by its name there."""
    own = {
        unwrapped_name(f"{path}.{module.CHILD}" if path else module.CHILD)
        for path, module in model.named_modules()
        if isinstance(module, Wrapper)
    }
    names = {}
    for name in model.state_dict():
        parts = unwrapped_name(name).split(".")
        paths = (".".join(parts[: index + 1]) for index in range(len(parts)))
        names[name] = ".".join(part for part, path in zip(parts, paths, strict=True) if path not in own)
    return names


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Everything a trained model has beyond its frozen backbone: trained tensors, adapters' buffers, heads.

    With the trained parameters of a module go its buffers: BatchNorm that is trained learns its statistics, too. Names
    are timm's (`timm_names`).
    """
    kept = set()
    for path, module in model.named_modules():
        own = dict(module.named_parameters(path, recurse=False))
        trained = {name for name, parameter in own.items() if parameter.requires_grad}
        kept |= trained | ({name for name, _ in module.named_buffers(path, recurse=False)} if trained else set())
    if isinstance(model, AdaptedModel):
        parts = {id(module) for module in (*adapters(model), *classifiers(model))}
        for path, module in model.named_modules():
            if id(module) in parts:
                kept |= {f"{path}.{key}" for key in module.state_dict()}
    kept = {unwrapped_name(name) for name in kept}
    names = timm_names(model)
    return {names[name]: tensor for name, tensor in model.state_dict().items() if unwrapped_name(name) in kept}


def load_trained_state(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Load what `trained_state` gave, if it fits; see `check_trained_state`."""
    check_trained_state(model, tensors, source)
    own = {timm_name: name for name, timm_name in timm_names(model).items()}
    model.load_state_dict({own[name]: tensor for name, tensor in tensors.items()}, strict=False)


def check_trained_state(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Check names, shapes and owner maps against a model; ValueError names `source` and lists what does not fit."""
    state, names = model.state_dict(), timm_names(model)
    own = {names[name]: tensor for name, tensor in state.items()}
    problems = [f"missing {name}" for name in trained_state(model) if name not in tensors]
    for name, tensor in tensors.items():
        if name not in own:
            problems.append(f"unexpected {name}")
        elif own[name].shape != tensor.shape:
            problems.append(f"{name} is {list(tensor.shape)}, the model's is {list(own[name].shape)}")
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"{source} does not fit this model: {shown}")
    unwrapped = {unwrapped_name(name): timm_name for name, timm_name in names.items()}
    for path, module in model.named_modules():
        if isinstance(module, SparseProjection):
            module.check(unwrapped[unwrapped_name(f"{path}.weight")].removesuffix(".weight"), tensors)


def _prepare(model: nn.Module, config: MoSAConfig, tensors: dict[str, Tensor]) -> AdaptedModel:
    """Adapters, and a head of the file's size, for a plain model."""
    timm_model: Any = model
    own = [path for path, module in model.named_modules() if any(module is head for head in heads(model))]
    sizes = [
        tensor.shape[0]
        for name, tensor in tensors.items()
        if tensor.ndim == 2 and any(name.startswith(f"{path}.") for path in own)
    ]
    if sizes and sizes[0] != timm_model.num_classes:
        timm_model.reset_classifier(sizes[0])
    return adapt(model, config)


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy of the structure on the meta device; no data is copied."""
    copies: dict[int, object] = {}
    for parameter in model.parameters():
        copies[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    for buffer in model.buffers():
        copies[id(buffer)] = buffer.to("meta")
    return copy.deepcopy(model, copies)


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
