"""Low-rank pairs on a ViT's fused qkv as plain PyTorch modules: the paper's way of working, and the peft library's.

Both take their weights from a mixture in compact form, so that they compute the same function as the mixture does.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from benchmarks.plain import CopiedProjection, Linear, gradient
from benchmarks.spec import Level
from mosa_fast.nn import SparseLoRA


class CopiedPairs(nn.Module):
    """Dense A and E copies of B for every target: what MoSL is to the paper's code."""

    def __init__(self, compact: SparseLoRA) -> None:
        """Copies of the weights of a compact layer whose A is dense."""
        super().__init__()
        self.columns, self.scale = compact.columns, compact.scale
        self.downs = [Linear(part) for part in compact.down.weight.chunk(len(self.columns))]
        self.ups = [CopiedProjection(compact.up, rows) for rows in rows_of(compact)]
        self.projections = nn.ModuleList([*self.downs, *self.ups])
        self.experts: Sequence[int | None] = [None] * len(self.columns)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The linear's output y with the targets' parts; x: its input."""
        y = y.clone()
        for (start, stop), down, up, expert in zip(self.columns, self.downs, self.ups, self.experts, strict=True):
            y[..., start:stop] += (self.scale * up.choose(expert)(down(x))).to(y.dtype)
        return y

    def gradients(self) -> dict[str, Tensor]:
        """By the names and in the shapes of the compact form."""
        return {
            "down.weight": torch.cat([gradient(down.weight) for down in self.downs]),
            "up.weight": torch.cat([up.gradient() for up in self.ups]),
        }

    def mask_gradients(self) -> None:
        """As the projections'."""
        for up in self.ups:
            up.mask_gradients()

    def merge(self) -> None:
        """As the projections'."""
        for up in self.ups:
            up.merge()


class _LinearWithPairs(nn.Module):
    """A frozen linear and its pairs, in the linear's place."""

    def __init__(self, linear: nn.Module, pairs: CopiedPairs) -> None:
        super().__init__()
        self.linear, self.pairs = linear, pairs

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., 3 D]`."""
        return self.pairs(x, self.linear(x))


class CopiedPairsModel(nn.Module):
    """A ViT with copied pairs at one level; a forward is one view."""

    def __init__(self, vit: VisionTransformer, pairs: Sequence[CopiedPairs], level: Level) -> None:
        """Put the pairs into a copy of the backbone."""
        super().__init__()
        self.vit, self.level, self.pairs = copy.deepcopy(vit), level, list(pairs)
        for block, added in zip(self.vit.blocks, self.pairs, strict=True):
            attention: Any = block.attn
            attention.qkv = _LinearWithPairs(attention.qkv, added)

    def forward(self, *inputs: Tensor, experts: list[int] | None = None) -> Tensor:
        """The level's output; experts: of every target of every block, or None for the merged ones."""
        rest = iter(experts or ())
        for pairs in self.pairs:
            pairs.experts = [next(rest, None) for _ in pairs.columns]
        return self.pairs[0](*inputs) if self.level == "lora" else self.vit(*inputs)


class SeparateQKV(nn.Module):
    """timm's fused qkv as three linears, so that q and v can have pairs of their own: peft knows whole linears only."""

    def __init__(self, fused: nn.Linear) -> None:
        super().__init__()
        biases: Any = [None] * 3 if fused.bias is None else fused.bias.chunk(3)
        parts = zip("qkv", fused.weight.chunk(3), biases, strict=True)
        for name, weight, bias in parts:
            linear = nn.utils.skip_init(
                nn.Linear, weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype
            ).to(weight.device)
            linear.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
            self.add_module(name, linear.requires_grad_(False))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., 3 D]`."""
        return torch.cat([linear(x) for linear in self.children()], dim=-1)


class _Given(nn.Linear):
    """A linear of no cost, whose output has been set: so that the pairs that peft puts on it are timed alone."""

    output: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """The output that has been set."""
        return self.output


class GivenTargets(nn.Module):
    """The targets q and v of a fused qkv whose output is given, each with a linear of its own for peft to find."""

    def __init__(self, compact: SparseLoRA) -> None:
        """Linears of the targets' widths, on the device of a compact layer."""
        super().__init__()
        self.columns, weight = compact.columns, compact.down.weight
        for name, (start, stop) in zip("qv", self.columns, strict=True):
            linear = nn.utils.skip_init(_Given, weight.shape[1], stop - start, bias=False, device=weight.device)
            self.add_module(name, linear.requires_grad_(False))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The output y with the targets' parts; x: the linear's input."""
        layers: Any = (self.q, self.v)
        for layer, (start, stop) in zip(layers, self.columns, strict=True):
            layer.base_layer.output = y[..., start:stop]
        q, v = (layer(x) for layer in layers)
        return torch.cat([q, y[..., q.shape[-1] : -v.shape[-1]], v], dim=-1)


class PeftPairs:
    """The pairs of peft's layers on the targets of one linear, with a compact layer's dense weights."""

    def __init__(self, layers: Sequence[Any], compact: SparseLoRA) -> None:
        """Copy the weights; layers: of every target, in the order of their columns."""
        self.downs = [layer.lora_A["default"] for layer in layers]
        self.ups = [layer.lora_B["default"] for layer in layers]
        with torch.no_grad():
            parts = zip(self.downs, self.ups, compact.down.weight.chunk(len(layers)), rows_of(compact), strict=True)
            for down, up, weight, rows in parts:
                down.weight.copy_(weight)
                up.weight.copy_(compact.up.weight[rows])

    def gradients(self) -> dict[str, Tensor]:
        """By the names and in the shapes of the compact form."""
        return {
            "down.weight": torch.cat([gradient(down.weight) for down in self.downs]),
            "up.weight": torch.cat([gradient(up.weight) for up in self.ups]),
        }


def rows_of(compact: SparseLoRA) -> list[slice]:
    """The rows of every target in the up-projection."""
    ends = itertools.accumulate((stop - start for start, stop in compact.columns), initial=0)
    return [slice(*pair) for pair in itertools.pairwise(ends)]
