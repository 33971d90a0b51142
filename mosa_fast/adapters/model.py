"""Adapters in a timm model, by composition: timm's own forward runs, through blocks that own timm's.

Why it is built so: docs/design.md, How adapters get into a model.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mosa_fast.adapters.linears import linears_of, put_loras
from mosa_fast.adapters.placements import QKVO, placement_of, repeat_batch
from mosa_fast.adapters.seams import AFTER_BLOCKS, carries_samples, find_blocks, seam_of
from mosa_fast.adapters.wrapper import Wrapper
from mosa_fast.backbones.frozen import draws_random_numbers, hold_statistics, parts_samples
from mosa_fast.backbones.heads import classifiers
from mosa_fast.config import MoSAConfig
from mosa_fast.nn import SparseAdapter, SparseLoRA
from mosa_fast.nn.sparse_adapter import FIXED
from mosa_fast.routing import BlockRouting, Routing, as_seed, draw

NOT_ROUTED = (
    "an adapted block in training was not told which experts to use: call the adapted model itself, as in "
    "model(images, views=2) or model.forward_features(images), or evaluate with model.eval(). Wrappers that checkpoint "
    "the blocks forget them, too: call model.set_grad_checkpointing() instead"
)

CHECKPOINTS_BY_ITSELF = (
    "gradient checkpointing is switched on in the backbone, where it would recompute without the experts of the pass: "
    "call set_grad_checkpointing on the adapted model instead"
)


class AdaptedBlock(Wrapper):
    """A timm block, untouched, with its adapters.

    Attributes:
        block: timm's.
        placement: the name of one (`placement_of`).
        routing: what the adapters compute with in the pass that is running; None between passes.
        outputs: receives the output of the pass that is running, if anybody wants it; None between passes.
        grad_checkpointing: recompute this block in the backward pass in place of keeping its activations.
    """

    CHILD = "block"

    def __init__(self, block: nn.Module, placement: str, adapters: dict[str, SparseAdapter]) -> None:
        super().__init__()
        self.placement = placement
        self.routing: BlockRouting | None = None
        self.outputs: list[Tensor] | None = None
        self.grad_checkpointing = False
        for name, adapter in adapters.items():
            self.add_module(name, adapter)
        self.block = block
        self.train(block.training)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As timm's block, `[N, ...]` to the same; `[V * N, ...]` where the routing parts the views here.

        Raises:
            RuntimeError: there is no routing in training.
        """
        routing = self.routing
        if routing is None and self.training:
            raise RuntimeError(NOT_ROUTED)
        at_input = self.placement == QKVO  # the first thing that views differ in is the product for q, k and v
        if routing is not None and routing.fork and (at_input or draws_random_numbers(self.block)):
            x, routing = repeat_batch(x, routing.experts.shape[1]), routing._replace(fork=False)
        if self.grad_checkpointing and self.training:
            # To save torch's random state, the host waits for the GPU: done only where the frozen block draws from it.
            draws = draws_random_numbers(self.block)
            out = checkpoint(self._run, x, routing, args, kwargs, use_reentrant=False, preserve_rng_state=draws)
        else:
            out = self._run(x, routing, args, kwargs)
        if self.outputs is not None:
            self.outputs.append(out)
        return out

    def _run(self, x: Tensor, routing: BlockRouting | None, args: Any, kwargs: Any) -> Tensor:
        seam, placement = seam_of(self.block), placement_of(self.placement)
        attend = functools.partial(seam.attention, self.block, x, *args, **kwargs)
        return seam.output(self.block, placement.run(self.block, seam, self.adapters(), attend, routing))

    def adapters(self) -> list[Any]:
        """This block's SparseAdapters in the order they run, or SparseLoRAs in that of their linears."""
        if self.placement == QKVO:
            return [linear.lora for linear in linears_of(self.block)]
        return [getattr(self, name) for name in placement_of(self.placement).adapters]

    @property
    def draws(self) -> int:
        """Pairs of experts that a pass draws for this block."""
        return sum(adapter.draws for adapter in self.adapters())


class AdaptedModel(Wrapper):
    """A timm model whose blocks have adapters, and which can run several views of its images in one pass.

    It answers to the timm model's names too: `model.head`, `model.forward_features(images)`, `model.group_matcher()`.

    Attributes:
        backbone: the timm model; calling it by itself works in evaluation only.
    """

    CHILD = "backbone"

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    @property
    def mosa_config(self) -> MoSAConfig:
        """What was put in (after `merge`, with one expert): the configuration that every adapter holds."""
        return next(adapters(self)).config

    def forward(
        self,
        images: Any,
        views: int = 1,
        experts: Tensor | None = None,
        seed: Tensor | int | None = None,
        block_outputs: list[Tensor] | None = None,
        **arguments: Any,
    ) -> Any:
        """Logits of one or more stochastic views of the images (of the merged model in evaluation).

        All views are one pass up to the first random operation: the first adapter turns B samples into V * B, or
        the input is repeated, where the frozen backbone draws random numbers before it or the arguments hold
        something for every image.

        Args:
            images: `[B, 3, H, W]`, or what else the timm model takes.
            views: number of views V when `experts` is None.
            experts: int32 `[adapters, V, 2]`, the (down, up) experts of every adapter (of every target of low-rank
                pairs) and view; -1 is merged. None: drawn once per forward in training, merged in evaluation.
            seed: of draws and dropout: an int, or an int64 tensor as `mosa_fast.routing.step_seed` makes it. None:
                fresh, from torch's random state.
            block_outputs: a list that receives every block's output, `[V * B, ...]`.
            arguments: of the timm model's forward, such as attn_mask.

        Returns:
            `[V * B, classes]`, view after view.

        Raises:
            ValueError: there is no view, or experts has another shape.
            RuntimeError: gradient checkpointing was switched on in the backbone.
        """
        if views < 1:
            raise ValueError(f"views must be at least 1, got {views}")
        blocks, others = _parts(self.backbone)
        if experts is None and not self.training:
            with routed(blocks, None, block_outputs=block_outputs):
                logits = self.backbone(images, **arguments)
            return logits if views == 1 else _repeated(logits, views)  # views of a merged model are all alike
        routing = self._draw(blocks, views, experts, seed)
        views = routing.experts.shape[1]
        per_sample = {name for name, value in arguments.items() if carries_samples(name, value)}
        fork = views > 1
        counted = any(seam_of(block.block).counts_images for block in blocks)
        if fork and (
            counted or per_sample or not isinstance(images, Tensor) or any(map(parts_samples, (self.backbone, *others)))
        ):
            images, fork = _repeated(images, views), False
            arguments |= {name: _repeated(arguments[name], views) for name in per_sample}
        with routed(blocks, routing, fork=fork, block_outputs=block_outputs):
            return self.backbone(images, **arguments)

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        # The timm model's other ways through its blocks: one view, drawn once.
        if name in ("forward_features", "forward_intermediates", "get_intermediate_layers"):
            return functools.partial(self._one_view, value)
        return value

    def _one_view(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return method(*args, **kwargs)
        blocks, _ = _parts(self.backbone)
        with routed(blocks, self._draw(blocks, 1, None, None)):
            return method(*args, **kwargs)

    def _draw(
        self, blocks: list[AdaptedBlock], views: int, experts: Tensor | None, seed: Tensor | int | None
    ) -> Routing:
        layers = sum(block.draws for block in blocks)
        first = blocks[0].adapters()[0]
        # Nothing is taken from torch's random state where nothing is random.
        key = as_seed(seed if self.training else 0, first.down.weight.device)
        if experts is None and first.config.routing == "random":
            return draw(key, layers, views, first.config.experts)
        if experts is None:
            experts = torch.full((layers, views, 2), FIXED, dtype=torch.int32, device=key.device)
        if experts.ndim != 3 or experts.shape[0] != layers or experts.shape[2] != 2:
            raise ValueError(f"experts must be int32 [{layers}, V, 2], got {list(experts.shape)}")
        return Routing(experts, draw(key, layers, 1, first.config.experts).seeds)

    def train(self, mode: bool = True) -> AdaptedModel:
        """Set the mode; BatchNorm of the frozen backbone stays in evaluation (docs/design.md, Frozen stays frozen)."""
        super().train(mode)
        hold_statistics(self)
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each adapted block in the backward pass, with the same experts and dropout."""
        if any(_checkpoints(m) for m in self.backbone.modules() if not isinstance(m, AdaptedBlock)):
            self.backbone.set_grad_checkpointing(False)  # type: ignore[operator]
        for block in _parts(self.backbone)[0]:
            block.grad_checkpointing = enable

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """As the timm model's; what it makes anew (position embeddings) stays frozen if it was."""
        trained = {name: parameter.requires_grad for name, parameter in self.named_parameters()}
        self.backbone.set_input_size(*args, **kwargs)  # type: ignore[operator]
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(trained.get(name, True))

    def group_matcher(self, coarse: bool = False) -> Any:
        """The timm model's patterns of parameter groups (for layer decay), for this model's names."""
        groups: Any = self.backbone.group_matcher(coarse=coarse)  # type: ignore[operator]
        if callable(groups):  # CaiT's gives the group of a name
            return lambda name: groups(name.removeprefix(f"{self.CHILD}."))
        return {name: _prefix_patterns(patterns) for name, patterns in groups.items()}

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that the timm model wants spared from weight decay."""
        names = getattr(self.backbone, "no_weight_decay", set)
        return {f"{self.CHILD}.{name}" for name in names()}


@contextmanager
def routed(
    blocks: Sequence[AdaptedBlock],
    routing: Routing | None,
    *,
    fork: bool = False,
    block_outputs: list[Tensor] | None = None,
) -> Iterator[None]:
    """Inside this context the blocks compute with the experts and seeds of a routing.

    Args:
        blocks: in the order they run.
        routing: of all their adapters; None: evaluation, merged.
        fork: the first block is given B samples and makes V * B of them; False: blocks are given all views.
        block_outputs: receives every block's output.
    """
    try:
        for block in blocks:
            block.outputs = block_outputs
        if routing is not None:
            sizes = [block.draws for block in blocks]
            parts = zip(blocks, routing.experts.split(sizes), routing.seeds.split(sizes), strict=True)
            for index, (block, experts, seeds) in enumerate(parts):
                block.routing = BlockRouting(experts, seeds, fork and index == 0)
        yield
    finally:
        for block in blocks:
            block.routing = block.outputs = None


def adapt(model: nn.Module, config: MoSAConfig | None = None) -> AdaptedModel:
    """Put a mixture of sparse adapters into every block of a timm model.

    The backbone is frozen; the adapters and the classification head are trained. The adapted model is called as
    `model(images, views=2)` in training, which gives `[2 * B, classes]`, and as `model(images)` in evaluation.

    Args:
        model: a timm model of a family that `mosa_fast.adapters.seams` knows; its blocks are replaced in place.
        config: what to put in; the paper's defaults when None.

    Returns:
        A model around the given one.

    Raises:
        ValueError: the model is of another kind, or has adapters already.
    """
    config = config or MoSAConfig()
    if any(isinstance(module, AdaptedBlock) for module in model.modules()):
        raise ValueError("the model has adapters already; make a new one, or merge(model) and go on with that")
    found = list(find_blocks(model))
    checkpoints = any(map(_checkpoints, model.modules()))
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(config.seed)
    for parent, name, block in found:
        norm: Any = block.norm2
        options = {
            "generator": generator,
            "device": norm.weight.device,
            # Master weights are float32 under a half-precision backbone.
            "dtype": torch.promote_types(norm.weight.dtype, torch.float32),
        }
        if config.method == "lora":
            put_loras(block, config, **options)
            adapted_block = AdaptedBlock(block, QKVO, {})
        else:
            width, placement = norm.weight.numel(), placement_of(config.placement)
            made = placement.make(config, seam_of(block), width, norm_eps=norm.eps, **options)
            adapted_block = AdaptedBlock(block, config.placement, made)
        parent.register_module(name, adapted_block)
    for module in classifiers(model):
        module.requires_grad_(True)
    adapted = AdaptedModel(model).train(model.training)
    if checkpoints:
        adapted.set_grad_checkpointing(True)
    return adapted


def adapters(model: nn.Module) -> Iterator[Any]:
    """The adapters in a model (SparseAdapter, SparseLoRA), whatever wraps it or its blocks, first to last as they run.

    Raises:
        ValueError: it has none.
    """
    found = False
    for module in model.modules():
        if isinstance(module, (SparseAdapter, SparseLoRA)):
            found = True
            yield module
    if not found:
        raise ValueError(f"{type(model).__name__} has no adapters; call adapt(model, config) first")


def _repeated(value: Any, views: int) -> Any:
    """Every tensor of what a timm model takes or gives, repeated for the views: alone, in a dictionary or a list."""
    if isinstance(value, Mapping):
        return {key: _repeated(item, views) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_repeated(item, views) for item in value)
    return repeat_batch(value, views)


def _parts(backbone: nn.Module) -> tuple[list[AdaptedBlock], list[nn.Module]]:
    """The adapted blocks in a timm model, and the modules outside of them that run before the last one.

    Raises:
        RuntimeError: gradient checkpointing is switched on outside of the adapted blocks.
    """
    blocks: list[AdaptedBlock] = []
    others: list[nn.Module] = []

    def walk(module: nn.Module, left_out: tuple[str, ...] = ()) -> None:
        for name, child in module.named_children():
            if isinstance(child, AdaptedBlock):
                blocks.append(child)
            elif name not in left_out:
                others.append(child)
                walk(child)

    walk(backbone, AFTER_BLOCKS)
    if any(map(_checkpoints, (backbone, *others))):
        raise RuntimeError(CHECKPOINTS_BY_ITSELF)
    return blocks, others


def _checkpoints(module: nn.Module) -> bool:
    return bool(module.__dict__.get("grad_checkpointing", False))


def _prefix_patterns(patterns: Any) -> Any:
    """Regular expressions, alone or in pairs and lists, for names that begin with the backbone's."""
    if isinstance(patterns, str):
        # timm matches from the start of a name: without `^` the patterns mean the same, and can follow the prefix.
        unanchored = re.sub(r"(^|[|(])\^", r"\1", patterns)
        return rf"^{AdaptedModel.CHILD}\.(?:{unanchored})"
    if isinstance(patterns, (list, tuple)):
        return type(patterns)(_prefix_patterns(item) for item in patterns)
    return patterns  # None, or numbers by which timm sorts a group: they name no parameter
