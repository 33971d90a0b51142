"""What `torch.utils.flop_counter` counts of the operator `adapted_mlp`; importing this registers it.

Counted are the products, of two operations a multiply-add, as the counter sees them in an MLP and an adapter beside it.
A module of its own: the counter imports triton, which the operators must not.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from torch.utils.flop_counter import register_flop_formula

from mosa_fast.ops.adapted_mlp import OPERATOR

Shape = Sequence[int]


@register_flop_formula(OPERATOR.forward_op.overloadpacket)
def forward_flops(*arguments: Any, out_shape: Sequence[Shape], **_kwargs: Any) -> int:
    """Of the forward, from its arguments and results with shapes in place of tensors."""
    mlp, down, up = _products(arguments, out_shape[0])
    return 2 * mlp + down + up


@register_flop_formula(OPERATOR.backward_op.overloadpacket)
def backward_flops(*arguments: Any, **_kwargs: Any) -> int:
    """Of the backward, likewise: as much as is asked for."""
    mlp, down, up = _products(arguments, arguments[OPERATOR.tensor_count + OPERATOR.saved_count])
    needed = set(OPERATOR.chosen(arguments[-3]))
    weights = up + down if needed - OPERATOR.inputs else 0
    return up + weights + (2 * mlp + down if needed & OPERATOR.inputs else 0)


def _products(arguments: Sequence[Any], out: Shape) -> tuple[int, int, int]:
    """Operations of one of the MLP's two products, of the adapter's down-projection and of its up-projection."""
    shapes = dict(zip(OPERATOR.call.TENSORS, arguments, strict=False))
    width, hidden, bottleneck = out[-1], shapes["fc1_weight"][0], shapes["down_weight"][0]
    rows, out_rows = prod(shapes["x"][:-1]), prod(out[:-1])
    down_rows = rows if shapes["down_owner"] is None else out_rows  # a dense one is the same for all that read x
    return 2 * rows * width * hidden, 2 * down_rows * width * bottleneck, 2 * out_rows * width * bottleneck
