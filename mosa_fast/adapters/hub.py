"""Adapters as a folder to share, on a disk or on the Hugging Face Hub (docs/sharing.md).

The folder holds the adapter file, which is all that loading reads, and for people and the Hub a few facts as JSON and
a model card.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from mosa_fast.adapters.adapter_file import read_adapter, save_adapter, trained_state
from mosa_fast.adapters.metadata import read_metadata
from mosa_fast.adapters.model_card import model_card
from mosa_fast.backbones.identity import make_again
from mosa_fast.files import write_text
from mosa_fast.nn.mixture import adapters
from mosa_fast.run_folder import RunFolder

ADAPTER = RunFolder("").adapter.name  # so that the folder of a run can be loaded, too
CONFIG = "config.json"
CARD = "README.md"


def save_pretrained(model: nn.Module, folder: str | Path, run: str | Path | None = None, name: str = "") -> None:
    """Write a folder to share; see `AdaptedModel.save_pretrained`.

    Args:
        model: adapted; it may be wrapped.
        folder: made where it is not there; other files in it stay.
        run: folder of the run that trained it.
        name: what the model card says that the model is loaded by; the folder's own path where it is empty.

    Raises:
        ValueError: the model has no adapters, or `run` is not the folder of a finished run, or trained another model;
            nothing is written then.
        OSError: a file cannot be written.
    """
    folder = Path(folder)
    summary = None if run is None else _summary_of(model, RunFolder(run))
    save_adapter(model, folder / ADAPTER)
    metadata = read_metadata(folder / ADAPTER)
    facts = {
        "library_name": "mosa_fast",
        "library_version": metadata.versions["mosa_fast"],
        "backbone": metadata.backbone,
        "config": metadata.config.to_dict(),
    }
    write_text(folder / CONFIG, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    write_text(folder / CARD, model_card(metadata, name or str(folder), summary))


def find_pretrained(
    name_or_folder: str | Path,
    backbone: nn.Module | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
) -> tuple[Path, nn.Module]:
    """The adapter file of a folder or of a repository on the Hub, and its backbone, made if it is not given; see
    `AdaptedModel.from_pretrained`.
    """
    path = _adapter_file(name_or_folder, revision, token)
    metadata = read_metadata(path)
    if backbone is None:
        if not metadata.can_make_backbone:
            raise ValueError(f"{name_or_folder} does not say how its backbone is made: give the backbone")
        assert metadata.backbone is not None
        assert metadata.backbone_arguments is not None
        # The file's own head has another size, as a rule, and load_adapter makes room for it.
        backbone = make_again(metadata.backbone, metadata.backbone_arguments, len(metadata.classes or [0]))
    return path, backbone


def push_to_hub(
    model: nn.Module,
    repository: str,
    *,
    run: str | Path | None = None,
    private: bool = False,
    token: str | None = None,
    commit_message: str = "Adapters of mosa_fast",
) -> str:
    """Upload a model to the Hub; see `AdaptedModel.push_to_hub`."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    made = api.create_repo(repository, private=private, exist_ok=True)  # puts the user's name before a bare one
    with TemporaryDirectory() as folder:
        save_pretrained(model, folder, run, name=made.repo_id)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message=commit_message)
    return str(made)


def _summary_of(model: nn.Module, run: RunFolder) -> dict[str, Any]:
    """The numbers of the run that trained a model; ValueError where it is not finished or trained another."""
    config = next(adapters(model)).config
    if not run.is_finished:
        raise ValueError(f"{run} is not the folder of a finished run")
    if not run.adapter.is_file():
        raise ValueError(f"{run} did not train this model: it has no {run.adapter.name}")
    tensors, metadata = read_adapter(run.adapter)
    own = trained_state(model)
    different = sorted(own.keys() ^ tensors.keys())
    different += [name for name in own if name in tensors and not _same(own[name].detach().cpu(), tensors[name])]
    if metadata.config.to_dict() != config.to_dict():  # what changes no result may be another
        different.insert(0, "the configuration of the adapters")
    if different:
        more = f" and {len(different) - 1} more" if len(different) > 1 else ""
        raise ValueError(f"{run} did not train this model: they differ in {different[0]}{more}")
    return run.read_summary()


def _same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have the same values, but for what one of them lost in a shorter dtype."""
    return torch.equal(first, second.to(first.dtype)) or torch.equal(first.to(second.dtype), second)


def _adapter_file(name_or_folder: str | Path, revision: str | None, token: str | None) -> Path:
    path = Path(name_or_folder)
    if path.exists():
        if path.is_dir() and RunFolder(path).is_unfinished:
            raise ValueError(f"{path} holds an unfinished run: go on with it (--resume) before its adapters are loaded")
        return path / ADAPTER if path.is_dir() else path
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(str(name_or_folder), ADAPTER, revision=revision, token=token))
    except Exception as error:  # the hub's client raises errors of many kinds, and not all of them are public
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{name_or_folder} is no folder, and the Hub does not give its {ADAPTER}: {reason}") from None
