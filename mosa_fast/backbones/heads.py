"""What turns a timm model's last tokens into logits and is made for the task."""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

from mosa_fast.backbones.structure import structure_of


def classifiers(model: nn.Module) -> tuple[nn.Module, ...]:
    """The classification heads of a timm model (a distilled one has two), and attention pooling that is not pretrained.

    `timm.create_model(name, global_pool="map")` makes the pooling anew where the architecture has another one.
    """
    pooling = getattr(model, "attn_pool", None)
    return heads(model) if pooling is None or _pools_by_attention(model) else (*heads(model), pooling)


def heads(model: nn.Module) -> tuple[nn.Module, ...]:
    """What `get_classifier` gives: a module for each head, the identity where there are no classes."""
    timm_model: Any = model
    found = timm_model.get_classifier()
    return found if isinstance(found, tuple) else (found,)


def _pools_by_attention(model: Any) -> bool:
    """Whether a timm model's architecture, as it is pretrained, ends in attention pooling."""
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if not name or not timm.is_model(name):
        return True  # nobody can tell; what it has came with its weights
    return getattr(structure_of(name), "attn_pool", None) is not None
