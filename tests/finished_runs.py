"""Finished runs for whatever is done with a run after its end; each trains for a few seconds."""

from __future__ import annotations

from typing import Any

from mosa_fast.config import DataConfig, OptimConfig
from mosa_fast.run_folder import RunFolder


def finished_run(out: Any, **changes: Any) -> RunFolder:
    """Train a ViT of 5 tokens on 50 digits; its folder."""
    from tiny_runs import tiny_run  # which imports torch

    from mosa_fast.training.loop import train

    settings = {
        "data": DataConfig(shots=5, image_size=32),
        "optim": OptimConfig(lr=1e-2, epochs=6, warmup_epochs=0, batch_size=16),
    }
    train(tiny_run(out, **settings | changes), progress=False)
    return RunFolder(out)


def short_run(out: Any, **changes: Any) -> RunFolder:
    """A run that is finished, whatever it has learned in one epoch; it was not tested."""
    optim = OptimConfig(epochs=1, warmup_epochs=0, batch_size=16)
    return finished_run(out, **{"optim": optim, "test": False} | changes)
