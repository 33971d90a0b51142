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
from mosa_fast.adapters.model import adapt, adapters
from mosa_fast.adapters.vision_transformer import AdaptedBlock, AdaptedVisionTransformer
from mosa_fast.config import MoSAConfig
from mosa_fast.routing import Routing, as_seed, draw
from mosa_fast.training.precision import store_frozen

Inputs = tuple[Tensor, ...]  # (h, skip), (tokens,) or (images,)
Mixture = AdaptedVisionTransformer  # a timm model with adapters of ours


class Setting:
    """Backbone and mixtures of one spec.

    Attributes:
        spec, device: what is measured, and where.
        level: which part of a model works.
        backbone: a frozen timm ViT with random weights and a trained head, its frozen weights as the spec's precision
            stores them; one block, unless whole models work.
    """

    def __init__(self, spec: Spec, device: torch.device, level: Level) -> None:
        self.spec, self.device, self.level = spec, device, level
        torch.manual_seed(0)
        depth: dict[str, Any] = {} if level == "model" else {"depth": 1}
        model = timm.create_model(spec.backbone, num_classes=CLASSES, **depth).to(device)
        assert isinstance(model, VisionTransformer)
        model.requires_grad_(False)
        model.head.requires_grad_(True)
        self._float32 = model
        self._mixtures: list[tuple[MoSAConfig, Mixture]] = []
        self.backbone = self.stored(model)

    def stored(self, model: Any) -> Any:
        """A copy of a model with its frozen weights as the spec's precision stores them."""
        model = copy.deepcopy(model)
        store_frozen(model, self.spec.precision)
        return model

    def mixture(self, config: MoSAConfig = CONFIG) -> Mixture:
        """The backbone with our adapters, all in float32, made once for a config.

        Up-projections are random instead of zero, so that no gradient is zero.
        """
        for known, model in self._mixtures:
            if known == config:
                return model
        model = adapt(copy.deepcopy(self._float32), config)
        generator = torch.Generator().manual_seed(1)
        for adapter in adapters(model):
            weight = adapter.up.weight
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5)
        self._mixtures.append((config, model))
        return model


def draw_step(model: Mixture, step: int, device: torch.device) -> Routing:
    """The experts and dropout keys of a step's views."""
    return draw(as_seed(step, device), len(model.blocks), VIEWS, model.mosa_config.experts)


def part(model: Mixture, level: Level) -> nn.Module:
    """What of a mixture works at a level."""
    return {"operator": next(iter(adapters(model))), "block": model.blocks[0], "model": model}[level]


def run_adapter(adapter: nn.Module, inputs: Inputs, routing: Routing) -> Tensor:
    """The adapter on the stream and the MLP's output of both views, `[V * B, T, D]`."""
    return adapter(*inputs, routing.experts[0], seed=routing.seeds[0])


def run_block(block: nn.Module, inputs: Inputs, routing: Routing) -> Tensor:
    """The adapted block on the tokens of both views, `[V * B, T, D]`."""
    return block(*inputs, routing.experts[0], routing.seeds[0])


def run_model(model: nn.Module, inputs: Inputs, step: int) -> Tensor:
    """Logits of both views of the images, which run in common what is the same for both."""
    (images,) = inputs
    return model(images, views=VIEWS, seed=as_seed(step, images.device))


def run_unshared(model: Mixture, inputs: Inputs, routing: Routing) -> Tensor:
    """Logits of both views of the images, each of them from the pixels on, in one batch."""
    (images,) = inputs
    x = model.patch_embed(images.repeat(VIEWS, 1, 1, 1))
    x = model.norm_pre(model.patch_drop(model._pos_embed(x)))
    for block, experts, key in zip(model.blocks, routing.experts, routing.seeds, strict=True):
        assert isinstance(block, AdaptedBlock)
        x = block(x, experts, key)
    return model.forward_head(model.norm(x))
