"""Empty stacks in the places of a timm model's heads and adapters, for a bank; and the model as it was."""

from __future__ import annotations

from typing import Any

from torch import nn

from mosa_fast.adapters.block import AdaptedBlock
from mosa_fast.adapters.linears import LoRALinear
from mosa_fast.adapters.model import AdaptedModel
from mosa_fast.adapters.seams import call_qkv_as_module
from mosa_fast.backbones.heads import heads
from mosa_fast.nn.stacks import AdapterStack, LinearStack, LoRAStack


def put_stacks(backbone: nn.Module, adapted: AdaptedModel) -> dict[str, nn.Module]:
    """Put empty stacks where a task has its adapters and heads.

    Returns:
        What was in the places of the heads, by path, for `take_stacks`; the blocks are kept by their wrappers.

    Raises:
        ValueError: a head is more than a linear. Nothing is changed.
    """
    replaced = {path: backbone.get_submodule(path) for path in _linear_heads(adapted.backbone)}
    for path in replaced:
        backbone.set_submodule(path, LinearStack())
    for path, like in list(adapted.backbone.named_modules()):
        if isinstance(like, AdaptedBlock):
            backbone.set_submodule(path, _stacked(backbone.get_submodule(path), like))
    return replaced


def take_stacks(backbone: nn.Module, replaced: dict[str, nn.Module], structure: nn.Module) -> None:
    """Undo `put_stacks`.

    Args:
        backbone: what it changed.
        replaced: what it returned.
        structure: the model as it was, which need not have data.
    """
    for path, head in replaced.items():
        backbone.set_submodule(path, head)
    for path, wrapper in list(backbone.named_modules()):
        if isinstance(wrapper, AdaptedBlock):
            block: Any = wrapper.block
            for name, linear in list(block.named_modules()):
                if isinstance(linear, LoRALinear):
                    block.set_submodule(name, linear.linear)
            original: Any = structure.get_submodule(path)
            if wrapper.linears:
                call_qkv_as_module(block, getattr(original.attn, "qkv_bias_separate", False))
            backbone.set_submodule(path, block)


def _stacked(block: nn.Module, like: AdaptedBlock) -> AdaptedBlock:
    """A timm block with empty stacks where another one has its adapters."""
    for path, linear in like.block.named_modules():
        if isinstance(linear, LoRALinear):
            call_qkv_as_module(block)
            lora: Any = linear.lora
            block.set_submodule(path, LoRALinear(block.get_submodule(path), LoRAStack(lora)))
    stacks: dict[str, Any] = {name: AdapterStack(getattr(like, name)) for name in like.adapter_names}
    return AdaptedBlock(block, like.placement, stacks).eval()


def _linear_heads(backbone: nn.Module) -> list[str]:
    """Where the linears of a timm model's heads are.

    Raises:
        ValueError: a head is more than a linear.
    """
    paths = []
    for path, head in backbone.named_modules():
        if any(head is known for known in heads(backbone)):
            weighted = [
                (name, module) for name, module in head.named_modules() if list(module.parameters(recurse=False))
            ]
            if len(weighted) != 1 or type(weighted[0][1]) is not nn.Linear:
                raise ValueError(f"a bank holds linear heads, but {path} is {head}")
            paths.append(f"{path}.{weighted[0][0]}".removesuffix("."))
    return paths
