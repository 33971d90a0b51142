"""Models with our layers as learners: adapters and low-rank pairs, and what the other methods of a run train."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import models
from benchmarks.learner import Batch, Learner
from benchmarks.models import Setting
from benchmarks.spec import CONFIG, VIEWS, Level
from mosa_fast.adapters.int8 import quantise_backbone
from mosa_fast.adapters.model import AdaptedModel
from mosa_fast.backbones.fingerprint import is_quantised
from mosa_fast.config import MoSAConfig
from mosa_fast.methods import Method
from mosa_fast.nn.mixture import adapters
from mosa_fast.ops import backend
from mosa_fast.ops.backends import BACKENDS, KERNELS, unavailable_reason


def ours(
    setting: Setting,
    backend_name: str,
    *,
    config: MoSAConfig = CONFIG,
    views: int = VIEWS,
    compiled: bool = False,
    together: bool = True,
) -> Learner:
    """Our layers on a backend; together: the views of a model run their beginning in common."""
    mixture = setting.mixture(config)
    model = setting.stored(mixture)
    return mixture_learner(
        model, mixture, setting.level, backend_name, views=views, compiled=compiled, together=together
    )


def mixture_learner(
    model: AdaptedModel,
    mixture: AdaptedModel,
    level: Level,
    backend_name: str,
    *,
    views: int = VIEWS,
    compiled: bool = False,
    together: bool = True,
) -> Learner:
    """A model with our layers that must compute what the mixture does."""
    part = models.part_of(model, level)
    run: Any = torch.compile(part, dynamic=False) if compiled else part
    device, draws = next(model.parameters()).device, 0 if level == "model" else models.DRAWS
    routings = [models.draw_step(model, step, device, views) for step in range(draws)]

    def train(batch: Batch, step: int) -> tuple[Tensor, ...]:
        with backend(backend_name):
            if level != "model":
                return (models.run_part(model, run, level, batch.joined, routings[step % draws]),)
            run_model = models.run_views if together else models.run_apart
            return (run_model(run if together else model, batch.joined, step, views),)

    def evaluate(images: Tensor) -> Tensor:
        with backend(backend_name):
            return run(images)

    return Learner(model, train, evaluate, mixture, adapters=list(adapters(model)), views=views)


def int8_backbone(setting: Setting) -> Learner:
    """Our adapters on a backbone whose linears are in int8; it must compute what the same weights do in float32."""
    mixture = setting.mixture()
    model = setting.stored(mixture)
    quantise_backbone(model)
    exact = copy.deepcopy(mixture)
    for name, parameter in model.named_parameters():
        if is_quantised(parameter):
            exact.get_parameter(name).data.copy_(parameter.dequantize())
    return mixture_learner(model, exact, setting.level, best_backend(setting.device))


def method(setting: Setting, row: Method) -> Learner:
    """What a method of a run trains, with the views that it has there."""
    views = row.views_of(None)
    if row.adapters is not None:
        config = replace(CONFIG, **row.adapters)
        operator = "sparse_lora" if config.method == "lora" else "sparse_adapter"
        return ours(setting, best_backend(setting.device, operator), config=config, views=views)

    def exact() -> Any:
        model: Any = copy.deepcopy(setting.float32)
        for parameter in row.trained(model, [model.head], 1):
            parameter.requires_grad_(True)
        return model

    def learner(model: Any) -> Learner:
        return Learner(model, lambda batch, step: (model(*batch.joined),), model, views=views)

    made = learner(setting.stored(exact()))
    made.truth = lambda: learner(exact())  # made when it is compared, and not kept
    return made


def backends_of(operator: str) -> list[str]:
    """The backends that serve an operator, somewhere."""
    return [name for name in BACKENDS if name == "reference" or operator in KERNELS[name]]


def best_backend(device: torch.device, operator: str = "sparse_adapter") -> str:
    """The fastest that serves an operator on the device."""
    kernels = backends_of(operator)[1:] if device.type == "cuda" else []
    return next((name for name in kernels if unavailable_reason(name) is None), "reference")
