"""What a run can train: one row a method. Everything that asks what a method is reads its row.

A new method is a row of METHODS and, where it trains what no other does, a function that picks those parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import nn

    Pick = Callable[[nn.Module, Sequence[nn.Module]], Iterable[nn.Parameter]]


@dataclass(frozen=True)
class Method:
    """One row.

    Attributes:
        name: what `--method` calls it.
        meaning: what it trains, for `--help`.
        trained: picks the trained parameters from a timm model and its classification heads; adapters, where the method
            has them, are trained as well.
        adapters: fields of the adapter section that the method fixes; None: no adapters are put in.
        views: stochastic passes of a batch; None: as many as loss.views says. More than one needs adapters.
        pretrained: whether the backbone starts from its pretrained weights where model.pretrained says so.
    """

    name: str
    meaning: str
    trained: Pick
    adapters: Mapping[str, Any] | None = None
    views: Literal[1, 2] | None = 1
    pretrained: bool = True

    @property
    def has_adapters(self) -> bool:
        """Whether adapters are put into the backbone; what is trained is then kept in an adapter file."""
        return self.adapters is not None

    @property
    def freezes_backbone(self) -> bool:
        """Whether the backbone keeps all its weights, so that they can be stored in half precision."""
        return self.trained is head


def head(model: nn.Module, heads: Sequence[nn.Module]) -> Iterable[nn.Parameter]:
    """The classification heads' parameters."""
    return (parameter for module in heads for parameter in module.parameters())


def everything(model: nn.Module, heads: Sequence[nn.Module]) -> Iterable[nn.Parameter]:
    """All parameters."""
    return model.parameters()


METHODS = {
    row.name: row
    for row in (
        Method("mosa", "a mixture of sparse adapters, and the head", head, adapters={}, views=None),
        Method("adapter", "dense adapters (one expert, one view), and the head", head, adapters={"experts": 1}),
        Method("linear", "the head", head),
        Method("full", "all weights, from the pretrained ones", everything),
        Method("scratch", "all weights, from random ones", everything, pretrained=False),
    )
}
MEANINGS = f"{'; '.join(f'{row.name}: {row.meaning}' for row in METHODS.values())}."

if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal[tuple(METHODS)]
