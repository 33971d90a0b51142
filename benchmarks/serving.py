"""Cases of serving: a batch of images of many tasks, by a bank and by other ways; a case for each number of tasks.

Where a bank has N tasks, image i has task i mod N. All stand on one frozen backbone, and each task has a head of its
own, but for peft's, which has one head for all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Contender, Makers, case
from benchmarks.contenders import NO_ADAPTER, peft_unavailable
from benchmarks.ours import best_backend
from benchmarks.spec import BANKS, CONFIG, DENSE_LORA_CONFIG, Spec
from benchmarks.timing import Work
from benchmarks.workbench import Workbench
from mosa_fast.adapters.bank import AdapterBank
from mosa_fast.adapters.fold import merge
from mosa_fast.adapters.model import AdaptedModel
from mosa_fast.config import MoSAConfig
from mosa_fast.nn.mixture import adapters
from mosa_fast.ops import backend
from mosa_fast.training.precision import autocast

Logits = Callable[[Tensor], Tensor]


class Serving:
    """What the contenders of one spec have in common.

    Attributes:
        bench: backbone and images.
        tasks: number of tasks.
        places: the places of each task's images in a batch.
    """

    def __init__(self, spec: Spec, device: torch.device, tasks: int) -> None:
        self.bench, self.tasks = Workbench(spec, device, "model"), tasks
        of_images = torch.arange(spec.images, device=device) % tasks
        self.places = [(of_images == task).nonzero().flatten() for task in range(tasks)]
        self.names = [str(image % tasks) for image in range(spec.images)]

    def models(self, config: MoSAConfig, *, exact: bool = False) -> Iterator[AdaptedModel]:
        """Each task's merged model; the frozen weights are the same tensors in all. exact: in float32."""
        mixture = self.bench.setting.mixture(config)
        base = mixture if exact else self.bench.setting.stored(mixture)
        frozen = {id(weight): weight for weight in base.parameters() if not weight.requires_grad}
        for task in range(self.tasks):
            model = copy.deepcopy(base, dict(frozen))
            generator = torch.Generator().manual_seed(task)
            for weight in (*(adapter.up.weight for adapter in adapters(model)), model.head.weight):
                weight.data.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5)
            yield merge(model).eval()

    def bank(self, config: MoSAConfig) -> Logits:
        """All tasks in one pass."""
        bank = AdapterBank(copy.deepcopy(self.bench.setting.backbone))
        for task, model in enumerate(self.models(config)):
            bank.add(str(task), model)
        return partial(bank, tasks=self.names)

    def swapped(self, config: MoSAConfig) -> Logits:
        """A pass for each task. All models are there: to swap one in costs nothing."""
        return partial(self._by_task, list(self.models(config)))

    def _by_task(self, models: Any, images: Tensor) -> Tensor:
        if self.tasks == 1:
            (model,) = models
            return model(images)
        logits: Tensor | None = None
        for places, model in zip(self.places, models, strict=True):
            if len(places):
                own = model(images[places])
                logits = own.new_empty(len(images), own.shape[1]) if logits is None else logits
                logits[places] = own
        assert logits is not None
        return logits

    def peft(self) -> Logits:
        """The peft library's mixed batches: LoRA of the rank of ours, one pair on q, k and v together."""
        from peft import LoraConfig, get_peft_model

        rank = DENSE_LORA_CONFIG.rank
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["qkv"])
        model: Any = get_peft_model(copy.deepcopy(self.bench.setting.backbone), config, adapter_name="0")
        for task in range(1, self.tasks):
            model.add_adapter(str(task), config)
        return partial(model.eval(), adapter_names=self.names)

    def contender(self, name: str, make: Callable[[], Logits], config: MoSAConfig | None = None) -> Contender:
        """One way of serving; with a config, its logits must be those of the tasks' own models."""
        serve, turns, bench = make(), self.bench.turns(), self.bench
        best = best_backend(bench.device, "adapter_bank")

        @torch.no_grad()
        def logits(images: Tensor) -> Tensor:
            with backend(best), autocast(bench.spec.precision, bench.device):
                return serve(images)

        return Contender(
            name,
            {"all": Work(lambda: logits(*next(turns).joined))},
            lambda: {"logits": logits(*bench.batches[0].joined)},
            None if config is None else partial(self._expected, config),
        )

    def _expected(self, config: MoSAConfig) -> dict[str, Tensor]:
        known = self._known
        if config not in known:
            with torch.no_grad(), backend("reference"):
                images = self.bench.batches[0].joined[0].float()
                known[config] = self._by_task(self.models(config, exact=True), images)
        return {"logits": known[config]}

    @cached_property
    def _known(self) -> dict[MoSAConfig, Tensor]:
        return {}


def serving_case(spec: Spec, device: torch.device, tasks: int) -> Makers:
    """Logits of a batch of so many tasks."""
    serving = Serving(spec, device, tasks)

    def plain() -> Logits:
        return copy.deepcopy(serving.bench.setting.backbone).eval()

    makers: Makers = {NO_ADAPTER: partial(serving.contender, NO_ADAPTER, plain)}
    for kind, config in (("adapters", CONFIG), ("pairs", DENSE_LORA_CONFIG)):
        for way, make in (("bank", serving.bank), ("swapped", serving.swapped)):
            name = f"{way}, {kind}"
            makers[name] = partial(serving.contender, name, partial(make, config), config)
    name = "peft, adapter_names"
    return makers | {name: peft_unavailable() or partial(serving.contender, name, serving.peft)}


for _name, _tasks in BANKS.items():
    case(_name)(partial(serving_case, tasks=_tasks))
