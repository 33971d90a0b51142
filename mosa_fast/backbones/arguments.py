"""What a timm model was made with: newer versions of timm keep it, and 1.0.20 does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def keep_arguments(model: Any, arguments: Mapping[str, Any]) -> None:
    """Let a model know all arguments of the timm.create_model that made it, where timm did not see to that."""
    if not hasattr(model, "_model_args"):
        model._model_args = dict(arguments)
