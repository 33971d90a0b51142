"""Low-rank pairs on the linears of a block's attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from mosa_fast.adapters.seams import call_qkv_as_module, lora_targets
from mosa_fast.adapters.wrapper import Wrapper
from mosa_fast.config import MoSAConfig
from mosa_fast.nn import SparseLoRA
from mosa_fast.nn.stacks import LoRAStack
from mosa_fast.routing import BlockRouting

SCALE = 1.0  # what "auto" means in a MoSAConfig


class LoRALinear(Wrapper):
    """A frozen linear, untouched, whose output gets the low-rank parts of its targets.

    It hands out no weight: who multiplies with `linear.weight` by himself would pass the pairs over in silence.

    Attributes:
        linear: timm's.
        lora: the pairs, of one task or (in a bank) of many.
        experts: int32 `[T, V, 2]` of the pass that is running; None between passes.
        bypassed: leave the pairs out, in the pass that is running.
    """

    CHILD = "linear"

    def __init__(self, linear: nn.Module, lora: SparseLoRA | LoRAStack) -> None:
        super().__init__()
        self.experts: Tensor | None = None
        self.bypassed = False
        self.lora = lora
        self.linear = linear
        self.train(linear.training)

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "bias"):
            raise AttributeError(f"{type(self).__name__} has no {name} to multiply with: call it, or take its linear")
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, ..., D]` to `[N, ..., O]`.

        Raises:
            RuntimeError: the block has handed on no experts in training.
        """
        if self.bypassed:
            return self.linear(x)
        if self.experts is None and self.training:
            raise RuntimeError("a linear with low-rank pairs in training was not told which experts to use")
        return self.lora(x, self.linear(x), self.experts)


def put_loras(block: nn.Module, config: MoSAConfig, **options: Any) -> None:
    """Wrap the linears of a timm block that hold the configuration's targets, in place; options are SparseLoRA's."""
    targets = lora_targets(block)
    call_qkv_as_module(block)
    paths: dict[str, list[tuple[int, int]]] = {}
    for name in "qkvo":  # in the order of their columns
        if name in config.targets:
            paths.setdefault(targets[name].path, []).append((targets[name].start, targets[name].stop))
    scale = SCALE if config.scale == "auto" else config.scale
    for path, columns in paths.items():
        linear: Any = block.get_submodule(path)
        lora = SparseLoRA(
            linear.in_features,
            columns,
            config.rank,
            config.experts,
            share=config.share,
            scale=scale,
            merge=config.merge,
            routing=config.routing,
            **options,
        )
        lora.config = config
        block.set_submodule(path, LoRALinear(linear, lora))


def linears_of(block: nn.Module) -> list[LoRALinear]:
    """The wrapped linears of a block, in the order in which a routing counts their targets."""
    return [module for module in block.modules() if isinstance(module, LoRALinear)]


@contextmanager
def routed_linears(linears: Sequence[LoRALinear], routing: BlockRouting | None) -> Iterator[None]:
    """Inside this context the linears compute with a block's routing, whose views are parted already."""
    try:
        if routing is not None:
            sizes = [linear.lora.draws for linear in linears]
            for linear, experts in zip(linears, routing.experts.split(sizes), strict=True):
                linear.experts = experts
        yield
    finally:
        for linear in linears:
            linear.experts = None


@contextmanager
def bypassed_linears(linears: Sequence[LoRALinear]) -> Iterator[None]:
    """Inside this context the linears compute without their pairs."""
    try:
        for linear in linears:
            linear.bypassed = True
        yield
    finally:
        for linear in linears:
            linear.bypassed = False
