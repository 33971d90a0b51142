"""What the merged model does on images that it was not trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from mosa_fast.backbones.frozen import set_training
from mosa_fast.config import Precision
from mosa_fast.data.loading import batches
from mosa_fast.training.distributed import Ranks
from mosa_fast.training.precision import autocast, input_dtype
from mosa_fast.training.signals import StopAsked, StopSignals

BATCH_FACTOR = 4  # evaluation keeps no activations, so its batches can be larger than the steps'
TOP = 5
MOST_CONFUSED = 2000  # classes: with more, a table of all pairs takes too much memory, and nobody can read it


@dataclass(frozen=True)
class Scores:
    """Of a model, over the images of all processes.

    Attributes:
        accuracy: in percent.
        loss: mean cross-entropy.
        top5: percentage of images whose class is among the five most probable; None where there are no more than five.
        confusion: int64 `[C, C]`, images of the class of a row that were taken for that of a column; None where it was
            not asked for or there are too many classes.
    """

    accuracy: float
    loss: float
    top5: float | None = None
    confusion: Tensor | None = None

    def named(self, part: str) -> dict[str, float]:
        """The numbers as metrics and summary call them, as "val_accuracy"."""
        numbers = {f"{part}_accuracy": self.accuracy, f"{part}_loss": self.loss}
        return numbers if self.top5 is None else numbers | {f"{part}_top5": self.top5}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DataLoader[Any],
    ranks: Ranks,
    classes: int,
    precision: Precision = "fp32",
    stop: StopSignals | None = None,
    *,
    confusion: bool = False,
) -> Scores:
    """The scores over all processes' images; leaves the model in the mode it was in.

    Args:
        model: on the ranks' device.
        loader: this process's images.
        ranks: the processes.
        classes: how many there are.
        precision: of the run.
        stop: looked at between batches, where there is one process.
        confusion: count which class is taken for which, too.

    Raises:
        StopAsked: a signal came; there are no scores.
    """
    training = model.training
    set_training(model, False)
    # BatchNorm that is trained has learned other statistics in every process; the first one's are saved.
    ranks.agree(b for m in model.modules() if isinstance(m, _BatchNorm) for b in m.buffers())
    confusion = confusion and classes <= MOST_CONFUSED
    counts = torch.zeros(3, dtype=torch.int64, device=ranks.device)  # right, among the first five, images
    loss = torch.zeros((), dtype=torch.float64, device=ranks.device)
    pairs = torch.zeros(classes**2 if confusion else 0, dtype=torch.int64, device=ranks.device)
    try:
        for batch in batches(loader):
            if stop is not None and stop.received is not None and ranks.world == 1:
                raise StopAsked
            images = batch.images.to(ranks.device, input_dtype(precision), non_blocking=True)
            labels = batch.labels.to(ranks.device, non_blocking=True)
            with autocast(precision, ranks.device):
                logits = model(images)
            predicted = logits.argmax(1)
            correct = (predicted == labels).sum()
            among = (logits.topk(min(TOP, classes), 1).indices == labels[:, None]).any(1).sum()
            counts += torch.stack([correct, among, torch.full_like(correct, batch.count)])
            loss += F.cross_entropy(logits.float(), labels, reduction="sum")
            if confusion:
                pairs.index_add_(0, labels * classes + predicted, torch.ones_like(labels))
    finally:
        set_training(model, training)
    right, among_five, seen = ranks.sum(counts).tolist()
    seen = max(1, seen)
    return Scores(
        100 * right / seen,
        ranks.sum(loss).item() / seen,
        100 * among_five / seen if classes > TOP else None,
        ranks.sum(pairs).view(classes, classes).cpu() if confusion else None,
    )
