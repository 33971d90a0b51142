"""Which implementation serves the operators: `reference` (plain PyTorch), `triton`, `cuda`, or `auto`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

BACKENDS = ("reference", "triton", "cuda")
ENVIRONMENT_VARIABLE = "MOSA_FAST_BACKEND"

_selected: str | None = None  # None: what the environment variable says, else auto


def set_backend(name: str) -> None:
    """Choose the backend of every operator for the whole process.

    Args:
        name: "reference", "triton", "cuda", or "auto": triton on a GPU where it works, else cuda where it is
            built, else reference.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: it cannot serve here; the message says why.
    """
    global _selected
    _check(name)
    _selected = name


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Use one backend inside a `with` block; see `set_backend`."""
    global _selected
    previous = _selected
    set_backend(name)
    try:
        yield
    finally:
        _selected = previous


def get_backend() -> str:
    """The name asked for: by `set_backend`, else by MOSA_FAST_BACKEND, else "auto"."""
    if _selected is not None:
        return _selected
    name = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"{ENVIRONMENT_VARIABLE} must be one of {_choices()}, got {name!r}")
    return name


def resolve_backend(device: torch.device, dtype: torch.dtype) -> str:
    """The backend that serves tensors of this device and dtype.

    Raises:
        RuntimeError: a backend was asked for by name and cannot serve them.
    """
    name = get_backend()
    if name == "auto":
        if device.type != "cuda" or dtype == torch.float64:
            return "reference"
        return next((b for b in ("triton", "cuda") if unavailable_reason(b) is None), "reference")
    reason = unavailable_reason(name)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot serve: {reason}")
    return name


def unavailable_reason(name: str) -> str | None:
    """None when the backend can serve on this machine, else why not, in a few words."""
    if name == "reference":
        return None
    return f"this version has no {name} kernels"


def _check(name: str) -> None:
    if name == "auto":
        return
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {_choices()}, got {name!r}")
    reason = unavailable_reason(name)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot serve: {reason}")


def _choices() -> str:
    return ", ".join(("auto", *BACKENDS))
