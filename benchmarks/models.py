"""What all contenders of a spec stand on: one frozen backbone, and the mixtures made on it.

How adapted models are called is known here alone.
"""

from __future__ import annotations

import copy
from typing import Any

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from benchmarks.spec import CLASSES, CONFIG, VIEWS, Level, Spec
from mosa_fast.adapters.block import AdaptedBlock, routed
from mosa_fast.adapters.model import AdaptedModel, adapt
from mosa_fast.adapters.placements import repeat_batch
from mosa_fast.config import MoSAConfig
from mosa_fast.nn.mixture import adapters
from mosa_fast.routing import Routing, as_seed, draw
from mosa_fast.training.precision import store_frozen

DRAWS = 8  # made before a layer alone is timed, and used in turns: a model draws once a pass, for all its layers

Inputs = tuple[Tensor, ...]  # (h, skip), (a linear's input, its output), (tokens,) or (images,)


class Setting:
    """Backbone and mixtures of one spec.

    Attributes:
        spec, device: what is measured, and where.
        level: which part of a model works.
        backbone: a frozen timm ViT with random weights and a trained head, its frozen weights as the spec's precision
            stores them; one block, unless whole models work.
        float32: the same, all in float32.
    """

    def __init__(self, spec: Spec, device: torch.device, level: Level) -> None:
        self.spec, self.device, self.level = spec, device, level
        torch.manual_seed(0)
        depth: dict[str, Any] = {} if level == "model" else {"depth": 1}
        model = timm.create_model(spec.backbone, num_classes=CLASSES, **depth).to(device)
        assert isinstance(model, VisionTransformer)
        model.requires_grad_(False)
        model.head.requires_grad_(True)
        self.float32 = model
        self._mixtures: list[tuple[MoSAConfig, AdaptedModel]] = []
        self.backbone = self.stored(model)

    def stored(self, model: Any) -> Any:
        """A copy of a model with its frozen weights as the spec's precision stores them."""
        model = copy.deepcopy(model)
        store_frozen(model, self.spec.precision)
        return model

    def mixture(self, config: MoSAConfig = CONFIG) -> AdaptedModel:
        """The backbone with our layers, all in float32, made once for a config.

        Up-projections are random instead of zero, so that no gradient is zero.
        """
        for known, model in self._mixtures:
            if known == config:
                return model
        model = adapt(copy.deepcopy(self.float32), config)
        generator = torch.Generator().manual_seed(1)
        for adapter in adapters(model):
            weight = adapter.up.weight
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5)
        self._mixtures.append((config, model))
        return model


def blocks_of(mixture: AdaptedModel) -> list[AdaptedBlock]:
    """The adapted blocks, in the order they run."""
    return [module for module in mixture.modules() if isinstance(module, AdaptedBlock)]


def draw_step(mixture: AdaptedModel, step: int, device: torch.device, views: int = VIEWS) -> Routing:
    """The experts and dropout keys of a step's views, for all adapters and pairs."""
    config, draws = mixture.mosa_config, sum(block.draws for block in blocks_of(mixture))
    routing = draw(as_seed(step, device), draws, views, config.experts)
    return Routing(torch.zeros_like(routing.experts), routing.seeds) if config.routing == "fixed" else routing


def part_of(mixture: AdaptedModel, level: Level) -> nn.Module:
    """What of a mixture works at a level."""
    if level == "model":
        return mixture
    return blocks_of(mixture)[0] if level == "block" else next(adapters(mixture))


def run_views(part: nn.Module, inputs: Inputs, step: int, views: int = VIEWS) -> Tensor:
    """Logits of all views of a model's step, `[V * B, classes]`, which run in common what is the same for them.

    Args:
        part: the model, or the same under torch.compile.
        inputs: the images.
        step: number of the step, from which experts and dropout follow.
        views: how many.
    """
    return part(*inputs, views=views, seed=as_seed(step, inputs[0].device))


def run_part(mixture: AdaptedModel, part: nn.Module, level: Level, inputs: Inputs, routing: Routing) -> Tensor:
    """All views of an adapter, pairs or a block alone, `[V * B, ...]`.

    Args:
        mixture: the model.
        part: what of it works at the level, or the same under torch.compile.
        level: the layer or the block.
        inputs: of all views.
        routing: of the mixture's adapters and views.
    """
    if level == "operator":
        return part(*inputs, routing.experts[0], seed=routing.seeds[0])
    if level == "lora":
        return part(*inputs, routing.experts)
    with routed(blocks_of(mixture), routing):
        return part(*inputs)


def run_apart(mixture: AdaptedModel, inputs: Inputs, step: int, views: int = VIEWS) -> Tensor:
    """Logits of all views of the images, `[V * B, classes]`, each of them from the pixels on, in one batch."""
    (images,) = inputs
    with routed(blocks_of(mixture), draw_step(mixture, step, images.device, views)):
        return mixture.backbone(repeat_batch(images, views))
