"""Which epoch a run reports."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mosa_fast.adapters.adapter_file import trained_state


class Selection:
    """The epoch with the best validation accuracy, the first where several tie; the last, where nothing is validated.

    Args:
        patience: validations in a row without a better one that end a run; None: any number.

    Attributes:
        epoch: the epoch selected so far, 0 for none.
        val_accuracy: its accuracy in percent; None where there are no validation images.
        weights: its trained weights, by name.
    """

    def __init__(self, patience: int | None = None) -> None:
        self.patience = patience
        self.epoch = 0
        self.val_accuracy: float | None = None
        self.weights: dict[str, Tensor] = {}
        self._validations_since = 0

    @property
    def patience_is_over(self) -> bool:
        """Whether there were enough validations in a row without a better one."""
        return self.patience is not None and self._validations_since >= self.patience

    def validated(self, epoch: int, val_accuracy: float, model: nn.Module) -> None:
        """Take an epoch into account, and its weights if it is better than all before."""
        if self.val_accuracy is None or val_accuracy > self.val_accuracy:
            self.select(epoch, val_accuracy, model)
        else:
            self._validations_since += 1

    def select(self, epoch: int, val_accuracy: float | None, model: nn.Module) -> None:
        """Select an epoch; the model's trained weights of this moment are copied."""
        self.epoch, self.val_accuracy, self._validations_since = epoch, val_accuracy, 0
        self.weights = {name: tensor.detach().clone() for name, tensor in trained_state(model).items()}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "epoch": self.epoch,
            "val_accuracy": self.val_accuracy,
            "validations_since": self._validations_since,
            "weights": self.weights,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.epoch, self.val_accuracy = state["epoch"], state["val_accuracy"]
        self._validations_since, self.weights = state["validations_since"], state["weights"]
