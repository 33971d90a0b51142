"""The LoRA layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mosa_fast.config import MoSAConfig
from mosa_fast.nn.mixture import MixtureLayer
from mosa_fast.nn.projection import SparseProjection
from mosa_fast.ops import sparse_lora
from mosa_fast.ops.call import describe
from mosa_fast.ops.reference import MERGED
from mosa_fast.options import Facts, check_value

Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


class SparseLoRA(MixtureLayer):
    """Low-rank pairs on a frozen linear, split among experts (MoSL; docs/method.md, MoSL).

    For every target, a range of the linear's output columns with a pair (A, B) of its own:
    `y[..., target] + scale * B_e(A_e(x))`. A training pass computes with one expert of each split projection;
    evaluation with all of them merged, always from the current weights (`mosa_fast.nn.kept`: which writes it can see).

    Args:
        in_features: width D of what the linear reads.
        columns: T half-open ranges of its output columns, in ascending order.
        rank: rank r of every pair.
        experts: number of experts E, 1 to 255.
        share: the projection that is NOT split: "down" (A), "up" (B), or "none".
        scale: factor on what is added: a number, or "trainable" (learned, from 1.0).
        merge, routing: see `MoSAConfig`.
        generator: CPU generator of owner maps and initial weights; torch's global one when None.

    Shapes:
        x: `[N, ..., D]`, y: `[N, ..., O]`; result: as y, or `[V * N, ..., O]` with `fork`.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        in_features: int,
        columns: Sequence[tuple[int, int]],
        rank: int = 16,
        experts: int = 4,
        *,
        share: str = "down",
        scale: float | str = 1.0,
        merge: str = "mean",
        routing: str = "random",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        config = MoSAConfig(
            method="lora",
            rank=rank,
            experts=experts,
            share=share,  # type: ignore[arg-type]  # checked by the config
            scale=scale,  # type: ignore[arg-type]
            merge=merge,  # type: ignore[arg-type]
            routing=routing,  # type: ignore[arg-type]
        )
        check_value("in_features", in_features, int, Facts(low=1))
        ends = [0, *(end for start_and_stop in columns for end in start_and_stop)]
        if len(ends) == 1 or ends != sorted(ends) or any(start == stop for start, stop in columns):
            raise ValueError(f"columns must be ascending ranges, none of them empty, got {columns}")
        super().__init__(config, device, dtype)
        self.columns = tuple(columns)
        widths = [stop - start for start, stop in self.columns]
        factory: dict[str, Any] = {"generator": generator, "device": device, "dtype": dtype}
        ranks = [rank] * len(widths)
        self.down = SparseProjection(
            in_features, ranks, experts, split=share != "down", zero_init=False, bias=None, **factory
        )
        self.up = SparseProjection(rank, widths, experts, split=share != "up", zero_init=True, bias=None, **factory)

    @property
    def draws(self) -> int:
        """Pairs of experts that a pass draws: one for every target."""
        return len(self.columns)

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        experts: Tensor | None = None,
        *,
        seed: Tensor | int | None = None,
        fork: bool = False,
    ) -> Tensor:
        """Add the targets' low-rank parts to the linear's output.

        Args:
            x: `[N, ..., D]`, what the linear reads.
            y: `[N, ..., O]`, what it gives.
            experts: int32 `[T, V, 2]`, the (down, up) expert of each target and group of samples. None: drawn in
                training, merged in evaluation; expert 0 in both, where the configuration's routing is fixed.
            seed: of the draw: an int, or int64 `[1]` or `[2]` (`mosa_fast.routing`). None: fresh.
            fork: let each of the V groups read all of x and y.
        """
        if x.shape[-1] != self.down.weight.shape[1]:
            raise ValueError(f"x must be [N, ..., {self.down.weight.shape[1]}], got {describe(x)}")
        sources = self.kept_sources()
        if experts is not None:
            weights = self._weights(self.down.init)
        elif sources is not None:
            weights, experts = self._kept.get(sources, "merged", self._merged_weights)
        else:
            experts, down_init = self.own_experts(seed, x.device)
            weights = self._weights(down_init)
        return sparse_lora(
            x,
            y,
            *weights,
            experts,
            columns=self.columns,
            num_experts=self.config.experts,
            scale=self.scale,
            fork=fork,
        )

    def _weights(self, down_init: Tensor | None) -> Weights:
        """The weights as the operator takes them. down_init: W0 of the down-projections, where the pass has it."""
        return self.down.weight, self.up.weight, down_init, self.down.owner, self.up.owner

    def _merged_weights(self) -> tuple[Weights, Tensor]:
        """The weights of dense pairs that compute what evaluation does, and the experts that they are called with."""
        down, _, up, _ = self.merged()
        experts = torch.full((self.draws, 1, 2), MERGED, dtype=torch.int32, device=down.device)
        return (down, up, None, None, None), experts

    def extra_repr(self) -> str:
        """What repr shows."""
        return f"columns={self.columns}, {super().extra_repr()}"
