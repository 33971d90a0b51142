"""The sparse adapter's arguments as every kernel takes them; no backend is imported here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """One call of `mosa_fast.ops.sparse_adapter` after its checks; all tensors contiguous, on one device.

    x: `[samples, ..., D]`. experts: int32 `[V, 2]`. scale_tensor, if given, stands in for scale. seed: int64 `[1]` or
    `[2]`, None where nothing is dropped; dropout_threshold: an activation whose 32-bit word is below it is dropped.
    """

    x: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    down_weight: Tensor
    down_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor
    down_init: Tensor | None
    down_owner: Tensor | None
    up_owner: Tensor | None
    experts: Tensor
    scale_tensor: Tensor | None
    seed: Tensor | None
    activation: str
    scale: float
    dropout: float
    dropout_threshold: int
    add_input: bool
    fork: bool
    eps: float
    product_dtype: torch.dtype

    @property
    def width(self) -> int:
        """The width, D."""
        return self.x.shape[-1]

    @property
    def bottleneck(self) -> int:
        """The bottleneck, r."""
        return self.down_weight.shape[0]

    @property
    def groups(self) -> int:
        """The number of groups, V."""
        return self.experts.shape[0]

    @property
    def in_rows(self) -> int:
        """Rows of x."""
        return self.x.numel() // self.width

    @property
    def rows_per_group(self) -> int:
        """Rows of one group: all of x when forked."""
        return self.in_rows if self.fork else self.in_rows // self.groups

    @property
    def out_rows(self) -> int:
        """Rows of out, M."""
        return self.rows_per_group * self.groups

    @property
    def tokens(self) -> int:
        """Rows of one sample."""
        return self.in_rows // self.x.shape[0] if self.x.shape[0] else 1
