"""Which implementation serves the operators: `reference` (plain PyTorch), `triton`, `cuda`, or `auto`."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TypeVar

import torch

from mosa_fast.ops import extension

BACKENDS = ("reference", "triton", "cuda")
# The operators that a backend has launchers for. The reference serves all others without (autograd differentiates
# it), and prepares no weights.
KERNELS = {
    "reference": ("adapted_mlp",),
    "triton": ("sparse_adapter", "prepare_weights", "sparse_lora", "adapter_bank"),
    "cuda": ("sparse_adapter", "prepare_weights"),
}
ENVIRONMENT_VARIABLE = "MOSA_FAST_BACKEND"
LEAST_CAPABILITY = (8, 0)  # Ampere: bfloat16 tensor cores and asynchronous copies

_selected: str | None = None  # None: what the environment variable says, else auto


_F = TypeVar("_F", bound=Callable[..., object])


def _constant(function: _F) -> _F:
    """Tell torch.compile that the answer stays the same within a process: it cannot trace the question.

    What torch.compiler.assume_constant_result does, without its import of the compiler (1.5 s).
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class UnavailableBackend(RuntimeError, ValueError):
    """A backend that was asked for cannot serve here: nothing is broken, a command line says so in one line."""


def set_backend(name: str) -> None:
    """Choose the backend of every operator for the whole process.

    Args:
        name: "reference", "triton", "cuda", or "auto": triton on a GPU where it works, else cuda where it is
            built, else reference.

    Raises:
        ValueError: there is no such backend.
        UnavailableBackend: it cannot serve here; the message says why. It is a RuntimeError.
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


def resolve_backend(device: torch.device, dtype: torch.dtype, operator: str) -> str:
    """The backend that serves an operator on tensors of this device and dtype.

    Raises:
        UnavailableBackend: a backend was asked for by name and cannot serve them.
    """
    name = get_backend()
    if name == "auto":
        if device.type != "cuda" or dtype == torch.float64:
            return "reference"
        return _automatic(operator)
    reason = unavailable_reason(name) or _unserved(name, device, dtype, operator)
    if reason is not None:
        raise UnavailableBackend(f"backend {name!r} cannot serve: {reason}")
    return name


@_constant
def _automatic(operator: str) -> str:
    """What `auto` picks on a GPU: nothing that would have to be compiled for minutes first."""
    if operator in KERNELS["triton"] and unavailable_reason("triton") is None:
        return "triton"
    if operator in KERNELS["cuda"] and unavailable_reason("cuda") is None and extension.built():
        return "cuda"
    return "reference"


@_constant
def unavailable_reason(name: str) -> str | None:
    """None when the backend can serve on this machine, else why not, in a few words."""
    return _unavailable_reason(name)


@lru_cache
def _unavailable_reason(name: str) -> str | None:
    if name == "reference":
        return None
    if name == "cuda":
        return extension.unavailable_reason() or _unfit_device(emulated(), "")
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return _unfit_device(interpreted(), ", and TRITON_INTERPRET=1 is not set")


def _unfit_device(on_cpu: bool, otherwise: str) -> str | None:
    """Why the devices that are visible do not do for kernels."""
    if on_cpu:
        return None
    if not torch.cuda.is_available():
        return f"no GPU is visible{otherwise}"
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability()
        if capability < LEAST_CAPABILITY:
            return f"compute capability {_dotted(capability)} is below {_dotted(LEAST_CAPABILITY)}"
    return None


@_constant
def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU instead of compiling them: slow, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@_constant
def emulated() -> bool:
    """Whether the CUDA C++ kernels are emulated on the CPU instead of being compiled for a GPU: slow, for tests."""
    return extension.emulated()


def _unserved(name: str, device: torch.device, dtype: torch.dtype, operator: str) -> str | None:
    """Why an available backend does not serve an operator on tensors of this device and dtype."""
    if name == "reference":
        return None
    if operator not in KERNELS[name]:
        others = ", ".join(other for other in BACKENDS if other == "reference" or operator in KERNELS[other])
        return f"it has no kernels for {operator}; use one of {others}"
    if dtype == torch.float64:
        return "float64 is for the reference backend"
    if device.type != "cuda" and not (interpreted() if name == "triton" else emulated()):
        return f"it takes tensors on a GPU, these are on {device}"
    return None


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(str(part) for part in version)


def _check(name: str) -> None:
    if name == "auto":
        return
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {_choices()}, got {name!r}")
    reason = unavailable_reason(name)
    if reason is not None:
        raise UnavailableBackend(f"backend {name!r} cannot serve: {reason}")


def _choices() -> str:
    return ", ".join(("auto", *BACKENDS))
