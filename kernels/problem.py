"""The sparse adapter's arguments, as the kernels take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
SMALLEST_DOT = 16  # the least a tile dimension may be in a tensor-core product


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

    sum_dtype = torch.float32

    @property
    def width(self) -> int:
        """The width, D."""
        return self.x.shape[-1]

    @property
    def bottleneck(self) -> int:
        """The bottleneck, r."""
        return self.down_weight.shape[0]

    @property
    def block_bottleneck(self) -> int:
        """The bottleneck padded to a power of two."""
        return max(SMALLEST_DOT, triton.next_power_of_2(self.bottleneck))

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

    def promoted(self, other: Tensor) -> torch.dtype:
        """Dtype of a sum of x and `other`."""
        return torch.promote_types(self.x.dtype, other.dtype)

    def arguments(self) -> dict[str, Any]:
        """What every kernel that reads activations takes, by name."""
        return {
            "x_ptr": self.x,
            "norm_weight_ptr": self.norm_weight,
            "down_weight_ptr": self.down_weight,
            "down_bias_ptr": self.down_bias,
            "up_weight_ptr": self.up_weight,
            "up_bias_ptr": self.up_bias,
            "down_init_ptr": self.down_init,
            "down_owner_ptr": self.down_owner,
            "up_owner_ptr": self.up_owner,
            "experts_ptr": self.experts,
            "scale_ptr": self.scale_tensor,
            "seed_ptr": self.seed,
            "rows_per_group": self.rows_per_group,
            "tokens": self.tokens,
            "groups": self.groups,
            "scale": self.scale,
            "dropout_threshold": self.dropout_threshold,
            "dropout_scale": 1.0 / (1.0 - self.dropout),
            "WIDTH": self.width,
            "BOTTLENECK": self.bottleneck,
            "DOWN_EXPERTS": self.down_bias.shape[0],
            "UP_EXPERTS": self.up_bias.shape[0],
            "ACTIVATION": self.activation,
            "FORK": self.fork,
            "FIRST_SAMPLE": self.seed is not None and self.seed.numel() == 2,
            "PRODUCT": TRITON_DTYPES[self.product_dtype],
            "PRECISION": product_precision(),
        }


def product_precision() -> str:
    """Arithmetic of float32 products: exact, unless the user allowed TF32 in torch."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"  # the legacy allow_tf32 = True sets it too
    return "tf32" if allowed and not torch.version.hip else "ieee"
