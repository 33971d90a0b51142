"""A linear projection that is split among experts, or dense."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mosa_fast.config import BiasMode, MergeRule, check_experts
from mosa_fast.partition import check_owner_map, owner_map


class SparseProjection(nn.Module):
    """One weight, the map of who owns its elements, and W0 where that is not zero (docs/method.md, The compact form).

    Args:
        in_features, out_features: widths. Several out_features: as many matrices, one below the other, each of which
            is divided among the experts by itself.
        experts: number of experts E; a projection of one expert is dense.
        split: divide the weight among the experts; False: a dense projection.
        zero_init: start the weight at zero (up-projections); False: Kaiming-uniform as nn.Linear (down-projections).
        bias: "per_expert" rows, or one vector whose elements are "split" among the experts; None: there is none.
        generator: CPU generator of the owner maps and initial weights.

    Attributes:
        weight: float32 parameter `[out, in]`.
        bias: float32 parameter `[E, out]`, or `[1, out]` dense, or `[out]` where it is split; zero at first; or None.
        owner: uint8 buffer `[out, in]`, or None when dense.
        init: float32 buffer `[out, in]`, W0 of a split weight that does not start at zero, else None.
        bias_owner: uint8 buffer `[out]` of a split bias, else None.
    """

    owner: Tensor | None
    init: Tensor | None
    bias_owner: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int | Sequence[int],
        experts: int,
        *,
        split: bool,
        zero_init: bool,
        bias: BiasMode | None = "per_expert",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_experts(experts)
        split = split and experts > 1
        self.experts = experts if split else 1
        parts = [out_features] if isinstance(out_features, int) else list(out_features)
        rows = sum(parts)
        # Drawn on the CPU in float32 whatever the device, so that a seed means the same weights everywhere.
        weight = torch.zeros(rows, in_features)
        if not zero_init:
            bound = 1 / math.sqrt(in_features)  # Kaiming-uniform with a = sqrt(5)
            weight.uniform_(-bound, bound, generator=generator)
        maps = [owner_map((part, in_features), experts, generator) for part in parts if split]
        owner = torch.cat(maps) if maps else None
        split_bias = split and bias == "split"
        bias_owner = owner_map((rows,), experts, generator) if split_bias else None
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(weight.to(**factory))
        bias_shape = (rows,) if split_bias else (self.experts, rows)
        self.bias = None if bias is None else nn.Parameter(torch.zeros(bias_shape, **factory))
        self.register_buffer("owner", None if owner is None else owner.to(device))
        self.register_buffer("init", weight.clone().to(**factory) if split and not zero_init else None)
        self.register_buffer("bias_owner", None if bias_owner is None else bias_owner.to(device))

    def bias_rows(self) -> Tensor:
        """The bias of every expert, `[E, out]` (`[1, out]` dense)."""
        bias, owner = self.bias, self.bias_owner
        assert bias is not None
        if owner is None:
            return bias
        return bias * (owner == torch.arange(self.experts, device=bias.device)[:, None])

    @torch.no_grad()
    def dense(self, rule: MergeRule, expert: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the dense projection that the experts, or one of them, amount to (docs/method.md, Merge).

        Returns:
            `[out, in]` and `[1, out]`: the projection's own, where it is dense.
        """
        if self.owner is None:
            return self.weight, self.bias
        bias = None
        if self.bias is not None:
            rows = self.bias_rows()
            bias = rows.mean(0, keepdim=True) if expert is None else rows[expert : expert + 1].clone()
        if expert is not None:
            return torch.where(self.owner == expert, self.weight, 0.0 if self.init is None else self.init), bias
        weight = self.weight / self.experts
        if self.init is not None and rule == "mean":
            weight = weight + self.init * (1 - 1 / self.experts)
        return weight, bias

    @torch.no_grad()
    def merge(self, rule: MergeRule, expert: int | None = None) -> None:
        """Become that dense projection, in place."""
        if self.owner is None:
            return
        weight, bias = self.dense(rule, expert)
        self.weight.copy_(weight)
        if self.bias is not None:
            assert bias is not None
            self.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)
        self.owner = self.init = self.bias_owner = None
        self.experts = 1

    def sources(self) -> tuple[Tensor | None, ...]:
        """All that it computes with."""
        return self.weight, self.bias, self.init, self.owner, self.bias_owner

    @property
    def merged_parameters(self) -> int:
        """Number of values that remain after merging: the weight and, with a bias, one vector of it."""
        return self.weight.numel() + (0 if self.bias is None else self.weight.shape[0])

    def check(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Check the values of this projection's owner maps in `tensors`, which came from a file.

        Raises:
            ValueError: an id is out of range; the message names the map.
        """
        for field in ("owner", "bias_owner"):
            key = f"{name}.{field}"
            if getattr(self, field) is not None and key in tensors:
                check_owner_map(tensors[key], self.experts, key)

    def extra_repr(self) -> str:
        """What repr shows."""
        out_features, in_features = self.weight.shape
        kind = f"experts={self.experts}" if self.owner is not None else "dense"
        return f"{in_features} -> {out_features}, {kind}"
