"""The operator `sparse_lora`: public function, checks, what its kernels fill, and dispatch to a backend."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mosa_fast.ops import launching, reference
from mosa_fast.ops.arguments import SparseLoRACall
from mosa_fast.ops.backends import resolve_backend
from mosa_fast.ops.call import check_experts, check_scale, check_targets, product_dtype
from mosa_fast.ops.registration import Operator


def sparse_lora(
    x: Tensor,
    y: Tensor,
    down_weight: Tensor,
    up_weight: Tensor,
    down_init: Tensor | None,
    down_owner: Tensor | None,
    up_owner: Tensor | None,
    experts: Tensor,
    *,
    columns: Sequence[tuple[int, int]],
    num_experts: int = 1,
    scale: float | Tensor = 1.0,
    fork: bool = False,
) -> Tensor:
    """Mixtures of sparse low-rank pairs on one linear: `y[target] + scale * up_e(down_e(x))`, all targets at once.

    A target is a range of the linear's output columns with a pair of its own: q and v of a fused qkv are two targets,
    a whole output projection is one. The pairs of T targets lie one below the other, in the order of their columns.
    The arithmetic and the meaning of the experts are in `mosa_fast.ops.reference` (MoSL in docs/method.md, Placements).
    Products run in autocast's dtype when it is on, else in x's; sums in float32 (float64 when x is).

    Args:
        x: `[N, ..., D]`, the linear's input: float16, bfloat16, float32 or float64; the first dimension counts samples.
        y: `[N, ..., O]`, its output, any floating dtype.
        down_weight: `[T * r, D]`: A of the first target, of the second, and so on.
        up_weight: `[W, r]`, W the sum of the targets' widths: B of the first target, of the second, and so on.
        down_init: W0 of the down-projections, in their shape, used where an expert owns nothing; None: zero.
        down_owner, up_owner: uint8, the weights' shapes: the expert that owns each weight. None: dense.
        experts: int32 `[T, V, 2]`, the (down, up) expert of each target and group; -1 is merged. Ids are not checked
            (that would wait for the device): one that is out of range owns nothing.
        columns: T half-open ranges of y's columns, in ascending order; no two overlap. Other columns pass through.
        num_experts: E, which divides the merged weights of split projections.
        scale: a number, or a one-element tensor, which gets a gradient.
        fork: False: the N samples are V equal consecutive groups and the result has the shape of y. True: every group
            reads all of x and y, and the result is `[V * N, ..., O]`, group after group.

    Returns:
        The dtype of y, which it stands in for; it never shares memory with y.

    Raises:
        ValueError: an argument does not fit; the message names it, what came and what was expected.
        RuntimeError: the backend that was asked for cannot serve.
    """
    check_scale(scale, x)
    call = SparseLoRACall(
        x=x,
        y=y,
        down_weight=down_weight,
        up_weight=up_weight,
        down_init=down_init,
        down_owner=down_owner,
        up_owner=up_owner,
        experts=experts,
        scale_tensor=scale if isinstance(scale, Tensor) else None,
        columns=tuple(column for start_and_stop in columns for column in start_and_stop),
        num_experts=num_experts,
        scale=1.0 if isinstance(scale, Tensor) else float(scale),
        fork=fork,
        product_dtype=product_dtype(x),
    )
    _check(call)
    backend = resolve_backend(x.device, x.dtype, call.NAME)
    return reference.sparse_lora(call) if backend == "reference" else _operator(call, backend)


def results(call: SparseLoRACall, save: bool) -> tuple[Tensor, ...]:
    """Memory for what the forward gives: its output, and what backward needs, which has no rows unless `save`.

    Returns:
        out: `[N, ..., O]` (`[V * N, ..., O]` forked), in y's dtype.
        hidden: `[M, T * r]` in the product dtype: x times the down-projections, before the scale.
    """
    c, device = call, call.x.device
    return (
        launching.empty((c.out_samples, *c.y.shape[1:]), c.y.dtype, device),
        launching.empty((c.out_rows if save else 0, c.ranks), c.product_dtype, device),
    )


_operator = Operator(SparseLoRACall, ("hidden",), results)


def _check(call: SparseLoRACall) -> None:
    c = call
    c.check()
    targets = c.experts.shape[0]
    if len(c.ranges) != targets:
        raise ValueError(f"columns must have a range for each of the {targets} targets of experts, got {c.ranges}")
    check_targets(c.ranges, "y", c.y.shape[-1], c.down_weight, c.up_weight)
    if c.num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {c.num_experts}")
    check_experts("num_experts", c.num_experts)
