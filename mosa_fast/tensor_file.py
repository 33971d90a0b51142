"""Files of named tensors (safetensors), written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mosa_fast.files import write_atomically


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as a file can hold them: on the CPU, contiguous, without a graph."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def write_tensors(path: Path, tensors: Mapping[str, Tensor], texts: dict[str, str] | None = None) -> None:
    """Write tensors, and texts about them; it raises what `write_atomically` does."""
    copies = on_cpu(tensors)
    write_atomically(path, lambda temporary: save_file(copies, temporary, texts))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The inverse of `write_tensors`, without the texts.

    Raises:
        ValueError: it cannot be read; the message names the file.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
