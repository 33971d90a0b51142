"""Accuracy of the merged model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from mosa_fast.backbones.frozen import set_training
from mosa_fast.config import Precision
from mosa_fast.data.loading import batches
from mosa_fast.training.distributed import Ranks
from mosa_fast.training.precision import autocast, input_dtype
from mosa_fast.training.signals import StopAsked, StopSignals

BATCH_FACTOR = 4  # evaluation keeps no activations, so its batches can be larger than the steps'


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DataLoader[Any],
    ranks: Ranks,
    precision: Precision = "fp32",
    stop: StopSignals | None = None,
) -> float:
    """Accuracy in percent, over all processes' images; leaves the model in the mode it was in.

    Args:
        model: on the ranks' device.
        loader: this process's images.
        ranks: the processes.
        precision: of the run.
        stop: looked at between batches, where there is one process.

    Raises:
        StopAsked: a signal came; there is no number.
    """
    training = model.training
    set_training(model, False)
    # BatchNorm that is trained has learned other statistics in every process; the first one's are saved.
    ranks.agree(b for m in model.modules() if isinstance(m, _BatchNorm) for b in m.buffers())
    counts = torch.zeros(2, dtype=torch.int64, device=ranks.device)
    try:
        for batch in batches(loader):
            if stop is not None and stop.received is not None and ranks.world == 1:
                raise StopAsked
            images = batch.images.to(ranks.device, input_dtype(precision), non_blocking=True)
            with autocast(precision, ranks.device):
                logits = model(images)
            correct = (logits.argmax(1) == batch.labels.to(ranks.device, non_blocking=True)).sum()
            counts += torch.stack([correct, torch.full_like(correct, batch.count)])
    finally:
        set_training(model, training)
    correct, seen = ranks.sum(counts).tolist()
    return 100 * correct / max(1, seen)
