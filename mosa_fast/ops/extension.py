"""Finding, building and loading the CUDA C++ extension (csrc/), and why it cannot be.

It is looked for beside its sources (`MOSA_FAST_BUILD_CUDA=1 pip install --no-build-isolation -e .` puts it there), then
in the cache, and else built into the cache at first use. The version of torch is part of the file's name, so that a
mismatch is seen without loading the file.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCES = ("sparse_adapter.cu", "binding.cpp")
PREFIX = "_C_torch_"
ARCHITECTURES = "8.0;8.6;8.9;9.0+PTX"  # unless TORCH_CUDA_ARCH_LIST says otherwise
EMULATE_VARIABLE = "MOSA_FAST_EMULATE_CUDA"
BUILD_COMMAND = "MOSA_FAST_BUILD_CUDA=1 pip install --no-build-isolation -e ."
NVCC_FLAGS = ["-O3", "-std=c++20"]


def emulated() -> bool:
    """Whether a host compiler builds the kernels for the CPU (MOSA_FAST_EMULATE_CUDA=1): slow, for tests."""
    return os.environ.get(EMULATE_VARIABLE) == "1"


def unavailable_reason() -> str | None:
    """None when the extension is built for this torch or can be built, else why not, in a few words."""
    if emulated():
        return None if _host_compiler() else "there is no C++ compiler to build the emulation with"
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    found = installed()
    if found is not None:
        built_for = found.name.removeprefix(PREFIX).split(".")[0]
        if built_for != _tag():
            return (
                f"the CUDA C++ extension is built for torch {built_for}, not for the installed {_tag()}: "
                f"build it again ({BUILD_COMMAND})"
            )
        return None
    if built():
        return None
    if _nvcc() is None:
        return f"the CUDA C++ extension is not built, and there is no nvcc to build it with ({BUILD_COMMAND})"
    if shutil.which("ninja") is None:
        return "the CUDA C++ extension is not built, and there is no ninja to build it with (pip install ninja)"
    return None


def built() -> bool:
    """Whether a file for this torch is there, so that the first use need not compile."""
    found = installed()
    return (found is not None and found.name.removeprefix(PREFIX).split(".")[0] == _tag()) or _cached().exists()


def installed() -> Path | None:
    """The file that setup.py built, for whichever torch; one for this torch comes first."""
    found = [path for path in _folder().glob(f"{PREFIX}*") if path.suffix in (".so", ".pyd")]
    return min(found, key=lambda path: not path.name.startswith(f"{file_stem()}."), default=None)


@lru_cache
def operators() -> Any:
    """`torch.ops.mosa_fast_cuda`, after loading the extension and, where it is not built, building it.

    Raises:
        RuntimeError: it cannot be had; the message says why.
    """
    reason = unavailable_reason()
    if reason is not None:
        raise RuntimeError(f"backend 'cuda' cannot serve: {reason}")
    found = None if emulated() else installed()
    if found is not None:
        torch.ops.load_library(found)
    else:
        _build()
    return torch.ops.mosa_fast_cuda


@lru_cache
def _names(kind: str) -> tuple[str, ...]:
    """The names of the extension's arrays, sizes or numbers, in its order."""
    return tuple(operators().names(kind))


def zeros(kind: str) -> dict[str, int]:
    """Zero for each of the extension's "sizes" or "numbers", for an operation that takes few of them."""
    return dict.fromkeys(_names(kind), 0)


def run(operation: str, arrays: dict[str, Tensor | None], sizes: dict[str, int], numbers: Mapping[str, float]) -> None:
    """Run "prepare", "forward" or "backward" on what csrc/arguments.h lists, by name; it checks shapes and dtypes.

    An array may be left out, or be None, where the extension can do without it.

    Raises:
        RuntimeError: the extension has no such name, or misses one.
    """
    every_array = dict.fromkeys(_names("arrays")) | arrays
    ordered: list[list[Any]] = []
    for kind, given in (("arrays", every_array), ("sizes", sizes), ("numbers", numbers)):
        names = _names(kind)
        if len(given) != len(names) or any(name not in given for name in names):
            wrong = ", ".join(sorted(set(names) ^ given.keys()))
            raise RuntimeError(f"the CUDA C++ extension and Python differ in {kind}: {wrong}")
        ordered.append([given[name] for name in names])
    getattr(operators(), operation)(*ordered)


def file_stem() -> str:
    """Name of the extension's file for the installed torch, without suffix."""
    return f"{PREFIX}{_tag()}"


def _build() -> None:
    """Compile into the cache, if the cache has nothing, and load."""
    if _cached().exists():
        torch.ops.load_library(_cached())
        return
    from torch.utils import cpp_extension

    directory = _cached().parent
    directory.mkdir(parents=True, exist_ok=True)
    sources = [str(_folder() / name) for name in SOURCES]
    options: dict[str, Any] = {"extra_cuda_cflags": NVCC_FLAGS}
    if emulated():
        # A .cu is not for a host compiler; one more file that includes it is.
        wrapper = directory / "emulation.cpp"
        wrapper.write_text(f'#include "{_folder() / SOURCES[0]}"\n', encoding="utf-8")
        sources[0] = str(wrapper)
        options = {"extra_cflags": ["-O2", "-std=c++20", "-DMOSA_FAST_EMULATE"], "with_cuda": False}
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST")
    os.environ["TORCH_CUDA_ARCH_LIST"] = listed or ARCHITECTURES
    try:
        cpp_extension.load(_cached().stem, sources, build_directory=str(directory), is_python_module=False, **options)
    finally:
        if listed is None:
            del os.environ["TORCH_CUDA_ARCH_LIST"]


def _cached() -> Path:
    """Where the on-demand build lies: a folder for each torch, architecture list and state of the sources."""
    digest = hashlib.sha256(f"{emulated()} {os.environ.get('TORCH_CUDA_ARCH_LIST')}".encode())
    for path in sorted(_folder().iterdir()):
        if path.suffix in (".cu", ".cpp", ".h"):
            digest.update(path.read_bytes())
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "mosa_fast"
    suffix = ".pyd" if os.name == "nt" else ".so"  # as torch names what it builds
    return Path(root) / f"{file_stem()}_{digest.hexdigest()[:12]}" / f"{file_stem()}{suffix}"


def _folder() -> Path:
    return Path(str(files("mosa_fast.csrc")))


def _tag() -> str:
    """The installed torch, as a part of a file's name."""
    return re.sub(r"\W", "_", torch.__version__)


def _nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")


def _host_compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))
