"""What a run can train: one row a method. Everything that asks what a method is reads its row.

A new method is a row of METHODS and, where it trains what no other does, a function that picks those parameters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import nn

    Pick = Callable[[nn.Module, Sequence[nn.Module], int], Iterable[nn.Parameter]]

# A block in the name of a parameter, wherever timm's families keep theirs: blocks.3, layers.2.blocks.17
BLOCK = re.compile(r"(?:.+\.)?blocks\.\d+(?=\.)")
FINAL_NORM = re.compile(r"(?:norm|fc_norm|head\.norm)\.")


@dataclass(frozen=True)
class Method:
    """One row.

    Attributes:
        name: what `--method` calls it.
        meaning: what it trains, for `--help`.
        trained: picks the trained parameters from a timm model, its classification heads and the number of blocks that
            `partial_blocks` says; adapters, where the method has them, are trained as well.
        adapters: fields of the adapter section that the method fixes; None: no adapters are put in.
        views: stochastic passes of a batch where loss.views does not say; what has no adapters has one.
        pretrained: whether the backbone starts from its pretrained weights where model.pretrained says so.
    """

    name: str
    meaning: str
    trained: Pick
    adapters: Mapping[str, Any] | None = None
    views: Literal[1, 2] = 1
    pretrained: bool = True

    @property
    def has_adapters(self) -> bool:
        """Whether adapters are put into the backbone; what is trained is then kept in an adapter file."""
        return self.adapters is not None

    @property
    def freezes_backbone(self) -> bool:
        """Whether the backbone keeps all its weights, so that they can be stored in half precision."""
        return self.trained is head

    def views_of(self, asked: Literal[1, 2] | None) -> Literal[1, 2]:
        """Views of a batch, where loss.views is `asked`."""
        return asked or self.views if self.has_adapters else 1


def head(model: nn.Module, heads: Sequence[nn.Module], blocks: int) -> Iterable[nn.Parameter]:
    """The classification heads' parameters."""
    return (parameter for module in heads for parameter in module.parameters())


def biases(model: nn.Module, heads: Sequence[nn.Module], blocks: int) -> Iterable[nn.Parameter]:
    """Every parameter of the backbone whose name ends in "bias", and the heads (BitFit; arXiv 2106.10199)."""
    yield from (parameter for name, parameter in model.named_parameters() if name.endswith("bias"))
    yield from head(model, heads, blocks)


def last_blocks(model: nn.Module, heads: Sequence[nn.Module], blocks: int) -> Iterable[nn.Parameter]:
    """The last `blocks` blocks, the final norm and the heads; ValueError where a model has not so many `blocks`."""
    found = {name: match[0] for name, _ in model.named_parameters() if (match := BLOCK.match(name))}
    if not found:
        raise ValueError(f"method partial needs a model made of blocks, {type(model).__name__} has none of that name")
    names = list(dict.fromkeys(found.values()))
    if blocks > len(names):
        raise ValueError(f"partial_blocks must be at most {len(names)}, which the model has, got {blocks}")
    last = names[-blocks:]
    for name, parameter in model.named_parameters():
        if found.get(name) in last or FINAL_NORM.match(name):
            yield parameter
    yield from head(model, heads, blocks)


def everything(model: nn.Module, heads: Sequence[nn.Module], blocks: int) -> Iterable[nn.Parameter]:
    """All parameters."""
    return model.parameters()


METHODS = {
    row.name: row
    for row in (
        Method("mosa", "a mixture of sparse adapters, and the head", head, adapters={}, views=2),
        Method("adapter", "dense adapters (one expert), and the head", head, adapters={"experts": 1}),
        Method("lora", "dense low-rank pairs, and the head", head, adapters={"method": "lora", "experts": 1}),
        Method("random_mask", "one fixed expert of the sparse adapters, and the head", head, {"routing": "fixed"}),
        Method("bias", "the backbone's biases, and the head", biases),
        Method("partial", "the last blocks, the final norm, and the head", last_blocks),
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
