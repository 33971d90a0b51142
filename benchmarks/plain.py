"""Adapters as plain PyTorch modules: the paper's way of working (whole copies of a projection), and a dense adapter.

Written from the paper's text. Both take their weights from a mixture in compact form, so that the copies compute the
same function as the mixture does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from benchmarks.spec import Level
from mosa_fast.nn import SparseAdapter, SparseProjection


class Linear(nn.Linear):
    """A linear layer whose float32 weights are cast to its input's dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")  # nothing is drawn
        self.weight = nn.Parameter(weight.detach().clone())
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().clone())

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class _Norm(nn.LayerNorm):
    """A LayerNorm whose float32 weights are cast to its input's dtype."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__(norm.normalized_shape, norm.eps, device=norm.weight.device)
        self.load_state_dict(norm.state_dict())

    def forward(self, input: Tensor) -> Tensor:
        """`[..., D]` to the same."""
        weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class CopiedProjection(nn.Module):
    """A split projection as E whole copies with a mask for each gradient, and one more copy that is evaluated."""

    def __init__(self, compact: SparseProjection, rows: slice = slice(None)) -> None:
        """Copies of the weights that each expert of the compact form computes with; rows: those of one target."""
        super().__init__()
        assert compact.owner is not None
        weight, owner = compact.weight[rows], compact.owner[rows]
        origin = torch.zeros_like(weight) if compact.init is None else compact.init[rows]
        biases = [None] * compact.experts if compact.bias is None else compact.bias_rows()[:, rows]
        self.masks: Tensor
        self.register_buffer("masks", torch.stack([owner == expert for expert in range(compact.experts)]))
        self.linears = [
            Linear(torch.where(mask, weight, origin), bias) for mask, bias in zip(self.masks, biases, strict=True)
        ]
        self.copies = nn.ModuleList(self.linears)
        self.merged = copy.deepcopy(self.linears[0]).requires_grad_(False)

    def choose(self, expert: int | None) -> nn.Module:
        """The copy of an expert; None: the merged one."""
        return self.merged if expert is None else self.linears[expert]

    def mask_gradients(self) -> None:
        """Keep what each copy owns; copies that were not drawn have no gradient."""
        for linear, mask in zip(self.linears, self.masks, strict=True):
            if linear.weight.grad is not None:
                linear.weight.grad.mul_(mask)

    def gradient(self) -> Tensor:
        """Of the weight, in the compact form; copies that were not drawn have zeros."""
        return torch.stack([gradient(linear.weight) for linear in self.linears]).sum(0)

    @torch.no_grad()
    def merge(self) -> None:
        """Average the copies."""
        for name, merged in self.merged.named_parameters():
            merged.copy_(torch.stack([getattr(linear, name) for linear in self.linears]).mean(0))


class DenseAdapter(nn.Module):
    """AdaptFormer's parallel adapter (arXiv 2205.13535, section 3.2) with the norm that MoSA's has."""

    def __init__(self, compact: SparseAdapter) -> None:
        """Weights of the compact adapter's shapes."""
        super().__init__()
        assert compact.norm is not None  # adaptformer, beside the MLP
        self.norm = _Norm(compact.norm)
        self.down = Linear(compact.down.weight, compact.down.bias_rows()[0])
        self.up = self.make_up(compact.up)
        self.scale, self.dropout = compact.scale, compact.dropout

    def make_up(self, compact: SparseProjection) -> Any:
        """The up-projection."""
        return Linear(compact.weight, compact.bias_rows()[0])

    def choose(self, expert: int | None) -> nn.Module:
        """The only up-projection."""
        return self.up

    def forward(self, h: Tensor, up: nn.Module) -> Tensor:
        """`[N, T, D]` to the same, through a chosen up-projection."""
        hidden = F.gelu(self.down(self.norm(h)))
        return self.scale * up(F.dropout(hidden, self.dropout, self.training))


class CopiedAdapter(DenseAdapter):
    """Dense down-projection and E copies of the up-projection: what MoSA's default is to the paper's code."""

    def make_up(self, compact: SparseProjection) -> CopiedProjection:
        """The copies."""
        return CopiedProjection(compact)

    def choose(self, expert: int | None) -> nn.Module:
        """The up-projection of an expert; None: the merged one."""
        return self.up.choose(expert)

    def mask_gradients(self) -> None:
        """As the projection's."""
        self.up.mask_gradients()

    def merge(self) -> None:
        """As the projection's."""
        self.up.merge()

    def gradients(self) -> dict[str, Tensor]:
        """By the names and in the shapes of the compact form; copies that were not drawn have zeros."""
        biases = torch.stack([gradient(linear.bias) for linear in self.up.linears])
        found = {"up.weight": self.up.gradient(), "up.bias": biases}
        found |= {f"norm.{name}": gradient(parameter) for name, parameter in self.norm.named_parameters()}
        return found | {"down.weight": gradient(self.down.weight), "down.bias": gradient(self.down.bias)[None]}


def gradient(parameter: Tensor) -> Tensor:
    """A copy of its gradient; zeros where there is none."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()


def _branch(adapter: nn.Module, up: nn.Module, h: Tensor, skip: Tensor) -> Tensor:
    """The residual stream, the MLP's output and the adapter's."""
    return h + skip + adapter(h, up)


def _block(block: Block, adapter: nn.Module, up: nn.Module, x: Tensor) -> Tensor:
    """A timm block (without LayerScale and drop-path) whose adapter is parallel to its MLP."""
    h = x + block.attn(block.norm1(x))
    return _branch(adapter, up, h, block.mlp(block.norm2(h)))


class _PlainBlock(nn.Module):
    """A timm block and its plain adapter, in the block's place."""

    def __init__(self, block: Block, adapter: DenseAdapter, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.block, self.adapter, self.function = block, adapter, function
        self.expert: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        """`[N, T, D]` to the same."""
        return self.function(self.block, self.adapter, self.adapter.choose(self.expert), x)


class PlainModel(nn.Module):
    """A ViT with plain adapters at one level; a forward is one view, or several that are all alike."""

    def __init__(self, vit: VisionTransformer, adapters: Sequence[DenseAdapter], level: Level, compiled: bool) -> None:
        """Put the adapters into a copy of the backbone; compiled: by torch.compile, block by block."""
        super().__init__()
        # A graph of the whole model would be one of E ** blocks.
        compile_: Callable[..., Any] = partial(torch.compile, dynamic=False) if compiled else lambda function: function
        self.vit, self.level = copy.deepcopy(vit), level
        self.branch: Callable[..., Tensor] = compile_(_branch)
        function = compile_(_block)
        self.adapted = [
            _PlainBlock(block, adapter, function)  # type: ignore[arg-type]  # timm's Sequential is one of Modules
            for block, adapter in zip(self.vit.blocks, adapters, strict=True)
        ]
        self.vit.blocks = nn.Sequential(*self.adapted)

    def forward(self, *inputs: Tensor, experts: list[int] | None = None) -> Tensor:
        """The level's output; experts: of every adapter, or None for the merged ones."""
        for index, block in enumerate(self.adapted):
            block.expert = None if experts is None else experts[index]
        if self.level == "operator":
            (block,) = self.adapted
            return self.branch(block.adapter, block.adapter.choose(block.expert), *inputs)
        return self.vit.blocks(*inputs) if self.level == "block" else self.vit(*inputs)
