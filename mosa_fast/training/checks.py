"""What a run can be refused for, or warned of, before it has read or written anything."""

from __future__ import annotations

import os
import sys
from dataclasses import replace

import torch

from mosa_fast.config import TrainConfig
from mosa_fast.methods import METHODS
from mosa_fast.ops.backends import resolve_backend

HALF = ("bf16-mixed", "bf16-true")


def check_backend(config: TrainConfig, device: torch.device) -> None:
    """Raise ValueError where the backend that MOSA_FAST_BACKEND asks for cannot serve a run's adapters."""
    method = METHODS[config.method]
    if method.adapters is not None:
        adapter = replace(config.adapter, **method.adapters)
        resolve_backend(device, torch.float32, f"sparse_{adapter.method}")


def check_loggers(config: TrainConfig) -> None:
    """Raise ValueError where a run is to log with a package that is not there: before it replaces another one."""
    if config.wandb is not None:
        try:
            import wandb  # noqa: F401
        except ImportError:
            raise ValueError("wandb is not installed: pip install wandb, or leave the option out") from None


def notes(config: TrainConfig, device: torch.device) -> list[str]:
    """What will be slow, in a line each."""
    found = []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if config.data.workers > cores and config.data.name != "digits":
        found.append(f"data.workers {config.data.workers}: this machine has {cores} cores for them")
    if device.type == "cpu" and config.precision in HALF and not cpu_has_bf16():
        found.append(f"precision {config.precision}: this CPU has no bfloat16 arithmetic, fp32 is many times faster")
    return found


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 itself; True where torch cannot tell."""
    asked = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    if "x86" not in os.uname().machine or None in asked:
        return True
    return any(question() for question in asked)  # type: ignore[misc]


def print_notes(config: TrainConfig, device: torch.device) -> None:
    """Say them on standard error."""
    for line in notes(config, device):
        print(f"note: {line}", file=sys.stderr, flush=True)
