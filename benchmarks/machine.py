"""What a result depends on: the device, how fast it copies and multiplies, versions, the commit."""

from __future__ import annotations

import platform
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Work, interleaved


def environment(device: torch.device) -> dict[str, Any]:
    """Device, threads, versions, commit."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine() + " CPU",
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": commit(),
        "threads": torch.get_num_threads(),
    }


def commit() -> str:
    """The repository's commit, with a plus where files differ from it, results left out."""
    folder = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
        )
        status = ["git", "status", "--porcelain", "-uno", "--", ":/", ":(top,exclude)benchmarks/results"]
        dirty = subprocess.run(status, cwd=folder, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def speeds(device: torch.device) -> dict[str, float]:
    """What the roofline is made of: measured speed of copying and of multiplying matrices, GB/s and TFLOP/s."""
    gpu = device.type == "cuda"
    nbytes, size = (2**32, 8192) if gpu else (2**28, 1024)
    copy = interleaved({"copy": copy_of(nbytes, device)}, device, repeats=10)["copy"]
    found = {"copy_gb_per_s": round(nbytes / copy.median / 1e6, 1)}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        if name == "bf16" and not gpu:
            continue
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        product = interleaved({"product": Work(partial(torch.matmul, a, b))}, device, repeats=10)["product"]
        found[f"{name}_tflop_per_s"] = round(2 * size**3 / product.median / 1e9, 3)
    return found


def copy_of(nbytes: int, device: torch.device) -> Work:
    """A copy that moves `nbytes`: half of them are read, half are written."""
    source = torch.empty(max(1, nbytes // 2), dtype=torch.int8, device=device)
    return Work(partial(torch.empty_like(source).copy_, source))
