"""`python -m mosa_fast.info`: versions, devices, and which backends can serve here, or why not."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

import mosa_fast
from mosa_fast.ops.backends import BACKENDS, get_backend, unavailable_reason


def version(package: str) -> str:
    """The installed version of a package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def devices() -> list[str]:
    """One line for every GPU that torch sees."""
    lines = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.multi_processor_count} multiprocessors, {properties.total_memory / 2**30:.0f} GiB"
        )
    return lines


def describe() -> str:
    """The whole report."""
    rows = [
        ("mosa_fast", mosa_fast.__version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("triton", version("triton")),
        ("timm", version("timm")),
        ("CUDA of torch", torch.version.cuda or torch.version.hip or "none"),
    ]
    rows += [(f"GPU {index}", line) for index, line in enumerate(devices())] or [("GPU", "none that torch can use")]
    for name in BACKENDS:
        reason = unavailable_reason(name)
        rows.append((f"backend {name}", "available" if reason is None else f"not available: {reason}"))
    rows.append(("selected", get_backend()))
    return "\n".join(f"{name:18} {value}" for name, value in rows)


if __name__ == "__main__":
    print(describe())
