"""The operator in plain PyTorch: the oracle of every kernel, and what runs on a CPU.

For group v with experts (d, u), M tokens x in R^[M, D]:

    n = norm(x)                                     (or x)
    h = act(n W_down[d]^T + b_down[d])              [M, r]
    y = drop(h) W_up[u]^T + b_up[u]                 [M, D]
    out = (x) + (skip) + scale * y

with W[e] = W0 + (W - W0) * [owner == e] and, for the merged id -1, W0 + (W - W0) / E (METHOD: Weights and gradients,
Merge). Everything is differentiable by autograd, so this file also defines the gradients: an expert's weights get
one only where it owns them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mosa_fast.ops.philox import dropout_keep

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}
MERGED = -1  # the expert id that means: all of them, averaged


def sparse_adapter(
    x: Tensor,
    skip: Tensor | None,
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
    activation: str,
    scale: float | Tensor,
    dropout: float,
    seed: Tensor,
    add_input: bool,
    fork: bool,
    eps: float,
) -> Tensor:
    """`mosa_fast.ops.sparse_adapter` on checked arguments; see there."""
    product_dtype = compute_dtype(x)
    sum_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    groups, width = experts.shape[0], x.shape[-1]
    samples = x.shape[0] if fork else x.shape[0] // groups
    tokens = x[0].numel() // width if x.shape[0] else 1

    with torch.autocast(x.device.type, enabled=False):
        # [1, M, D] when all groups read the same tokens, else [groups, M, D].
        streams = x.reshape(1 if fork else groups, samples * tokens, width)
        normed = streams.to(sum_dtype)
        if norm_weight is not None and norm_bias is not None:
            normed = F.layer_norm(normed, (width,), norm_weight.to(sum_dtype), norm_bias.to(sum_dtype), eps)

        down = expert_weight(down_weight, down_init, down_owner, experts[:, 0], down_bias.shape[0])
        bias = expert_bias(down_bias, down_owner, experts[:, 0])
        hidden = ACTIVATIONS[activation](project(normed.to(product_dtype), down.to(product_dtype), bias.to(sum_dtype)))
        if dropout > 0:
            keep = dropout_keep(seed, dropout, groups, samples, tokens, hidden.shape[-1])
            hidden = hidden * keep.flatten(1, 2) / (1 - dropout)

        up = expert_weight(up_weight, None, up_owner, experts[:, 1], up_bias.shape[0])
        bias = expert_bias(up_bias, up_owner, experts[:, 1])
        out = project(hidden.to(product_dtype), up.to(product_dtype), bias.to(sum_dtype)) * scale
        if add_input:
            out += streams
        if skip is not None:
            out += skip.reshape(streams.shape)
        out_dtype = x.dtype if skip is None else torch.promote_types(x.dtype, skip.dtype)
        return out.expand(groups, -1, -1).reshape(groups * samples, *x.shape[1:]).to(out_dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Dtype of the matrix products: autocast's where it is on (it leaves float64 alone), else x's."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def ownership(owner: Tensor, ids: Tensor, experts: int, dtype: torch.dtype) -> Tensor:
    """How much of each weight each group uses: 1 or 0 for an expert, 1 / E merged; `[V, *owner.shape]`."""
    ids = ids.view(-1, *[1] * owner.ndim)
    return torch.where(ids == MERGED, 1.0 / experts, (owner == ids).to(dtype)).to(dtype)


def expert_weight(weight: Tensor, init: Tensor | None, owner: Tensor | None, ids: Tensor, experts: int) -> Tensor:
    """The weights that each group computes with: `[V, out, in]`, or `[1, out, in]` for a dense projection."""
    if owner is None:
        return weight.unsqueeze(0)
    share = ownership(owner, ids, experts, weight.dtype)
    return weight * share if init is None else init + (weight - init) * share


def expert_bias(bias: Tensor, owner: Tensor | None, ids: Tensor) -> Tensor:
    """Each group's bias: its expert's row, or the mean of all rows; `[V, 1, out]` or `[1, 1, out]`."""
    if owner is None:
        return bias.unsqueeze(0)
    rows = torch.arange(bias.shape[0], device=bias.device)
    return (ownership(rows, ids, bias.shape[0], bias.dtype) @ bias).unsqueeze(1)


def project(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`[G, M, in]` times `[V, out, in]` plus `[V, 1, out]`, in the bias's dtype.

    Either of G and V may be 1; the result is `[max(G, V), M, out]`. Products come in their own dtype; where it is not
    the bias's, the bias is added after them, to spare it the rounding.
    """
    together = x.dtype == bias.dtype  # one pass over the result instead of two
    if weight.shape[0] == 1:
        out = F.linear(x, weight[0], bias[0, 0] if together else None)
    elif x.shape[0] == 1:
        # One product for all groups, so that x is read once.
        rows = F.linear(x[0], weight.flatten(0, 1), bias.flatten() if together else None)
        out = rows.unflatten(-1, weight.shape[:2]).transpose(0, 1)
    else:
        out = torch.baddbmm(bias, x, weight.mT) if together else torch.bmm(x, weight.mT)
    return out if together else out.to(bias.dtype) + bias
