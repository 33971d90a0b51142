"""The operator `adapted_mlp`: a block's MLP branch with the adapter beside it; public function, checks, memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mosa_fast.ops import launching, reference
from mosa_fast.ops.arguments import AdaptedMLPCall, MixtureCall, SparseAdapterCall
from mosa_fast.ops.call import check_scale, product_dtype
from mosa_fast.ops.registration import Operator
from mosa_fast.ops.sparse_adapter import as_tensor, check_adapter, check_seed


def adapted_mlp(
    x: Tensor,
    mlp_norm_weight: Tensor,
    mlp_norm_bias: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    layer_scale: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    down_init: Tensor | None,
    down_owner: Tensor | None,
    up_owner: Tensor | None,
    experts: Tensor,
    *,
    scale: float | Tensor = 1.0,
    dropout: float = 0.0,
    seed: int | Tensor = 0,
    fork: bool = False,
    eps: float = 1e-6,
) -> Tensor:
    """A frozen MLP with a mixture of sparse adapters: the stream after both, `x + g * mlp(norm2(x)) + adapter(x)`.

    `mlp(n) = fc2(gelu(fc1(n)))` and `adapter(x) = scale * up_e(drop(gelu(down_e(norm(x)))))`, with the exact GELU. It
    is what `sparse_adapter` gives for x with the MLP's branch as its skip; x is normalised once. The MLP's tensors get
    no gradient. In plain PyTorch, on every device, with a backward of its own (docs/design.md, The adapter inside the
    MLP), which can be differentiated again.

    Args:
        x: `[N, ..., D]`, float16, bfloat16, float32 or float64; the first dimension counts samples.
        mlp_norm_weight, mlp_norm_bias: `[D]`, norm2, a LayerNorm.
        fc1_weight: `[H, D]`. fc1_bias: `[H]`. fc2_weight: `[D, H]`. fc2_bias: `[D]`.
        layer_scale: `[D]`, LayerScale's factor g of the MLP's branch. None: 1.
        norm_weight, norm_bias: `[D]`, the adapter's LayerNorm; both None: it reads what the MLP reads.
        down_weight, down_bias, up_weight, up_bias, down_init, down_owner, up_owner, experts, scale, dropout, seed: as
            `sparse_adapter` takes them.
        fork: False: the N samples are V equal consecutive groups and out has the shape of x. True: every group
            reads all of x, and out is `[V * N, ..., D]`, group after group.
        eps: of both norms.

    Returns:
        The promoted dtype of x and the products: autocast's when it is on, else x's.

    Raises:
        ValueError: an argument does not fit; the message names it, what came and what was expected.
    """
    seed = as_tensor(seed, x.device)
    check_seed(seed, x)
    check_scale(scale, x)
    call = AdaptedMLPCall(
        x=x,
        mlp_norm_weight=mlp_norm_weight,
        mlp_norm_bias=mlp_norm_bias,
        fc1_weight=fc1_weight,
        fc1_bias=fc1_bias,
        fc2_weight=fc2_weight,
        fc2_bias=fc2_bias,
        layer_scale=layer_scale,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        down_weight=down_weight,
        down_bias=down_bias,
        up_weight=up_weight,
        up_bias=up_bias,
        down_init=down_init,
        down_owner=down_owner,
        up_owner=up_owner,
        experts=experts,
        scale_tensor=scale if isinstance(scale, Tensor) else None,
        seed=seed if dropout > 0 else None,
        scale=1.0 if isinstance(scale, Tensor) else float(scale),
        dropout=float(dropout),
        fork=fork,
        eps=float(eps),
        input_gradient=x.requires_grad and torch.is_grad_enabled(),
        product_dtype=product_dtype(x),
    )
    check_adapter(call)
    for name in _FROZEN:
        tensor = getattr(call, name)
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name} must be frozen: it gets no gradient")
    return OPERATOR(call, "reference")


def results(call: AdaptedMLPCall, save: bool) -> tuple[Tensor, ...]:
    """Memory for what the forward gives: its output, and what backward needs, which has no rows unless `save`.

    Returns:
        out: `[N, ..., D]` (`[V * N, ..., D]` forked).
        stats: `[2, T, 1]` in the sums' dtype, mean and 1 / std of every row of x.
        pre: `[T, H]` in the product dtype, what the MLP's GELU reads; without rows where x gets no gradient.
        kept: `[V, M / V, r]` in the product dtype, the adapter's hidden values after dropout.
        slope: the same in the sums' dtype, the derivative of `kept` by what the adapter's GELU reads.
        down: `[V, r, D]` in the sums' dtype, what the groups' products multiply with; one for all where it is dense.
        up_owned: `[V, D * r + E]` in the sums' dtype, how much each group uses of every weight of the up-projection
            and of every bias; without rows where it is dense.
    """
    c, device = call, call.x.device
    downs = 1 if c.down_owner is None else c.groups
    owners = 0 if c.up_owner is None else c.groups
    hidden = (c.groups if save else 0, c.rows_per_group, c.bottleneck)
    return (
        launching.empty((c.out_samples, *c.x.shape[1:]), c.out_dtype, device),
        launching.empty((2, c.in_rows if save else 0, 1), c.sum_dtype, device),
        launching.empty((c.in_rows if save and c.input_gradient else 0, c.hidden), c.product_dtype, device),
        launching.empty(hidden, c.product_dtype, device),
        launching.empty(hidden, c.sum_dtype, device),
        launching.empty((downs if save else 0, c.bottleneck, c.width), c.sum_dtype, device),
        launching.empty((owners if save else 0, c.up_weight.numel() + c.up_bias.shape[0]), c.sum_dtype, device),
    )


class _AdaptedMLP(Operator):
    """The operator; its gradients, where they are to be differentiated themselves, are those of the formula."""

    other_derivatives = "sparse_adapter on the reference backend"

    def recorded_backward(self, *arguments: Any) -> list[Tensor]:
        """The backward as autograd records it: its own way through the formula, computed again."""
        call, _saved, grad_out, needed, _added_dtype, _backend = self._backward_arguments(arguments)
        # Aliases, so that no gradient comes through a tensor that was made from another one of them.
        own = {}
        for name in self.chosen(needed):
            tensor = getattr(call, name)
            own[name] = tensor.view_as(tensor) if tensor.requires_grad else tensor.detach().requires_grad_()
        out = _formula(replace(call, **own))
        return list(torch.autograd.grad(out, list(own.values()), grad_out, create_graph=True))


def _formula(call: AdaptedMLPCall) -> Tensor:
    """What the operator computes, but for fc2's bias, which no derivative knows, by operations that have gradients."""
    c, dtype = call, call.product_dtype
    weight, bias = c.mlp_norm_weight.to(c.sum_dtype), c.mlp_norm_bias.to(c.sum_dtype)
    with torch.autocast(c.x.device.type, enabled=False):
        normed = F.layer_norm(c.x.to(c.sum_dtype), (c.width,), weight, bias, c.eps).to(dtype)
        hidden = F.gelu(F.linear(normed, c.fc1_weight.to(dtype), c.fc1_bias.to(dtype)))
        branch = F.linear(hidden, c.fc2_weight.to(dtype))
        skip = branch if c.layer_scale is None else branch * c.layer_scale.to(c.sum_dtype)
    values: dict[str, Any] = {name: getattr(c, name, None) for name in SparseAdapterCall.SCHEMA}
    values |= {"skip": skip, "activation": "gelu", "add_input": True}
    if c.norm_weight is None:
        values |= {"norm_weight": c.mlp_norm_weight, "norm_bias": c.mlp_norm_bias}
    return reference.sparse_adapter(SparseAdapterCall(**values)).to(c.out_dtype)


# The MLP's tensors, norm2's and LayerScale's.
_FROZEN = [name for name in AdaptedMLPCall.TENSORS if name not in MixtureCall.__annotations__]
OPERATOR = _AdaptedMLP(AdaptedMLPCall, ("stats", "pre", "kept", "slope", "down", "up_owned"), results)
