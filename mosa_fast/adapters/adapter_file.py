"""Adapter files: what was trained, with owner maps, as safetensors; the frozen backbone is not in them.

Tensors are named as timm names the modules they belong to, whatever wraps these: `blocks.0.adapter.down.weight`.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mosa_fast.adapters.block import AdaptedBlock
from mosa_fast.adapters.metadata import Metadata, open_adapter, versions
from mosa_fast.adapters.wrapper import Wrapper, unwrapped, unwrapped_name
from mosa_fast.backbones.fingerprint import Fingerprint
from mosa_fast.backbones.heads import classifiers
from mosa_fast.backbones.identity import arguments_of, name_of
from mosa_fast.data.preprocessing import Preprocessing
from mosa_fast.nn import SparseProjection
from mosa_fast.nn.mixture import adapters
from mosa_fast.tensor_file import on_cpu, write_tensors

DIGEST = "sha256"  # the key of the metadata that tells a damaged file


def save_adapter(model: nn.Module, path: str | Path) -> None:
    """Write adapters (weights, W0, owner maps), head and anything else that is trained to a safetensors file.

    With them goes what tells where they belong, and what they are for (`mosa_fast.adapters.metadata`): configuration,
    name and fingerprint of the backbone, `model.classes` and `model.preprocessing` where they are set, versions.

    Args:
        model: adapted; it may be wrapped by torch.compile or DistributedDataParallel.
        path: the file; written whole or not at all.

    Raises:
        ValueError: the model has no adapters; its `classes` are not a name for each output, or its `preprocessing` is
            none; or the path is that of something else than a regular file.
        OSError: the file cannot be written.
    """
    model = unwrapped(model)
    tensors = on_cpu(trained_state(model))
    texts = metadata_of(model, tensors).to_texts()
    texts[DIGEST] = content_digest(tensors, texts)
    write_tensors(Path(path), tensors, texts)


def metadata_of(model: Any, trained: Container[str]) -> Metadata:
    """What an adapter file of a model says about itself.

    Args:
        model: adapted.
        trained: timm names of what the file holds.

    Raises:
        ValueError: its classes or preprocessing are such that nobody could load the file.
    """
    preprocessing = getattr(model, "preprocessing", None)
    if not isinstance(preprocessing, Preprocessing | None):
        raise ValueError(f"model.preprocessing must be a Preprocessing or None, got {preprocessing!r}")
    return Metadata(
        next(adapters(model)).config,
        backbone=name_of(model),
        backbone_arguments=arguments_of(model),
        fingerprint=Fingerprint.of(frozen_parameters(model, trained)),
        classes=_class_names(model),
        preprocessing=preprocessing,
        versions=versions(),
    )


def read_adapter(path: Path) -> tuple[dict[str, Tensor], Metadata]:
    """What an adapter file holds, by timm name, and what it says of itself; it raises what `read_metadata` does."""
    with open_adapter(path) as handle:
        texts = handle.metadata() or {}
        metadata = Metadata.from_texts(texts, str(path))
        tensors: dict[str, Tensor] = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    # Files of earlier versions have neither versions nor a digest.
    if (metadata.versions or DIGEST in texts) and texts.get(DIGEST) != content_digest(tensors, texts):
        raise ValueError(f"{path} is broken: its contents are not what was written (sha256)")
    return tensors, metadata


def content_digest(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> str:
    """Of everything in a file but itself, whatever the order."""
    found = hashlib.sha256(json.dumps(sorted((k, v) for k, v in texts.items() if k != DIGEST)).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def check_adapter(
    candidate: nn.Module, backbone: nn.Module, tensors: dict[str, Tensor], metadata: Metadata, source: str
) -> None:
    """Check what an adapter file holds.

    Args:
        candidate: a model as it describes, which need not have data (`prepare`).
        backbone: what it is to be put on, adapted or not.
        tensors, metadata: the file's.
        source: what messages call it.

    Raises:
        ValueError: tensors, classes or the weights of the backbone do not fit.
    """
    check_trained_state(candidate, tensors, source)
    _check_classes(candidate, metadata, source)
    _check_backbone(backbone, tensors, metadata, source)


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
    if any(isinstance(module, AdaptedBlock) for module in model.modules()):
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
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{source} does not fit this model: {'; '.join(problems[:8])}{more}")
    timm_name_of = _timm_names_of_parameters(model)
    for path, module in model.named_modules():
        if isinstance(module, SparseProjection):
            module.check(timm_name_of[unwrapped_name(f"{path}.weight")].removesuffix(".weight"), tensors)


def frozen_parameters(model: nn.Module, trained: Container[str]) -> dict[str, Tensor]:
    """The parameters of a model's backbone by timm name, without those that are `trained` (heads, as a rule)."""
    timm_name_of = _timm_names_of_parameters(model)
    parameters = model.named_parameters(remove_duplicate=False)
    found = {timm_name_of[unwrapped_name(name)]: parameter for name, parameter in parameters}
    return {name: parameter for name, parameter in found.items() if name not in trained}


def keep_training(model: nn.Module, trained: Container[str]) -> None:
    """What was trained of the backbone is trained on, and saved again: a norm, say."""
    timm_name_of = _timm_names_of_parameters(model)
    for name, parameter in model.named_parameters():
        if timm_name_of[unwrapped_name(name)] in trained:
            parameter.requires_grad_(True)


def _timm_names_of_parameters(model: nn.Module) -> dict[str, str]:
    """As `timm_names`, by names without wrappers: checkpointing's takes itself out of a state_dict's names alone."""
    return {unwrapped_name(name): timm_name for name, timm_name in timm_names(model).items()}


def _check_backbone(model: nn.Module, tensors: dict[str, Tensor], metadata: Metadata, source: str) -> None:
    if metadata.fingerprint is None:
        return  # a file of an earlier version
    different = metadata.fingerprint.differences(frozen_parameters(model, tensors))
    if different:
        raise ValueError(
            f"{source} was trained on another backbone: on {metadata.backbone or 'one without a name'}, and this is "
            f"{name_of(model) or 'one without a name'} with other weights in {shown(different)}"
        )


def _class_names(model: Any) -> list[str] | None:
    names, outputs = getattr(model, "classes", None), getattr(model, "num_classes", None)
    if names is None:
        return None
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"model.classes must be a list of names, by label, or None, got {str(names)[:60]}")
    if outputs is not None and len(names) != outputs:
        raise ValueError(f"model.classes must have {outputs} names, one for each output, got {len(names)}")
    return list(names)


def _check_classes(model: Any, metadata: Metadata, source: str) -> None:
    if metadata.classes is not None and len(metadata.classes) != model.num_classes:
        raise ValueError(f"{source} is broken: it names {shown(metadata.classes)}, its head has {model.num_classes}")


def shown(names: Sequence[str] | None) -> str:
    """A list of names, cut short: "3 classes" say less than which."""
    names = names or []
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def without_data(model: nn.Module) -> nn.Module:
    """A copy of the structure on the meta device; no data is copied."""
    copies: dict[int, object] = {}
    for parameter in model.parameters():
        copies[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    for buffer in model.buffers():
        copies[id(buffer)] = buffer.to("meta")
    return copy.deepcopy(model, copies)
