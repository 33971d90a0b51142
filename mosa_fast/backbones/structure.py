"""A timm model's modules without its weights, to ask what it is made of."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn


def structure_of(name: str, **options: Any) -> nn.Module:
    """The timm model of that name on the meta device: nothing is downloaded, drawn or stored.

    Args:
        name: as timm.create_model takes it.
        options: of the model.
    """
    try:
        with torch.device("meta"):
            return timm.create_model(name, **options)
    except RuntimeError:  # timm 1.0.20 asks for the values of a range, which this device does not have
        return timm.create_model(name, **options)
