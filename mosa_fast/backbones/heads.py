"""What turns a timm model's last tokens into logits and is made for the task."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn


def classifiers(model: nn.Module) -> tuple[nn.Module, ...]:
    """The classification heads of a timm model (a distilled one has two), and attention pooling that is not pretrained.

    `timm.create_model(name, global_pool="map")` makes the pooling anew where the architecture has another one.
    """
    timm_model: Any = model
    heads = timm_model.get_classifier()
    heads = heads if isinstance(heads, tuple) else (heads,)
    pooling = getattr(model, "attn_pool", None)
    return heads if pooling is None or _pools_by_attention(timm_model) else (*heads, pooling)


def _pools_by_attention(model: Any) -> bool:
    """Whether a timm model's architecture, as it is pretrained, ends in attention pooling."""
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if not name or not timm.is_model(name):
        return True  # nobody can tell; what it has came with its weights
    with torch.device("meta"):
        return getattr(timm.create_model(name), "attn_pool", None) is not None
