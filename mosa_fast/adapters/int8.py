"""A frozen backbone with weights in int8, by torchao: a quarter of float32's memory, at some of its time."""

from __future__ import annotations

from typing import Any

from torch import nn

from mosa_fast.adapters.block import AdaptedBlock
from mosa_fast.adapters.seams import call_quantised_qkv


def quantise_backbone(model: nn.Module) -> None:
    """Store the frozen linears of a model's adapted blocks in int8, one scale a row, in place.

    Products are computed in the dtype of what is multiplied. Adapters, head and what else is trained stay as they are,
    and train as before: gradients flow through the quantised products. `adapt` and `load_adapter` take a timm model
    that torchao has quantised before, too (but for its head, which is trained).

    Args:
        model: adapted.

    Raises:
        ValueError: torchao is not installed, or not a version for the installed torch; or the model has no adapters.
    """
    blocks = [module for module in model.modules() if isinstance(module, AdaptedBlock)]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no adapters: call adapt(model, config) first")
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        needed = 'int8 needs the package torchao, in a version for the installed torch: pip install "mosa_fast[int8]"'
        raise ValueError(f"{needed} ({error})") from None
    # By itself torchao changes global settings of torch's products and compiler.
    config: Any = Int8WeightOnlyConfig(set_inductor_config=False)
    for block in blocks:
        quantize_(block.block, config, filter_fn=lambda module, _: _is_frozen_linear(module))
        call_quantised_qkv(block.block)


def _is_frozen_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear and not module.weight.requires_grad
