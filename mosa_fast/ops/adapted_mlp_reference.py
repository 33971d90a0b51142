"""The operator `adapted_mlp` in plain PyTorch, forward and backward (the launchers' contract is in launching.py).

For group v with experts (d, u), T rows x of width D, with x^ = (x - mean) / std, norm2's weight and bias g2, b2,
LayerScale g (or 1), the adapter's norm ga, ba (or g2, b2):

    p = (x^ g2 + b2) W1^T + b1                                  [T, H]
    t = x^ A^T + a,   A = W_down[d] ga,  a = b_down[d] + W_down[d] ba       [T, r]
    k = drop(gelu(t))
    out = x + g (gelu(p) W2^T + b2) + k U^T + u,   U = s W_up[u],  u = s b_up[u]

The products of x^ with A are products of x itself, since `x^ A^T = (x A^T - mean rowsum(A)^T) / std`: nothing of size
T x D is made for the adapter, and its output is added where the MLP's is, in place. Where products round what they
read, to half precision or TF32, they read x^ instead: the difference would lose its digits to the mean.

Backward, with d the output's gradient, k' = dropout's factor times gelu'(t) (`slope`), and [.] a sum over rows:

    dU = [d^T k]      du = [d]      dt = (d U) k'
    dA = [dt^T x^] = [(dt / std)^T x] - [(dt / std)^T mean]      da = [dt]
    dx^ = ((d g) W2 gelu'(p)) W1 g2 + dt A,   dx = d + the normalisation's gradient of dx^

and from A and a to the adapter's own weights: dW_down = dA ga + da ba^T, dga = the columns' sums of dA W_down,
dba = da^T W_down. An expert's weights get a gradient where it owns them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mosa_fast.ops.call import AdaptedMLPCall
from mosa_fast.ops.launching import wanted
from mosa_fast.ops.philox import dropout_keep, dropout_scale
from mosa_fast.ops.reference import expert_bias, expert_weight, ownership, project

aten = torch.ops.aten


def forward(call: AdaptedMLPCall, out: Tensor, saved: Sequence[Tensor]) -> None:
    """Fill the output, and of the saved tensors those that are wanted."""
    c = call
    stats, saved_pre, saved_kept, saved_slope, saved_down, saved_up = map(wanted, saved)
    with torch.autocast(c.x.device.type, enabled=False):
        rows = _rows(c)
        down, down_bias, up, up_bias = _weights(c, saved_down, saved_up)
        normed, operand, mean, rstd = _normalise(c, rows)
        hidden = _mlp_hidden(c, normed, saved_pre)
        kept = _kept(c, _adapter_hidden(c, down, down_bias, operand, mean, rstd), saved_kept, saved_slope)
        if stats is not None:
            torch.stack([mean, rstd], out=stats)

        groups = out.view(c.groups, c.rows_per_group, c.width)
        total = groups if out.dtype == c.sum_dtype else torch.empty_like(groups, dtype=c.sum_dtype)
        stream = total.new_empty(rows.shape) if c.fork else total.view(rows.shape)
        _add_mlp(c, stream, rows, hidden)  # in the sums' order of timm's block, so that a fresh adapter changes nothing
        streams = stream.unsqueeze(0) if c.fork else total  # forked, the MLP has run once for all groups
        torch.add(streams, up_bias.expand(c.groups, -1, -1), out=total)
        _accumulate(total, kept, up.to(c.product_dtype).mT)
        if total is not groups:
            groups.copy_(total)


def backward(call: AdaptedMLPCall, grad_out: Tensor, saved: Sequence[Tensor], gradients: dict[str, Tensor]) -> None:
    """Fill the gradients."""
    c = call
    (mean, rstd), pre, kept, slope, down, up = saved
    with torch.autocast(c.x.device.type, enabled=False):
        rows = _rows(c)
        grad = grad_out.view(c.groups, c.rows_per_group, c.width)
        product_grad, grad = grad.to(c.product_dtype), grad.to(c.sum_dtype)
        grad_t = _project(product_grad, up.mT.to(c.product_dtype)).to(c.sum_dtype).mul_(slope)
        if c.fork and down.shape[0] == 1:  # what the groups' GELUs read is the same
            grad_t = grad_t.sum(0, keepdim=True)
        if gradients.keys() - {"x"}:
            _up_gradients(c, grad, product_grad, kept, gradients)
            _down_gradients(c, rows, mean, rstd, grad_t, gradients)
        if "x" in gradients:
            stream_grad = grad.sum(0) if c.fork else grad.view(rows.shape)
            grad_normed = _mlp_gradient(c, stream_grad, pre)
            _accumulate_input(grad_normed, grad_t.to(c.product_dtype), down.to(c.product_dtype), c.fork)
            values = rows.to(c.sum_dtype)
            through_norm = aten.native_layer_norm_backward(
                grad_normed, values, (c.width,), mean, rstd, None, None, [True, False, False]
            )[0]
            gradient = gradients["x"].view(rows.shape)
            if gradient.dtype == c.sum_dtype:
                torch.add(through_norm, stream_grad, out=gradient)
            else:
                gradient.copy_(through_norm.add_(stream_grad))


def _weights(
    c: AdaptedMLPCall, saved_down: Tensor | None, saved_up: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What each group computes with, in the sums' dtype; the first size is 1 where all groups have the same.

    Returns:
        A, `[V, r, D]`; a, `[V, 1, r]`; U, `[V, D, r]`; u, `[V, 1, D]`.
    """
    norm_weight, norm_bias = _adapter_norm(c)
    down, scale = _expert_down(c), _scale(c)
    down_bias = expert_bias(c.down_bias, c.down_owner, c.experts[:, 0]).view(-1, 1, c.bottleneck).to(c.sum_dtype)
    return (
        torch.mul(down, norm_weight, out=saved_down),
        down_bias + (down @ norm_bias).unsqueeze(1),
        torch.mul(_expert_up(c), scale, out=saved_up),
        _expert_up_bias(c) * scale,
    )


def _expert_down(c: AdaptedMLPCall) -> Tensor:
    ids = c.experts[:, 0]
    weight = expert_weight(c.down_weight, c.down_init, c.down_owner, ids, c.down_bias.shape[0])
    return weight.view(-1, c.bottleneck, c.width).to(c.sum_dtype)


def _expert_up(c: AdaptedMLPCall) -> Tensor:
    weight = expert_weight(c.up_weight, None, c.up_owner, c.experts[:, 1], c.up_bias.shape[0])
    return weight.view(-1, c.width, c.bottleneck).to(c.sum_dtype)


def _expert_up_bias(c: AdaptedMLPCall) -> Tensor:
    return expert_bias(c.up_bias, c.up_owner, c.experts[:, 1]).view(-1, 1, c.width).to(c.sum_dtype)


def _scale(c: AdaptedMLPCall) -> Tensor | float:
    return c.scale if c.scale_tensor is None else c.scale_tensor.to(c.sum_dtype)


def _adapter_norm(c: AdaptedMLPCall) -> tuple[Tensor, Tensor]:
    """Weight and bias of the adapter's norm; an adapter without one reads what the MLP reads."""
    weight = c.mlp_norm_weight if c.norm_weight is None else c.norm_weight
    bias = c.mlp_norm_bias if c.norm_bias is None else c.norm_bias
    return weight.to(c.sum_dtype), bias.to(c.sum_dtype)


def _rows(c: AdaptedMLPCall) -> Tensor:
    return c.x.view(c.in_rows, c.width)


def _is_raw(c: AdaptedMLPCall) -> bool:
    """Whether the adapter's products read x itself, not the normalised x: they must not round what they read."""
    if c.product_dtype != torch.float32 or c.sum_dtype != torch.float32:
        return c.product_dtype == c.sum_dtype
    backends: Any = torch.backends
    settings = backends.cuda if c.x.is_cuda else backends.mkldnn
    return settings.matmul.fp32_precision not in ("tf32", "bf16")


def _normalise(c: AdaptedMLPCall, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the MLP reads, what the adapter's products read, both in the product dtype, mean and 1 / std `[T, 1]`."""
    values = rows.to(c.sum_dtype)
    weight, bias = c.mlp_norm_weight.to(c.sum_dtype), c.mlp_norm_bias.to(c.sum_dtype)
    if c.product_dtype == c.sum_dtype:
        normed, mean, rstd = torch.native_layer_norm(values, (c.width,), weight, bias, c.eps)
        return normed, values if _is_raw(c) else (values - mean).mul_(rstd), mean, rstd
    plain, mean, rstd = torch.native_layer_norm(values, (c.width,), None, None, c.eps)
    return torch.addcmul(bias, plain, weight).to(c.product_dtype), plain.to(c.product_dtype), mean, rstd


def _mlp_hidden(c: AdaptedMLPCall, normed: Tensor, saved_pre: Tensor | None) -> Tensor:
    """The MLP's hidden values, `[T, H]`."""
    weight, bias = c.fc1_weight.to(c.product_dtype), c.fc1_bias.to(c.product_dtype)
    if saved_pre is None:
        pre = torch.addmm(bias, normed, weight.T)
        return aten.gelu_(pre)
    torch.addmm(bias, normed, weight.T, out=saved_pre)
    return F.gelu(saved_pre)


def _adapter_hidden(
    c: AdaptedMLPCall, down: Tensor, down_bias: Tensor, operand: Tensor, mean: Tensor, rstd: Tensor
) -> Tensor:
    """What the adapter's GELU reads: `[V, M / V, r]`, or `[1, T, r]` where all groups read and compute the same."""
    streams = operand.view(1 if c.fork else c.groups, -1, c.width)
    t = _project(streams, down.to(c.product_dtype)).to(c.sum_dtype)
    if not _is_raw(c):
        return t + down_bias
    means, rstds = (value.view(*streams.shape[:2], 1) for value in (mean, rstd))
    row_sums = down.sum(2).unsqueeze(1)
    return torch.addcmul(down_bias, t.addcmul_(means, row_sums, value=-1), rstds)


def _kept(c: AdaptedMLPCall, t: Tensor, saved_kept: Tensor | None, saved_slope: Tensor | None) -> Tensor:
    """The adapter's hidden values after dropout, `[V, M / V, r]` in the product dtype; fills what is saved of them."""
    hidden = F.gelu(t)
    t = t.expand(c.groups, -1, -1)
    factor = None
    if c.seed is not None:
        samples = c.out_samples // c.groups
        keep = dropout_keep(c.seed, c.dropout, c.groups, samples, c.tokens, c.bottleneck).flatten(1, 2)
        factor = keep.to(t.dtype).mul_(dropout_scale(c.dropout))
    if saved_kept is None or saved_slope is None:
        kept = hidden.expand_as(t) if factor is None else factor.mul_(hidden)
        return kept.to(c.product_dtype)
    aten.gelu_backward.grad_input(torch.ones_like(t) if factor is None else factor, t, grad_input=saved_slope)
    return saved_kept.copy_(hidden if factor is None else factor.mul_(hidden))


def _add_mlp(c: AdaptedMLPCall, stream: Tensor, rows: Tensor, hidden: Tensor) -> None:
    """Fill `stream`, `[T, D]`, with x and the MLP's branch."""
    weight, bias = c.fc2_weight.to(c.product_dtype), c.fc2_bias.to(c.product_dtype)
    branch = torch.addmm(bias, hidden, weight.T, out=stream if stream.dtype == c.product_dtype else None)
    if c.layer_scale is None:
        torch.add(rows, branch, out=stream)
    else:
        torch.add(rows, branch * c.layer_scale, out=stream)  # rounded where timm rounds it


def _mlp_gradient(c: AdaptedMLPCall, stream_grad: Tensor, pre: Tensor) -> Tensor:
    """The MLP's gradient towards the normalised x, `[T, D]`, in the sums' dtype."""
    branch_grad = stream_grad if c.layer_scale is None else stream_grad * c.layer_scale.to(c.sum_dtype)
    grad_hidden = torch.mm(branch_grad.to(c.product_dtype), c.fc2_weight.to(c.product_dtype))
    aten.gelu_backward.grad_input(grad_hidden, pre, grad_input=grad_hidden)
    grad_normed = torch.mm(grad_hidden, c.fc1_weight.to(c.product_dtype)).to(c.sum_dtype)
    return grad_normed.mul_(c.mlp_norm_weight.to(c.sum_dtype))


def _up_gradients(
    c: AdaptedMLPCall, grad: Tensor, product_grad: Tensor, kept: Tensor, gradients: dict[str, Tensor]
) -> None:
    """Fill the gradients of the up-projection and of the scale."""
    ids, experts, scale = c.experts[:, 1], c.up_bias.shape[0], _scale(c)
    weight = _product_over_rows(product_grad, kept, together=c.up_owner is None).to(c.sum_dtype)
    bias = grad.sum(1)
    if "scale_tensor" in gradients:
        total = (weight * _expert_up(c)).sum() + (bias.unsqueeze(1) * _expert_up_bias(c)).sum()
        gradients["scale_tensor"].fill_(total)
    gradients["up_weight"].copy_(_owned_sum(weight * scale, c.up_owner, ids, experts))
    gradients["up_bias"].copy_(_bias_gradient(bias * scale, c.up_owner, ids, experts))


def _down_gradients(
    c: AdaptedMLPCall, rows: Tensor, mean: Tensor, rstd: Tensor, grad_t: Tensor, gradients: dict[str, Tensor]
) -> None:
    """Fill the gradients of the down-projection and of the adapter's norm."""
    ids, experts, together = c.experts[:, 0], c.down_bias.shape[0], c.down_owner is None
    streams = 1 if c.fork else c.groups
    if _is_raw(c):
        means, rstds = mean.view(streams, -1, 1), rstd.view(streams, -1, 1)
        scaled = grad_t * rstds
        folded = _product_over_rows(scaled, rows.view(streams, -1, c.width), together)
        folded -= _product_over_rows(scaled, means, together)
    else:
        normed = ((rows.to(c.sum_dtype) - mean) * rstd).to(c.product_dtype).view(streams, -1, c.width)
        folded = _product_over_rows(grad_t.to(c.product_dtype), normed, together).to(c.sum_dtype)
    bias = grad_t.sum((0, 1)).unsqueeze(0) if together else grad_t.sum(1)
    norm_weight, norm_bias = _adapter_norm(c)
    weight = torch.addcmul(bias.unsqueeze(2) * norm_bias, folded, norm_weight)
    gradients["down_weight"].copy_(_owned_sum(weight, c.down_owner, ids, experts))
    gradients["down_bias"].copy_(_bias_gradient(bias, c.down_owner, ids, experts))
    if "norm_weight" in gradients:
        down = _expert_down(c)
        gradients["norm_weight"].copy_((folded * down).sum((0, 1)))
        gradients["norm_bias"].copy_((bias.unsqueeze(1) @ down).sum((0, 1)))


def _project(x: Tensor, weight: Tensor) -> Tensor:
    """`project`, of `[G, M, in]` with `[V, out, in]` or `[1, out, in]`."""
    return project(x, weight[0] if weight.shape[0] == 1 else weight)


def _product_over_rows(left: Tensor, right: Tensor, together: bool) -> Tensor:
    """`left^T right` of each group, `[V, a, b]`, or of all groups together, `[1, a, b]`; right may have one group."""
    if together:
        return torch.mm(left.flatten(0, 1).T, right.expand(left.shape[0], -1, -1).flatten(0, 1)).unsqueeze(0)
    if right.shape[0] == left.shape[0]:
        return torch.bmm(left.mT, right)
    return torch.matmul(left.mT, right[0])


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a product, of matrices or of each group's, to `total`, in place; right may be the same for all groups."""
    if left.dtype != total.dtype:
        total += left @ right
    elif left.ndim == 2:
        total.addmm_(left, right)
    elif right.shape[0] == 1:
        total.view(-1, total.shape[-1]).addmm_(left.reshape(-1, left.shape[-1]), right[0])
    else:
        total.baddbmm_(left, right)


def _accumulate_input(total: Tensor, grad_t: Tensor, down: Tensor, fork: bool) -> None:
    """Add the adapter's gradient towards the normalised x, of all groups that read it, to the MLP's, `[T, D]`."""
    if fork and grad_t.shape[0] > 1:  # one product sums over the groups
        _accumulate(total, grad_t.transpose(0, 1).flatten(1), down.flatten(0, 1))
    else:
        _accumulate(total.view(grad_t.shape[0], -1, total.shape[-1]), grad_t, down)


def _owned_sum(gradient: Tensor, owner: Tensor | None, ids: Tensor, experts: int) -> Tensor:
    """The gradient of a projection's weight, by those of the weights that the groups computed with."""
    if owner is None:
        return gradient.sum(0)
    return (gradient * ownership(owner, ids, experts, gradient.dtype)).sum(0)


def _bias_gradient(gradient: Tensor, owner: Tensor | None, ids: Tensor, experts: int) -> Tensor:
    """The gradient of every expert's bias, `[E, out]` (`[1, out]` dense), by those of the groups' biases."""
    if owner is None:
        return gradient.sum(0, keepdim=True)
    rows = torch.arange(experts, device=gradient.device)
    return ownership(rows, ids, experts, gradient.dtype).T @ gradient
