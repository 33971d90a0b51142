"""What the benchmarks compare: the paper's way of working, a dense adapter, LoRA, ours, and the same without adapters.

All stand on the same frozen timm ViT (no dropout or drop-path of its own) with a trained head, and see two views of the
same images. A `Learner` is one of them at one level: the adapter alone ("operator": what it reads is the residual
stream h and the MLP's output), a transformer block ("block": tokens in, tokens out), or the whole model ("model").
"""

from __future__ import annotations

import copy
import importlib.util
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from mosa_fast.adapters.model import adapt
from mosa_fast.adapters.vision_transformer import AdaptedBlock, AdaptedVisionTransformer
from mosa_fast.config import MoSAConfig
from mosa_fast.nn import SparseAdapter
from mosa_fast.nn.projection import SparseProjection
from mosa_fast.ops import backend
from mosa_fast.routing import Routing, as_seed, draw

Level = Literal["operator", "block", "model"]
Inputs = tuple[Tensor, ...]  # (h, skip), (tokens,) or (images,)

VIEWS = 2
CLASSES = 200
LORA_RANK = 16  # METHOD: MoSL's rank, on q, k and v in timm's fused projection


@dataclass(frozen=True)
class Batch:
    """The same data in two forms, so that nobody pays for cutting or joining it.

    Attributes:
        joined: for one pass over both views: tokens `[2 B, T, D]`, view after view; or images `[B, 3, H, W]`.
        views: for a pass of each view: tokens `[B, T, D]`, or the same images twice.
    """

    joined: Inputs
    views: tuple[Inputs, ...]


@dataclass
class Learner:
    """A model as one way of working trains and evaluates it.

    Attributes:
        module: everything, for its parameters.
        train: a batch and a step number to outputs: one tensor for all views, or one for each.
        evaluate: images to logits `[B, classes]`.
        adapters: those whose gradients must be the mixture's; none where the mathematics is another.
        route: makes the views take given experts, int32 `[blocks, V, 2]`; None: their draw follows from the step.
        after_backward: what is done to the gradients before the optimizer's step.
        prepare_evaluation: what is done once before evaluation.
    """

    module: nn.Module
    train: Callable[[Batch, int], tuple[Tensor, ...]]
    evaluate: Callable[[Tensor], Tensor]
    adapters: Sequence[CopiedAdapter | SparseAdapter] = ()
    route: Callable[[Tensor], None] | None = None
    after_backward: Callable[[], None] = lambda: None
    prepare_evaluation: Callable[[], None] = lambda: None

    def trained(self) -> list[nn.Parameter]:
        """Parameters that the optimizer updates."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]


def state_bytes(learner: Learner, vit: VisionTransformer) -> int:
    """Bytes of everything but the frozen backbone: weights, copies, masks and maps, and AdamW's two moments."""
    frozen = _nbytes(parameter for parameter in vit.parameters() if not parameter.requires_grad) + _nbytes(
        vit.buffers()
    )
    everything = _nbytes(learner.module.parameters()) + _nbytes(learner.module.buffers())
    return everything - frozen + 2 * _nbytes(learner.trained())


def make_backbone(name: str, device: torch.device, depth: int | None = None) -> VisionTransformer:
    """A frozen timm ViT with random weights and a trained head, in float32; depth: only so many blocks."""
    torch.manual_seed(0)
    options: dict[str, Any] = {} if depth is None else {"depth": depth}
    model = timm.create_model(name, num_classes=CLASSES, **options).to(device)
    assert isinstance(model, VisionTransformer)
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    return model


def make_compact(vit: VisionTransformer, config: MoSAConfig) -> AdaptedVisionTransformer:
    """Our model on a copy of the backbone; up-projections are random instead of zero, so that no gradient is zero."""
    model = adapt(copy.deepcopy(vit), config)
    generator = torch.Generator().manual_seed(1)
    for adapter in _adapters(model):
        weight = adapter.up.weight
        weight.data.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5)
    return model


# Plain modules: the paper's way of working, and a dense adapter


class CopiedProjection(nn.Module):
    """A split projection as E whole copies with a mask for each gradient, and one more copy that is evaluated."""

    def __init__(self, compact: SparseProjection) -> None:
        """Copies of the weights that each expert of the compact form computes with."""
        super().__init__()
        assert compact.owner is not None
        owner = compact.owner
        origin = torch.zeros_like(compact.weight) if compact.init is None else compact.init
        self.masks: Tensor
        self.register_buffer("masks", torch.stack([owner == expert for expert in range(compact.experts)]))
        self.linears = [
            _plain_linear(torch.where(mask, compact.weight.detach(), origin), bias)
            for mask, bias in zip(self.masks, compact.bias_rows().detach(), strict=True)
        ]
        self.copies = nn.ModuleList(self.linears)
        self.merged = copy.deepcopy(self.linears[0]).requires_grad_(False)

    def mask_gradients(self) -> None:
        """Keep what each copy owns; copies that were not drawn have no gradient."""
        for linear, mask in zip(self.linears, self.masks, strict=True):
            if linear.weight.grad is not None:
                linear.weight.grad.mul_(mask)

    @torch.no_grad()
    def merge(self) -> None:
        """Average the copies."""
        for name in ("weight", "bias"):
            getattr(self.merged, name).copy_(torch.stack([getattr(linear, name) for linear in self.linears]).mean(0))


class CopiedAdapter(nn.Module):
    """Dense down-projection and E copies of the up-projection (share = down), as plain modules."""

    def __init__(self, compact: SparseAdapter) -> None:
        """The same function as the compact adapter's."""
        super().__init__()
        self.norm = copy.deepcopy(compact.norm)
        self.down = _plain_linear(compact.down.weight, compact.down.bias_rows()[0])
        self.up = CopiedProjection(compact.up)
        self.scale, self.dropout = compact.scale, compact.dropout

    def choose(self, expert: int | None) -> nn.Linear:
        """The up-projection of an expert; None: the merged one."""
        return self.up.merged if expert is None else self.up.linears[expert]

    def forward(self, h: Tensor, up: nn.Module) -> Tensor:
        """`[N, T, D]` to the same, through a chosen up-projection."""
        return _bottleneck(self, h, up)


class DenseAdapter(nn.Module):
    """AdaptFormer's parallel adapter (arXiv 2205.13535, section 3.2) with the norm that MoSA's has."""

    def __init__(self, compact: SparseAdapter) -> None:
        """Weights of the compact adapter's shapes."""
        super().__init__()
        self.norm = copy.deepcopy(compact.norm)
        self.down = _plain_linear(compact.down.weight, compact.down.bias_rows()[0])
        self.up = _plain_linear(compact.up.weight, compact.up.bias_rows()[0])
        self.scale, self.dropout = compact.scale, compact.dropout

    def choose(self, expert: int | None) -> nn.Linear:
        """The only up-projection."""
        return self.up

    def forward(self, h: Tensor, up: nn.Module) -> Tensor:
        """`[N, T, D]` to the same, through a chosen up-projection."""
        return _bottleneck(self, h, up)


def _bottleneck(adapter: CopiedAdapter | DenseAdapter, h: Tensor, up: nn.Module) -> Tensor:
    hidden = F.gelu(adapter.down(adapter.norm(h)))  # type: ignore[misc]  # it has one here
    return adapter.scale * up(F.dropout(hidden, adapter.dropout, adapter.training))


def parallel_branch(adapter: nn.Module, up: nn.Module, h: Tensor, skip: Tensor) -> Tensor:
    """The residual stream, the MLP's output and the adapter's."""
    return h + skip + adapter(h, up)


def parallel_block(block: Block, adapter: nn.Module, up: nn.Module, x: Tensor) -> Tensor:
    """A timm block with a plain adapter parallel to its MLP."""
    h = x + block.attn(block.norm1(x))
    return parallel_branch(adapter, up, h, block.mlp(block.norm2(h)))


class PlainModel(nn.Module):
    """A ViT with plain adapters, at one level; a forward is one view, or several that are all alike."""

    def __init__(
        self, vit: VisionTransformer, adapters: Sequence[CopiedAdapter | DenseAdapter], level: Level, compiled: bool
    ) -> None:
        super().__init__()
        self.vit, self.plain, self.level = copy.deepcopy(vit), adapters, level
        self.adapters = nn.ModuleList(adapters)
        # Block by block: a graph of the whole model would be one of E ** blocks.
        compile_: Callable[..., Any] = partial(torch.compile, dynamic=False) if compiled else _identity
        self.branch: Callable[..., Tensor] = compile_(parallel_branch)
        self.block: Callable[..., Tensor] = compile_(parallel_block)

    def forward(self, *inputs: Tensor, experts: list[int] | None = None) -> Tensor:
        """The level's output; experts: of every adapter, or None for the merged ones."""
        ups = [adapter.choose(experts[index] if experts else None) for index, adapter in enumerate(self.plain)]
        if self.level == "operator":
            return self.branch(self.plain[0], ups[0], *inputs)
        x = inputs[0] if self.level == "block" else tokens(self.vit, inputs[0])
        for block, adapter, up in zip(self.vit.blocks, self.plain, ups, strict=True):
            x = self.block(block, adapter, up, x)
        return x if self.level == "block" else self.vit.forward_head(self.vit.norm(x))


def paper(vit: VisionTransformer, compact: AdaptedVisionTransformer, level: Level, compiled: bool = False) -> Learner:
    """E copies, experts drawn by Python's generator, a whole forward for each view, masks after backward."""
    adapters = [CopiedAdapter(adapter) for adapter in _adapters(compact)]
    model = PlainModel(vit, adapters, level, compiled)
    draws, number = random.Random(0), compact.mosa_config.experts
    given: list[list[int]] = []

    def route(experts: Tensor) -> None:
        given[:] = [experts[:, view, 1].tolist() for view in range(VIEWS)]

    def train(batch: Batch, step: int) -> tuple[Tensor, ...]:
        routes = given or [[draws.randrange(number) for _ in adapters] for _ in range(VIEWS)]
        return tuple(model(*view, experts=route) for view, route in zip(batch.views, routes, strict=True))

    def mask_gradients() -> None:
        for adapter in adapters:
            adapter.up.mask_gradients()

    def merge() -> None:
        for adapter in adapters:
            adapter.up.merge()

    return Learner(model, train, model, adapters, route, mask_gradients, merge)


def dense(vit: VisionTransformer, compact: AdaptedVisionTransformer, level: Level) -> Learner:
    """AdaptFormer's dense adapter, two dropout views in one batch."""
    adapters = [DenseAdapter(adapter) for adapter in _adapters(compact)]
    model = PlainModel(vit, adapters, level, compiled=False)
    return Learner(model, lambda batch, step: (model(*_repeated(batch, level)),), model)


# LoRA


def lora(vit: VisionTransformer, level: Level) -> Learner:
    """LoRA by the peft library on the fused q, k, v projections, two views in one batch."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=LORA_RANK, lora_dropout=0.1, target_modules=["qkv"], modules_to_save=["head"])
    model: Any = get_peft_model(copy.deepcopy(vit), config)
    run = model if level == "model" else model.base_model.model.blocks
    return Learner(model, lambda batch, step: (run(*_repeated(batch, level)),), model)


def lora_unavailable() -> str | None:
    """Why there is no LoRA contender; None: there is."""
    return None if importlib.util.find_spec("peft") else 'peft is not installed: pip install -e ".[compare]"'


# Ours, and nothing


def ours(
    compact: AdaptedVisionTransformer,
    level: Level,
    backend_name: str,
    *,
    compiled: bool = False,
    shared: bool = True,
) -> Learner:
    """Our adapters on a backend; shared: the views of a model share their beginning (`model(images, views=2)`)."""
    model = copy.deepcopy(compact)
    part: Any = {"operator": model.blocks[0].adapter, "block": model.blocks[0], "model": model}[level]
    run = torch.compile(part, dynamic=False) if compiled else part

    def train(batch: Batch, step: int) -> tuple[Tensor, ...]:
        device = batch.joined[0].device
        with backend(backend_name):
            if level == "model" and shared:
                return (run(*batch.joined, views=VIEWS, seed=as_seed(step, device)),)
            routing = routing_of(compact, step, device)
            if level == "model":
                return (_unshared_views(model, batch.joined[0], routing),)
            return (run(*batch.joined, experts=routing.experts[0], seed=routing.seeds[0]),)

    def evaluate(images: Tensor) -> Tensor:
        with backend(backend_name):
            return run(images)

    return Learner(model, train, evaluate, _adapters(model))


def routing_of(model: AdaptedVisionTransformer, step: int, device: torch.device) -> Routing:
    """The experts and dropout keys of a step."""
    return draw(as_seed(step, device), len(model.blocks), VIEWS, model.mosa_config.experts)


def _unshared_views(model: AdaptedVisionTransformer, images: Tensor, routing: Routing) -> Tensor:
    """Both views from the pixels on, in one batch."""
    x = tokens(model, images.repeat(VIEWS, 1, 1, 1))
    for block, experts, key in zip(model.blocks, routing.experts, routing.seeds, strict=True):
        assert isinstance(block, AdaptedBlock)
        x = block(x, experts, key)
    return model.forward_head(model.norm(x))


def without_adapters(vit: VisionTransformer, level: Level, *, shared: bool = True) -> Learner:
    """The yardstick: the same step, but no adapter in it.

    In a model gradients flow from the head to the output of the first block: with adapters that is as far as they
    reach, since the first adapter is the first thing that is trained. shared: the first block runs once, and its
    output is repeated.
    """
    model = copy.deepcopy(vit)

    def train(batch: Batch, step: int) -> tuple[Tensor, ...]:
        if level == "operator":
            h, skip = batch.joined
            return (h + skip,)
        if level == "block":
            return (model.blocks(*batch.joined),)
        (images,) = batch.joined
        x = model.blocks[0](tokens(model, images if shared else images.repeat(VIEWS, 1, 1, 1)))
        x = (x.repeat(VIEWS, 1, 1) if shared else x).detach().requires_grad_()
        for block in model.blocks[1:]:
            x = block(x)
        return (model.forward_head(model.norm(x)),)

    return Learner(model, train, model)


def gradients(learner: Learner) -> dict[str, Tensor]:
    """Gradients of a mixture's weights in the compact form's shapes; copies that were not drawn have zeros."""
    found: dict[str, Tensor] = {}
    for index, adapter in enumerate(learner.adapters):
        if isinstance(adapter, CopiedAdapter):
            linears = adapter.up.linears
            weights, biases = ([_gradient(getattr(c, name)) for c in linears] for name in ("weight", "bias"))
            found |= {f"{index}.up.weight": torch.stack(weights).sum(0), f"{index}.up.bias": torch.stack(biases)}
        else:
            found |= {f"{index}.up.{name}": _gradient(getattr(adapter.up, name)) for name in ("weight", "bias")}
        found |= {f"{index}.{name}.weight": _gradient(getattr(adapter, name).weight) for name in ("down", "norm")}
    return found


def tokens(vit: VisionTransformer, images: Tensor) -> Tensor:
    """Embedded patches, `[B, T, D]`."""
    return vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))


def _repeated(batch: Batch, level: Level) -> Inputs:
    """Both views in one batch, from their beginning."""
    return tuple(images.repeat(VIEWS, 1, 1, 1) for images in batch.joined) if level == "model" else batch.joined


def _adapters(model: AdaptedVisionTransformer) -> list[SparseAdapter]:
    return [block.adapter for block in model.blocks if isinstance(block, AdaptedBlock)]


def _plain_linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    linear = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], device=weight.device)
    linear.weight.data.copy_(weight.detach())
    linear.bias.data.copy_(bias.detach())
    return linear


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _identity(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return function
