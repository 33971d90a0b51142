"""Turning mixtures into dense adapters."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from mosa_fast.adapters.model import adapters

Model = TypeVar("Model", bound=nn.Module)


def merge(model: Model) -> Model:
    """Replace every mixture by the dense adapter that evaluation uses, in place.

    Raises:
        ValueError: the model has no adapters.
    """
    for adapter in adapters(model):
        adapter.merge()
    return model
