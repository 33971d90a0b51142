"""What contenders are given and what they are: a batch in two forms, and a model as one way of working trains it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from benchmarks.models import Inputs
from benchmarks.plain import gradient
from benchmarks.spec import VIEWS, Level
from mosa_fast.adapters.model import AdaptedModel
from mosa_fast.adapters.placements import repeat_batch
from mosa_fast.nn.mixture import MixtureLayer


class Batch:
    """The same data in two forms, so that nobody pays for cutting or joining it.

    Attributes:
        joined: for one pass over both views: tokens `[2 B, T, D]`, view after view; or images `[B, 3, H, W]`.
        views: for a pass of each view: tokens `[B, T, D]`, or the same images twice; made when first asked for.
    """

    def __init__(self, joined: Inputs, level: Level) -> None:
        self.joined, self.level = joined, level

    @cached_property
    def views(self) -> tuple[Inputs, ...]:  # noqa: D102  # see the class
        if self.level == "model":
            return (self.joined,) * VIEWS
        halves = zip(*(tensor.detach().chunk(VIEWS) for tensor in self.joined), strict=True)
        return tuple(tuple(half.clone().requires_grad_() for half in view) for view in halves)

    def repeated(self) -> Inputs:
        """Both views in one batch from their beginning."""
        return tuple(repeat_batch(x, VIEWS) for x in self.joined) if self.level == "model" else self.joined

    def tensors(self) -> list[Tensor]:
        """Whatever may have got a gradient."""
        views = self.__dict__.get("views", ())
        return [*self.joined, *(tensor for view in views for tensor in view)]


class Copied(Protocol):
    """A plain module that stands for one of our layers."""

    def gradients(self) -> dict[str, Tensor]:
        """By the names and in the shapes of our layer's parameters."""


@dataclass
class Learner:
    """A model as one way of working trains and evaluates it, at one level.

    Attributes:
        module: everything, for its parameters.
        train: a batch and a step number to outputs: one tensor for all views, or one for each.
        evaluate: images to logits `[B, classes]`.
        mixture: what its results must equal.
        truth: where there is no mixture, makes what its results must equal, in float32; None where the mathematics is
            another, and only finite results are asked.
        adapters: those whose gradients are compared.
        views: that a batch is passed in.
        separate: has a pass for each view.
        route: makes the views take given experts, int32 `[blocks, V, 2]`; None: their draw follows from the step.
        after_backward: what is done to the gradients before the optimizer's step.
        prepare_evaluation: what is done once before evaluation.
    """

    module: nn.Module
    train: Callable[[Batch, int], tuple[Tensor, ...]]
    evaluate: Callable[[Tensor], Tensor]
    mixture: AdaptedModel | None = None
    truth: Callable[[], Learner] | None = None
    adapters: Sequence[MixtureLayer | Copied] = ()
    views: int = VIEWS
    separate: bool = False
    route: Callable[[Tensor], None] | None = None
    after_backward: Callable[[], None] = lambda: None
    prepare_evaluation: Callable[[], None] = lambda: None

    def trained(self) -> list[nn.Parameter]:
        """Parameters that the optimizer updates."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def gradients(self) -> dict[str, Tensor]:
        """Of the adapters' weights, by layer and name, in our layers' shapes; without adapters, of all as one."""
        if self.adapters:
            return {
                f"{index}.{name}": value
                for index, adapter in enumerate(self.adapters)
                for name, value in _gradients(adapter).items()
            }
        return {"gradients": torch.cat([gradient(parameter).flatten() for parameter in self.trained()])}


def _gradients(adapter: MixtureLayer | Copied) -> dict[str, Tensor]:
    if isinstance(adapter, MixtureLayer):
        return {name: gradient(parameter) for name, parameter in adapter.named_parameters()}
    return adapter.gradients()
