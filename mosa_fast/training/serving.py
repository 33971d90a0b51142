"""What finished runs say of images: one run by its model, several by a bank on the one backbone that they have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from mosa_fast.adapters.bank import AdapterBank
from mosa_fast.methods import METHODS
from mosa_fast.training.finished_run import FinishedRun
from mosa_fast.training.model import build_backbone
from mosa_fast.training.precision import store_frozen


def serve(runs: Sequence[FinishedRun]) -> Callable[[Tensor], list[Tensor]]:
    """A function from preprocessed images `[B, 3, H, W]` to the logits `[B, classes]` of each run, float32.

    Args:
        runs: one; or several with adapters of one kind on one backbone, and the same preprocessing and precision.

    Raises:
        ValueError: weights cannot be read, or do not fit; or the runs cannot be served together.
    """
    first = runs[0]
    if len(runs) == 1:
        model = first.load_model()
        return lambda images: [first.logits(model, images)]
    bank = open_bank(runs)
    return lambda images: [first.logits(partial(bank, tasks=str(run)), images)[:, : len(run.classes)] for run in runs]


def open_bank(runs: Sequence[FinishedRun]) -> AdapterBank:
    """The backbone of runs with their adapters and heads, on the first one's device; a task is called as its folder is.

    Raises:
        ValueError: the runs do not have one backbone, adapters of one kind, one preprocessing and one precision.
    """
    first = runs[0]
    for run in runs:
        if not METHODS[run.config.method].has_adapters:
            raise ValueError(f"{run} has no adapters (method {run.config.method}): predict with one run at a time")
        for what, own, others in (
            ("preprocessing", run.preprocessing, first.preprocessing),
            ("precision", run.config.precision, first.config.precision),
            ("backbone", run.config.model.name, first.config.model.name),
        ):
            if own != others:
                raise ValueError(f"{first} and {run} do not have the same {what}: predict with one at a time")
    backbone: Any = build_backbone(first.config, len(first.classes)).requires_grad_(False)
    store_frozen(backbone, first.config.precision)
    bank = AdapterBank(backbone.to(first.device))
    for run in runs:
        bank.add(str(run), run.weights)
    return bank
