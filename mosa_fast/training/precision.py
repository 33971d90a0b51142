"""Arithmetic of a run: which weights are stored in which dtype, and under which autocast the model runs.

Frozen weights are stored once in the dtype they are used in. Trained weights stay float32 and, with them, the state of
AdamW. In the mixed precisions norms, embeddings and LayerScale stay float32 and so does the residual stream.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mosa_fast.backbones.heads import classifiers
from mosa_fast.config import Precision

AUTOCAST = {"bf16-mixed": torch.bfloat16, "fp16-mixed": torch.float16}


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """The context that forward passes run in."""
    dtype = AUTOCAST.get(precision)
    # The cache would keep cast copies of trained weights alive across the parts of a captured step.
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype, cache_enabled=False)


def input_dtype(precision: Precision) -> torch.dtype:
    """Dtype of the images that the model is given."""
    return torch.bfloat16 if precision == "bf16-true" else torch.float32


def store_frozen(model: Any, precision: Precision) -> None:
    """Convert the frozen weights of a timm model, adapted or not, to the dtype they are used in, in place."""
    if precision in AUTOCAST:
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                _convert(module, AUTOCAST[precision])
    elif precision == "bf16-true":
        trained_parts = {id(m) for head in classifiers(model) for m in head.modules()}
        for module in model.modules():
            if id(module) not in trained_parts and not any(p.requires_grad for p in module.parameters(recurse=False)):
                _convert(module, torch.bfloat16)
        for head in classifiers(model):
            head.register_forward_pre_hook(_to_weight_dtype)  # the head is trained: float32 after a bfloat16 stream


def _convert(module: nn.Module, dtype: torch.dtype) -> None:
    for parameter in module.parameters(recurse=False):
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    for name, buffer in module.named_buffers(recurse=False):
        if buffer.is_floating_point():
            module._buffers[name] = buffer.to(dtype)


def _to_weight_dtype(head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    weight = next(head.parameters(), None)
    return inputs if weight is None else (inputs[0].to(weight.dtype), *inputs[1:])
