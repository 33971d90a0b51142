"""What layers of a mixture have in common, whatever lies between their two projections."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mosa_fast.config import MoSAConfig
from mosa_fast.nn.kept import Kept
from mosa_fast.nn.projection import SparseProjection
from mosa_fast.ops.reference import MERGED
from mosa_fast.routing import as_seed, draw

FIXED = 0  # the expert of a layer that is not routed


class MixtureLayer(nn.Module):
    """A down- and an up-projection that are split among experts, and a factor on what they give.

    A subclass makes the projections, and says how many pairs of experts a pass draws.

    Attributes:
        config: what the layer was made with; in a model, the very configuration that this was given.
        down, up: the projections.
        scale: the factor: a number, or a parameter `[1]` that starts at 1.0.
    """

    down: SparseProjection
    up: SparseProjection
    scale: nn.Parameter | float

    def __init__(self, config: MoSAConfig, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self._kept = Kept()
        if config.scale == "auto":
            raise ValueError("scale must be given to a layer: 'auto' is for a placement in a model to choose")
        self.config = config
        if config.scale == "trainable":
            self.scale = nn.Parameter(torch.ones(1, device=device, dtype=dtype))
        else:
            self.scale = float(config.scale)

    @property
    def draws(self) -> int:
        """Pairs of experts that a pass draws."""
        raise NotImplementedError

    @property
    def draws_experts(self) -> bool:
        """Whether a pass that is given no experts draws them."""
        return self.training and self.config.routing == "random"

    def own_experts(self, seed: Tensor | int | None, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """The experts of a pass that is given none: drawn in training, else merged; or always the fixed one.

        Returns:
            int32 `[draws, 1, 2]`, and the down-projection's W0 that they are computed with: None where there is none,
            or where the joint merge leaves it out.
        """
        init = self.down.init
        if self.draws_experts:
            return draw(as_seed(seed, device), self.draws, 1, self.config.experts).experts, init
        fixed = self.config.routing == "fixed"
        experts = torch.full((self.draws, 1, 2), FIXED if fixed else MERGED, dtype=torch.int32, device=device)
        return experts, None if self.config.merge == "joint" and not fixed else init

    def sources(self) -> tuple[Tensor | None, ...]:
        """All that evaluation's weights are made from."""
        return *self.down.sources(), *self.up.sources()

    def kept_sources(self) -> tuple[Tensor | None, ...] | None:
        """The sources, where a pass may compute with what is kept of them; None: it may not.

        To be asked in every pass, since it notices training.
        """
        if self.draws_experts:
            return None
        sources = self.sources()
        return sources if self._kept.serves(sources) else None

    @property
    def evaluated(self) -> int | None:
        """The expert that evaluation computes with; None: all of them, merged."""
        return FIXED if self.config.routing == "fixed" else None

    def merge(self) -> None:
        """Replace the experts by the dense layer of evaluation, in place (docs/method.md, Merge)."""
        self.down.merge(self.config.merge, self.evaluated)
        self.up.merge(self.config.merge, self.evaluated)
        self.config = replace(self.config, experts=1)

    def merged(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Weight and bias of both projections as evaluation computes with them: what `merge` would leave."""
        rule = self.config.merge
        return *self.down.dense(rule, self.evaluated), *self.up.dense(rule, self.evaluated)

    def train(self, mode: bool = True) -> MixtureLayer:
        """Set the mode; what was kept for evaluation is dropped."""
        self._kept = Kept()
        super().train(mode)
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> MixtureLayer:
        self._kept = Kept()  # weights of another type or place
        super()._apply(*args, **kwargs)
        return self

    def _replicate_for_data_parallel(self) -> MixtureLayer:
        replica: MixtureLayer = super()._replicate_for_data_parallel()
        replica._kept = Kept()  # its weights are copies on another device
        return replica

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold: not what is kept."""
        return self.__dict__ | {"_kept": Kept()}

    @property
    def merged_parameters(self) -> int:
        """Number of trained values that remain after merging."""
        trained_scale = self.scale.numel() if isinstance(self.scale, nn.Parameter) else 0
        return self.down.merged_parameters + self.up.merged_parameters + trained_scale

    def extra_repr(self) -> str:
        """What repr shows."""
        return f"scale={'trainable' if isinstance(self.scale, nn.Parameter) else self.scale}"


def adapters(model: nn.Module) -> Iterator[Any]:
    """The mixture layers in a model (SparseAdapter, SparseLoRA), whatever wraps it or its blocks, as they run.

    Raises:
        ValueError: it has none.
    """
    found = False
    for module in model.modules():
        if isinstance(module, MixtureLayer):
            found = True
            yield module
    if not found:
        raise ValueError(f"{type(model).__name__} has no adapters; call adapt(model, config) first")
