"""What an adapter file says about itself, besides the weights: safetensors' metadata, one text a key."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open

from mosa_fast.backbones import embedded
from mosa_fast.backbones.fingerprint import Fingerprint
from mosa_fast.config import MoSAConfig
from mosa_fast.data.preprocessing import Preprocessing
from mosa_fast.version import __version__

FORMAT = "mosa_fast.adapter.1"


@dataclass(frozen=True)
class Metadata:
    """The facts of an adapter file; all but the configuration are None or empty where the file does not have them.

    Attributes:
        config: of the adapters.
        backbone: its name, as timm.create_model takes it, or "embedded".
        backbone_arguments: what else it was made with by timm.create_model, without the number of classes; None: that
            is not known.
        fingerprint: of the frozen backbone.
        classes: their names, by label.
        preprocessing: what evaluation does to an image.
        versions: see `versions`, when it was written.
    """

    config: MoSAConfig
    backbone: str | None = None
    backbone_arguments: dict[str, Any] | None = None
    fingerprint: Fingerprint | None = None
    classes: list[str] | None = None
    preprocessing: Preprocessing | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def can_make_backbone(self) -> bool:
        """Whether it is known how timm makes the backbone (or that it is the embedded one)."""
        known = self.backbone == embedded.NAME or (self.backbone is not None and timm.is_model(self.backbone))
        return known and self.backbone_arguments is not None

    def to_dict(self) -> dict[str, Any]:
        """The facts that there are, as JSON can hold them."""
        values = {
            "format": FORMAT,
            "config": self.config.to_dict(),
            "backbone": self.backbone,
            "backbone_arguments": self.backbone_arguments,
            "fingerprint": self.fingerprint and self.fingerprint.to_text(),
            "classes": self.classes,
            "preprocessing": self.preprocessing and self.preprocessing.to_dict(),
            "versions": self.versions,
        }
        return {name: value for name, value in values.items() if value is not None}

    def to_texts(self) -> dict[str, str]:
        """As safetensors keeps it: texts stay as they are, the rest becomes JSON."""
        values = self.to_dict().items()
        return {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in values}

    @classmethod
    def from_texts(cls, texts: Mapping[str, str], source: str) -> Metadata:
        """The inverse of `to_texts`; files of earlier versions have format and config only.

        Raises:
            ValueError: it is not of an adapter file of this version, or broken; the message names `source`.
        """
        if texts.get("format") != FORMAT:
            raise ValueError(
                f"{source} is not an adapter file of this version ({texts.get('format')!r}, not {FORMAT!r})"
            )
        if "config" not in texts:
            raise ValueError(f"{source} is broken: its metadata have no config")
        values: dict[str, Any] = {}
        for name, text in texts.items():
            if name in _READERS:
                try:
                    values[name] = _READERS[name](text)
                except (ValueError, TypeError, RecursionError) as error:  # JSONDecodeError is a ValueError
                    raise ValueError(
                        f"{source} is broken: the {name} in its metadata cannot be read: {error}"
                    ) from None
        return cls(**values)


def versions() -> dict[str, str]:
    """Versions of everything that the numbers depend on."""
    return {
        "mosa_fast": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
    }


def read_metadata(path: str | Path) -> Metadata:
    """The metadata of an adapter file; no tensor is read.

    Raises:
        ValueError: it is not an adapter file of this version, or broken.
        FileNotFoundError: there is no such file.
    """
    with open_adapter(Path(path)) as handle:
        return Metadata.from_texts(handle.metadata() or {}, str(path))


def open_adapter(path: Path) -> Any:
    """The open safetensors file, a context manager; it raises what `read_metadata` does."""
    if not path.is_file():
        raise FileNotFoundError(f"no adapter file at {path}")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _dictionary(text: str) -> dict[str, Any]:
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError(f"it must be a dictionary, got {text[:40]}")
    return values


def _config(text: str) -> MoSAConfig:
    return MoSAConfig.from_dict(_dictionary(text))


def _classes(text: str) -> list[str]:
    values = json.loads(text)
    if not isinstance(values, list) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"it must be a list of names, got {text[:40]}")
    return values


def _preprocessing(text: str) -> Preprocessing:
    return Preprocessing(**_dictionary(text))


_READERS: dict[str, Callable[[str], Any]] = {
    "config": _config,
    "backbone": str,
    "backbone_arguments": _dictionary,
    "fingerprint": Fingerprint.from_text,
    "classes": _classes,
    "preprocessing": _preprocessing,
    "versions": _dictionary,
}
