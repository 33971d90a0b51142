"""The registry of contenders: no adapters, ours, the paper's way of working, a dense adapter, LoRA.

A contender is a function from a `Setting` to a `Learner`, registered under its name: a new one needs no change anywhere
else. Where there is little time, those at the end of this file are left out first. All stand on the same frozen timm
ViT (no dropout or drop-path of its own) with a trained head, and see two views of the same images.
"""

from __future__ import annotations

import copy
import importlib.util
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from benchmarks import models
from benchmarks.learner import Batch, Learner
from benchmarks.models import Setting
from benchmarks.plain import CopiedAdapter, DenseAdapter, PlainModel
from benchmarks.spec import CONFIG, VIEWS, Level, Spec
from mosa_fast.adapters.model import AdaptedModel, adapters
from mosa_fast.adapters.placements import repeat_batch
from mosa_fast.config import MoSAConfig
from mosa_fast.ops import backend
from mosa_fast.ops.backends import BACKENDS, unavailable_reason

LORA_RANK = 16  # on q, k and v in timm's fused projection


@dataclass(frozen=True)
class Entry:
    """A registered contender.

    Attributes:
        make: the function.
        cases: those it takes part in.
        when: whether it takes part in a spec of theirs on a device.
        unavailable: why it cannot run here; None: it can.
        views_together: in a training step, what the views have in common is run once.
    """

    make: Callable[[Setting], Learner]
    cases: tuple[str, ...]
    when: Callable[[Spec, torch.device], bool] = lambda spec, device: True
    unavailable: Callable[[], str | None] = lambda: None
    views_together: bool = False

    def takes_part(self, spec: Spec, device: torch.device) -> bool:
        """Whether it is a row of the spec."""
        return spec.case in self.cases and self.when(spec, device)


CONTENDERS: dict[str, Entry] = {}
ALL_CASES = ("operator", "block", "step", "evaluation")
NO_ADAPTER, NO_ADAPTER_APART = "no adapter", "no adapter, two views"
VARIANTS = ("compiled", "two views")  # ends of names; a variant has its contender's colour in the plots

_Maker = TypeVar("_Maker", bound=Callable[..., Learner])


def contender(name: str, cases: tuple[str, ...] = ALL_CASES, **options: Any) -> Callable[[_Maker], _Maker]:
    """Register a contender under a name; the options are `Entry`'s."""

    def register(make: _Maker) -> _Maker:
        CONTENDERS[name] = Entry(make, cases, **options)
        return make

    return register


def split_variant(name: str) -> tuple[str, str]:
    """A row's name as contender and variant ("" where it is none): ("ours, triton", "compiled")."""
    start, _, end = name.rpartition(", ")
    return (start, end) if end in VARIANTS else (name, "")


# Nothing


@contender(NO_ADAPTER, views_together=True)
def without_adapters(setting: Setting) -> Learner:
    """The same work without adapters; a model's first block runs once, and its output is repeated."""
    return _without_adapters(setting, together=True)


@contender(NO_ADAPTER_APART, cases=("step",))
def without_adapters_apart(setting: Setting) -> Learner:
    """The same work without adapters, both views from the pixels on."""
    return _without_adapters(setting, together=False)


def _without_adapters(setting: Setting, *, together: bool) -> Learner:
    # In a model gradients flow from the head to the output of the first block: with adapters that is as far as they
    # reach, since the first adapter is the first thing that is trained.
    model, level = copy.deepcopy(setting.backbone), setting.level

    def fork(block: nn.Module, inputs: Any, x: Tensor) -> Tensor:
        x = repeat_batch(x, VIEWS) if together and block.training else x
        return x.detach().requires_grad_(block.training)

    if level == "model":
        model.blocks[0].register_forward_hook(fork)

    def train(batch: Batch, step: int) -> tuple[Tensor, ...]:
        if level == "operator":
            h, skip = batch.joined
            return (h + skip,)
        if level == "block":
            return (model.blocks(*batch.joined),)
        return (model(*(batch.joined if together else batch.repeated())),)

    return Learner(model, train, model)


# Ours


def ours(
    setting: Setting,
    backend_name: str,
    *,
    config: MoSAConfig = CONFIG,
    compiled: bool = False,
    together: bool = True,
) -> Learner:
    """Our adapters on a backend; together: the views of a model run their beginning in common."""
    mixture = setting.mixture(config)
    model = setting.stored(mixture)
    return mixture_learner(model, mixture, setting.level, backend_name, compiled=compiled, together=together)


def mixture_learner(
    model: AdaptedModel,
    mixture: AdaptedModel,
    level: Level,
    backend_name: str,
    *,
    compiled: bool = False,
    together: bool = True,
) -> Learner:
    """A model with our adapters that must compute what the mixture does."""
    part = models.part_of(model, level)
    run: Any = torch.compile(part, dynamic=False) if compiled else part

    def train(batch: Batch, step: int) -> tuple[Tensor, ...]:
        with backend(backend_name):
            if level == "model" and not together:
                return (models.run_apart(model, batch.joined, step),)
            return (models.run_views(model, run, level, batch.joined, step),)

    def evaluate(images: Tensor) -> Tensor:
        with backend(backend_name):
            return run(images)

    return Learner(model, train, evaluate, mixture, list(adapters(model)))


def best_backend(device: torch.device) -> str:
    """What `auto` would take on the device."""
    kernels = ("triton", "cuda") if device.type == "cuda" else ()
    return next((name for name in kernels if unavailable_reason(name) is None), "reference")


def _when_best(name: str, spec: Spec, device: torch.device) -> bool:
    return name == best_backend(device)


for _name in BACKENDS:
    # Those that cannot serve here are rows with their reason, their variants are no rows.
    contender(f"ours, {_name}", unavailable=partial(unavailable_reason, _name), views_together=True)(
        partial(ours, backend_name=_name)
    )
    contender(f"ours, {_name}, two views", cases=("step",), when=partial(_when_best, _name))(
        partial(ours, backend_name=_name, together=False)
    )


# Others


@contender("paper")
def paper(setting: Setting, compiled: bool = False) -> Learner:
    """E copies, experts drawn by Python's generator, a whole forward for each view, masks after backward."""
    mixture = setting.mixture()
    copies = [CopiedAdapter(adapter) for adapter in adapters(mixture)]
    model = PlainModel(setting.backbone, copies, setting.level, compiled)
    draws, number = random.Random(0), mixture.mosa_config.experts
    given: list[list[int]] = []

    def route(experts: Tensor) -> None:
        given[:] = [experts[:, view, 1].tolist() for view in range(VIEWS)]

    def train(batch: Batch, step: int) -> tuple[Tensor, ...]:
        routes = given or [[draws.randrange(number) for _ in copies] for _ in range(VIEWS)]
        return tuple(model(*view, experts=route) for view, route in zip(batch.views, routes, strict=True))

    def mask_gradients() -> None:
        for adapter in copies:
            adapter.up.mask_gradients()

    def merge() -> None:
        for adapter in copies:
            adapter.up.merge()

    return Learner(model, train, model, mixture, copies, True, route, mask_gradients, merge)


@contender("dense")
def dense(setting: Setting) -> Learner:
    """AdaptFormer's dense adapter, two dropout views in one batch."""
    made = [DenseAdapter(adapter) for adapter in adapters(setting.mixture())]
    model = PlainModel(setting.backbone, made, setting.level, compiled=False)
    return Learner(model, lambda batch, step: (model(*batch.repeated()),), model)


def _lora_unavailable() -> str | None:
    return None if importlib.util.find_spec("peft") else 'peft is not installed: pip install -e ".[compare]"'


@contender("lora", cases=("block", "step", "evaluation"), unavailable=_lora_unavailable)
def lora(setting: Setting) -> Learner:
    """LoRA by the peft library on the fused q, k, v projections, two views in one batch."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=LORA_RANK, lora_dropout=0.1, target_modules=["qkv"], modules_to_save=["head"])
    model: Any = get_peft_model(copy.deepcopy(setting.backbone), config)
    run = model if setting.level == "model" else model.base_model.model.blocks
    return Learner(model, lambda batch, step: (run(*batch.repeated()),), model)


# Under torch.compile


def _when_best_compiled(name: str, spec: Spec, device: torch.device) -> bool:
    # The compiled reference is what a fused operator has to beat.
    return spec.compiled and (name == best_backend(device) or (name == "reference" and spec.case == "operator"))


def _when_compiled(spec: Spec, device: torch.device) -> bool:
    return spec.compiled


for _name in BACKENDS:
    contender(f"ours, {_name}, compiled", when=partial(_when_best_compiled, _name), views_together=True)(
        partial(ours, backend_name=_name, compiled=True)
    )
contender("paper, compiled", when=_when_compiled)(partial(paper, compiled=True))
