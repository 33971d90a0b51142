"""The sparse adapter's arguments, as Triton's launchers take them."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mosa_fast.ops.problem import Problem as BaseProblem

TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
SMALLEST_DOT = 16  # the least a tile dimension may be in a tensor-core product


class Problem(BaseProblem):
    """One call of `mosa_fast.ops.sparse_adapter`, and what Triton's launchers ask of it."""

    sum_dtype = torch.float32

    @property
    def block_bottleneck(self) -> int:
        """The bottleneck padded to a power of two."""
        return max(SMALLEST_DOT, triton.next_power_of_2(self.bottleneck))

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
