"""A trained model in PyTorch's own operations, with what somebody needs to know who uses it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from mosa_fast.adapters.fold import fold, merge
from mosa_fast.adapters.model import AdaptedModel
from mosa_fast.data.preprocessing import Preprocessing
from mosa_fast.version import __version__

MARK = "mosa_fast"  # by what an export is known as one


@dataclass(frozen=True)
class PlainModel:
    """A model in float32, on the CPU, in evaluation mode, of images `[B, 3, H, W]` to logits `[B, classes]`.

    Attributes:
        model: of timm, or an adapted one that is merged.
        create_kwargs: with which timm.create_model makes the model; None where it cannot.
        classes: names, by label.
        preprocessing: from an image to what the model takes.
        merged_because: why the adapters are still there, merged; None: they are not.
    """

    model: Any
    create_kwargs: dict[str, Any] | None
    classes: list[str]
    preprocessing: Preprocessing
    merged_because: str | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`[3, H, W]`."""
        return 3, self.preprocessing.image_size, self.preprocessing.image_size

    def information(self) -> dict[str, str]:
        """What travels with the weights, as JSON, by name."""
        facts = {
            "classes": self.classes,
            "preprocessing": self.preprocessing.to_dict(),
            MARK: __version__,
        }
        return {name: json.dumps(fact, ensure_ascii=False) for name, fact in facts.items()}


def plain_model(model: Any, classes: list[str], preprocessing: Preprocessing) -> PlainModel:
    """Fold a trained model where that is exact, else merge it in place.

    Args:
        model: of timm, adapted or not, in float32, on the CPU.
        classes: names, by label.
        preprocessing: of its images.
    """
    reason = None
    if isinstance(model, AdaptedModel):
        try:
            model = fold(model)
        except ValueError as error:
            reason = str(error)
            model = merge(model)
    kwargs: dict[str, Any] | None = None
    if reason is None:
        # Rates of dropout change no weight, and nothing where the model is only used.
        kept = {name: value for name, value in model._model_args.items() if not name.endswith("_rate")}
        kwargs = kept | {"num_classes": model.num_classes}
    return PlainModel(model.eval().requires_grad_(False), kwargs, classes, preprocessing, reason)
