"""The LoRA layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mosa_fast.config import MoSAConfig
from mosa_fast.nn.projection import SparseProjection
from mosa_fast.nn.sparse_adapter import FIXED
from mosa_fast.ops import sparse_lora
from mosa_fast.ops.call import describe
from mosa_fast.ops.reference import MERGED
from mosa_fast.routing import as_seed, draw


class SparseLoRA(nn.Module):
    """Low-rank pairs on a frozen linear, split among experts (MoSL; docs/method.md, MoSL).

    For every target, a range of the linear's output columns with a pair (A, B) of its own:
    `y[..., target] + scale * B_e(A_e(x))`. A training pass computes with one expert of each split projection;
    evaluation with all of them merged, always from the current weights.

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
        super().__init__()
        self.config = MoSAConfig(
            method="lora",
            rank=rank,
            experts=experts,
            share=share,  # type: ignore[arg-type]  # checked by the config
            scale=scale,  # type: ignore[arg-type]
            merge=merge,  # type: ignore[arg-type]
            routing=routing,  # type: ignore[arg-type]
        )
        self.columns = tuple(columns)
        widths = [stop - start for start, stop in self.columns]
        factory: dict[str, Any] = {"generator": generator, "device": device, "dtype": dtype}
        ranks = [rank] * len(widths)
        self.down = SparseProjection(
            in_features, ranks, experts, split=share != "down", zero_init=False, bias=None, **factory
        )
        self.up = SparseProjection(rank, widths, experts, split=share != "up", zero_init=True, bias=None, **factory)
        self.scale: nn.Parameter | float
        if scale == "trainable":
            self.scale = nn.Parameter(torch.ones(1, device=device, dtype=dtype))
        else:
            self.scale = float(scale)

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
        down_init = self.down.init
        fixed = self.config.routing == "fixed"
        if experts is None and self.training and not fixed:
            experts = draw(as_seed(seed, x.device), self.draws, 1, self.config.experts).experts
        elif experts is None:
            experts = torch.full((self.draws, 1, 2), FIXED if fixed else MERGED, dtype=torch.int32, device=x.device)
            if self.config.merge == "joint" and not fixed:
                down_init = None
        return sparse_lora(
            x,
            y,
            self.down.weight,
            self.up.weight,
            down_init,
            self.down.owner,
            self.up.owner,
            experts,
            columns=self.columns,
            num_experts=self.config.experts,
            scale=self.scale,
            fork=fork,
        )

    def merge(self) -> None:
        """Replace the experts by the dense pairs of evaluation, in place."""
        expert = FIXED if self.config.routing == "fixed" else None
        self.down.merge(self.config.merge, expert)
        self.up.merge(self.config.merge, expert)
        self.config = replace(self.config, experts=1)

    @property
    def merged_parameters(self) -> int:
        """Number of trained values that remain after merging."""
        trained_scale = self.scale.numel() if isinstance(self.scale, nn.Parameter) else 0
        return self.down.merged_parameters + self.up.merged_parameters + trained_scale

    def extra_repr(self) -> str:
        """What repr shows."""
        scale = "trainable" if isinstance(self.scale, nn.Parameter) else self.scale
        return f"columns={self.columns}, scale={scale}"
