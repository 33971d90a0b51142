"""The operator `adapted_mlp` in plain PyTorch, forward and backward (the launchers' contract is in launching.py).

For group v with experts (d, u), T rows x of width D, with x^ = (x - mean) / std, norm2's weight and bias g2, b2,
LayerScale g (or 1), the adapter's norm ga, ba (or g2, b2):

    p = (x^ g2 + b2) W1^T + b1                                  [T, H]
    t = x^ A^T + a,   A = W_down[d] ga,  a = b_down[d] + W_down[d] ba       [T, r]
    k = drop(gelu(t))
    out = x + g (gelu(p) W2^T + b2) + k U^T + u,   U = s W_up[u],  u = s b_up[u]

A's rows are centred: from each the mean of its elements is taken off. No row of x^ has a mean, so that x^ A^T stays
what it was, and the products of x^ with A are products of x itself: `x^ A^T = (x A^T) / std`. Nothing of size T x D is
made for the adapter, and its output is added where the MLP's is, in place. Where products round what they read, to half
precision or TF32, they read x^ instead: the mean of x would cost digits.

Backward, with d the output's gradient, k' = dropout's factor times gelu'(t) (`slope`), and [.] a sum over rows:

    dU = [d^T k]      du = [d]      dt = (d U) k'
    dA = [dt^T x^] = [(dt / std)^T x], its rows centred,     da = [dt]
    dx^ = ((d g) W2 gelu'(p)) W1 g2 + dt A,   dx = d + the normalisation's gradient of dx^

and from A and a to the adapter's own weights: dW_down = dA ga + da ba^T, dga = the columns' sums of dA W_down,
dba = da^T W_down. An expert's weights get a gradient where it owns them.

At up to about 1,000 tokens it is the number of calls that takes the time, a few microseconds each, more than what they
compute: so nothing is made twice, and a tensor that has the dtype already is not asked to take it (`cast`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mosa_fast.ops.adapted_mlp_weights import (
    adapter_norm,
    cast,
    centre,
    expert_down,
    expert_up,
    expert_up_bias,
    folded_down,
    owned_sum,
    ownership_of,
    scale_of,
    scaled_up,
    scaled_up_bias,
)
from mosa_fast.ops.arguments import AdaptedMLPCall
from mosa_fast.ops.launching import wanted
from mosa_fast.ops.philox import dropout_keep, dropout_scale
from mosa_fast.ops.reference import project

aten = torch.ops.aten


def forward(call: AdaptedMLPCall, out: Tensor, saved: Sequence[Tensor]) -> None:
    """Fill the output, and of the saved tensors those that are wanted."""
    c = call
    stats, saved_pre, saved_kept, saved_slope, saved_down, saved_owned = map(wanted, saved)
    with _without_autocast(c):
        rows = _rows(c)
        down_ids, up_ids = c.experts.unbind(1)
        down, down_bias = folded_down(c, down_ids, saved_down)
        owned = ownership_of(c.up_owner, c.up_bias, up_ids, c.sum_dtype, saved_owned)
        normed, operand, mean, rstd = _normalise(c, rows)
        hidden = _mlp_hidden(c, normed, saved_pre)
        kept = _kept(c, _adapter_hidden(c, down, down_bias, operand, rstd), saved_kept, saved_slope)
        if stats is not None:
            torch.stack([mean, rstd], out=stats)

        groups = out.view(c.groups, c.rows_per_group, c.width)
        total = groups if out.dtype == c.sum_dtype else torch.empty_like(groups, dtype=c.sum_dtype)
        stream = total.new_empty(rows.shape) if c.fork else total.view(rows.shape)
        _add_mlp(c, stream, rows, hidden)  # in the sums' order of timm's block, so that a fresh adapter changes nothing
        streams = stream.unsqueeze(0) if c.fork else total  # forked, the MLP has run once for all groups
        torch.add(streams, scaled_up_bias(c, owned).expand(c.groups, -1, -1), out=total)
        _accumulate(total, kept, cast(scaled_up(c, owned), c.product_dtype).mT)
        if total is not groups:
            groups.copy_(total)


def backward(call: AdaptedMLPCall, grad_out: Tensor, saved: Sequence[Tensor], gradients: dict[str, Tensor]) -> None:
    """Fill the gradients."""
    c = call
    (mean, rstd), pre, kept, slope, down, saved_owned = saved
    with _without_autocast(c):
        rows = _rows(c)
        grad = grad_out.view(c.groups, c.rows_per_group, c.width)
        product_grad, grad = cast(grad, c.product_dtype), cast(grad, c.sum_dtype)
        owned = None if c.up_owner is None else saved_owned
        grad_t = cast(_project(product_grad, cast(scaled_up(c, owned), c.product_dtype).mT), c.sum_dtype).mul_(slope)
        if c.fork and down.shape[0] == 1:  # what the groups' GELUs read is the same
            grad_t = grad_t.sum(0, keepdim=True)
        if len(gradients) > ("x" in gradients):
            _up_gradients(c, grad, product_grad, kept, owned, gradients)
            _down_gradients(c, rows, mean, rstd, grad_t, gradients)
        if "x" in gradients:
            stream_grad = grad.sum(0) if c.fork else grad.view(rows.shape)
            grad_normed = _mlp_gradient(c, stream_grad, pre)
            _accumulate_input(grad_normed, cast(grad_t, c.product_dtype), cast(down, c.product_dtype), c.fork)
            values = cast(rows, c.sum_dtype)
            through_norm = aten.native_layer_norm_backward(
                grad_normed, values, (c.width,), mean, rstd, None, None, [True, False, False]
            )[0]
            torch.add(through_norm, stream_grad, out=gradients["x"].view(rows.shape))


def _without_autocast(c: AdaptedMLPCall) -> AbstractContextManager[Any]:
    """Products in the dtypes that are given."""
    device = c.x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


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
    values = cast(rows, c.sum_dtype)
    weight, bias = cast(c.mlp_norm_weight, c.sum_dtype), cast(c.mlp_norm_bias, c.sum_dtype)
    if c.product_dtype == c.sum_dtype:
        normed, mean, rstd = torch.native_layer_norm(values, (c.width,), weight, bias, c.eps)
        return normed, values if _is_raw(c) else (values - mean).mul_(rstd), mean, rstd
    plain, mean, rstd = torch.native_layer_norm(values, (c.width,), None, None, c.eps)
    return torch.addcmul(bias, plain, weight).to(c.product_dtype), plain.to(c.product_dtype), mean, rstd


def _mlp_hidden(c: AdaptedMLPCall, normed: Tensor, saved_pre: Tensor | None) -> Tensor:
    """The MLP's hidden values, `[T, H]`."""
    weight, bias = cast(c.fc1_weight, c.product_dtype), cast(c.fc1_bias, c.product_dtype)
    if saved_pre is None:
        pre = torch.addmm(bias, normed, weight.T)
        return aten.gelu_(pre)
    torch.addmm(bias, normed, weight.T, out=saved_pre)
    return F.gelu(saved_pre)


def _adapter_hidden(c: AdaptedMLPCall, down: Tensor, down_bias: Tensor, operand: Tensor, rstd: Tensor) -> Tensor:
    """What the adapter's GELU reads: `[V, M / V, r]`, or `[1, T, r]` where all groups read and compute the same."""
    streams = operand.view(1 if c.fork else c.groups, -1, c.width)
    t = cast(_project(streams, cast(down, c.product_dtype)), c.sum_dtype)
    if not _is_raw(c):
        return t + down_bias
    return torch.addcmul(down_bias, t, rstd.view(streams.shape[0], -1, 1))


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
        return cast(hidden.expand_as(t) if factor is None else factor.mul_(hidden), c.product_dtype)
    aten.gelu_backward.grad_input(torch.ones_like(t) if factor is None else factor, t, grad_input=saved_slope)
    return saved_kept.copy_(hidden) if factor is None else torch.mul(factor, hidden, out=saved_kept)


def _add_mlp(c: AdaptedMLPCall, stream: Tensor, rows: Tensor, hidden: Tensor) -> None:
    """Fill `stream`, `[T, D]`, with x and the MLP's branch."""
    weight, bias = cast(c.fc2_weight, c.product_dtype), cast(c.fc2_bias, c.product_dtype)
    branch = torch.addmm(bias, hidden, weight.T, out=stream if stream.dtype == c.product_dtype else None)
    if c.layer_scale is None:
        torch.add(rows, branch, out=stream)
    else:
        torch.add(rows, branch * c.layer_scale, out=stream)  # rounded where timm rounds it


def _mlp_gradient(c: AdaptedMLPCall, stream_grad: Tensor, pre: Tensor) -> Tensor:
    """The MLP's gradient towards the normalised x, `[T, D]`, in the sums' dtype."""
    branch_grad = stream_grad if c.layer_scale is None else stream_grad * cast(c.layer_scale, c.sum_dtype)
    grad_hidden = torch.mm(cast(branch_grad, c.product_dtype), cast(c.fc2_weight, c.product_dtype))
    aten.gelu_backward.grad_input(grad_hidden, pre, grad_input=grad_hidden)
    grad_normed = cast(torch.mm(grad_hidden, cast(c.fc1_weight, c.product_dtype)), c.sum_dtype)
    return grad_normed.mul_(cast(c.mlp_norm_weight, c.sum_dtype))


def _up_gradients(
    c: AdaptedMLPCall,
    grad: Tensor,
    product_grad: Tensor,
    kept: Tensor,
    owned: Tensor | None,
    gradients: dict[str, Tensor],
) -> None:
    """Fill the gradients of the up-projection and of the scale."""
    weight = cast(_product_over_rows(product_grad, kept, together=owned is None), c.sum_dtype)
    bias = grad.sum((0, 1)).unsqueeze(0) if owned is None else grad.sum(1)
    if "scale_tensor" in gradients:
        total = (weight * expert_up(c, owned)).sum() + (bias * expert_up_bias(c, owned)).sum()
        gradients["scale_tensor"].fill_(total)
    scale = scale_of(c)
    weight, bias = owned_sum(weight, bias, c.up_owner, owned)
    torch.mul(weight, scale, out=gradients["up_weight"])
    torch.mul(bias, scale, out=gradients["up_bias"])


def _down_gradients(
    c: AdaptedMLPCall, rows: Tensor, mean: Tensor, rstd: Tensor, grad_t: Tensor, gradients: dict[str, Tensor]
) -> None:
    """Fill the gradients of the down-projection and of the adapter's norm."""
    together = c.down_owner is None
    streams = 1 if c.fork else c.groups
    if _is_raw(c):
        scaled = grad_t * rstd.view(streams, -1, 1)
        folded = _product_over_rows(scaled, rows.view(streams, -1, c.width), together)
    else:
        normed = cast((cast(rows, c.sum_dtype) - mean).mul_(rstd), c.product_dtype).view(streams, -1, c.width)
        folded = cast(_product_over_rows(cast(grad_t, c.product_dtype), normed, together), c.sum_dtype)
    folded = centre(folded)
    bias = grad_t.sum((0, 1)).unsqueeze(0) if together else grad_t.sum(1)
    owned = ownership_of(c.down_owner, c.down_bias, c.experts[:, 0], c.sum_dtype)
    norm_weight, norm_bias = adapter_norm(c)
    if "norm_weight" in gradients:
        down = expert_down(c, owned)
        gradients["norm_weight"].copy_((folded * down).sum((0, 1)))
        gradients["norm_bias"].copy_(torch.mv(down.view(-1, c.width).T, bias.view(-1)))
    weight = folded.mul_(norm_weight).addcmul_(bias.unsqueeze(2), norm_bias)
    weight, bias = owned_sum(weight, bias, c.down_owner, owned)
    gradients["down_weight"].copy_(weight)
    gradients["down_bias"].copy_(bias)


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
