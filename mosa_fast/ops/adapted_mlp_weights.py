"""What the groups of `adapted_mlp` compute with, made of the weights of its adapter, and the way back for gradients.

In the sums' dtype; the formulas are those of adapted_mlp_reference.py. Where a projection is dense, and so the same for
all groups, V is 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mosa_fast.ops.arguments import AdaptedMLPCall
from mosa_fast.ops.reference import ownership


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, whose call takes longer than the question."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def ownership_of(
    owner: Tensor | None, bias: Tensor, ids: Tensor, dtype: torch.dtype, saved: Tensor | None = None
) -> Tensor | None:
    """How much each group uses of every weight of a projection and of every expert's bias: `[V, out * in + E]`.

    None where the projection is dense: all of it. What is 1 or 0 for an expert is 1 / E merged.
    """
    if owner is None:
        return None
    experts = bias.shape[0]
    owners = torch.cat((owner.flatten(), torch.arange(experts, dtype=owner.dtype, device=owner.device)))
    owned = ownership(owners, ids, experts, dtype)
    return owned if saved is None else saved.copy_(owned)


def _of_weights(owned: Tensor, owner: Tensor) -> Tensor:
    """Those of the weights, `[V, out, in]`."""
    return owned[:, : owner.numel()].view(-1, *owner.shape)


def _of_biases(owned: Tensor, owner: Tensor) -> Tensor:
    """Those of the biases, `[V, E]`."""
    return owned[:, owner.numel() :]


def expert_down(c: AdaptedMLPCall, owned: Tensor | None) -> Tensor:
    """The down-projection of each group, `[V, r, D]`."""
    weight = cast(c.down_weight, c.sum_dtype)
    if owned is None or c.down_owner is None:
        return weight.unsqueeze(0)
    own = _of_weights(owned, c.down_owner)
    if c.down_init is None:
        return weight * own
    init = cast(c.down_init, c.sum_dtype)
    return torch.addcmul(init, weight - init, own)


def folded_down(c: AdaptedMLPCall, ids: Tensor, saved: Tensor | None) -> tuple[Tensor, Tensor]:
    """A, its rows centred, `[V, r, D]`, and a, `[V, 1, r]`."""
    norm_weight, norm_bias = adapter_norm(c)
    owned = ownership_of(c.down_owner, c.down_bias, ids, c.sum_dtype)
    down, bias = expert_down(c, owned), cast(c.down_bias, c.sum_dtype)
    if owned is not None and c.down_owner is not None:
        bias = _of_biases(owned, c.down_owner) @ bias
    bias = torch.addmv(bias.view(-1), down.view(-1, c.width), norm_bias).view(-1, 1, c.bottleneck)
    return centre(torch.mul(down, norm_weight, out=saved)), bias


def centre(matrix: Tensor) -> Tensor:
    """Take off the mean of each row, in place."""
    return matrix.sub_(matrix.mean(-1, keepdim=True))


def expert_up(c: AdaptedMLPCall, owned: Tensor | None) -> Tensor:
    """The up-projection of each group, `[V, D, r]`."""
    weight = cast(c.up_weight, c.sum_dtype)
    return weight.unsqueeze(0) if owned is None or c.up_owner is None else weight * _of_weights(owned, c.up_owner)


def scaled_up(c: AdaptedMLPCall, owned: Tensor | None) -> Tensor:
    """U, `[V, D, r]`."""
    up = expert_up(c, owned)
    return up * scale_of(c) if owned is None else up.mul_(scale_of(c))


def expert_up_bias(c: AdaptedMLPCall, owned: Tensor | None) -> Tensor:
    """The up-projection's bias of each group, `[V, D]`."""
    bias = cast(c.up_bias, c.sum_dtype)
    return bias if owned is None or c.up_owner is None else _of_biases(owned, c.up_owner) @ bias


def scaled_up_bias(c: AdaptedMLPCall, owned: Tensor | None) -> Tensor:
    """u, `[V, 1, D]`."""
    return (expert_up_bias(c, owned) * scale_of(c)).unsqueeze(1)


def scale_of(c: AdaptedMLPCall) -> Tensor | float:
    """s, a number or a tensor without dimensions."""
    return c.scale if c.scale_tensor is None else cast(c.scale_tensor.view(()), c.sum_dtype)


def adapter_norm(c: AdaptedMLPCall) -> tuple[Tensor, Tensor]:
    """Weight and bias of the adapter's norm; an adapter without one reads what the MLP reads."""
    weight = c.mlp_norm_weight if c.norm_weight is None else c.norm_weight
    bias = c.mlp_norm_bias if c.norm_bias is None else c.norm_bias
    return cast(weight, c.sum_dtype), cast(bias, c.sum_dtype)


def owned_sum(weight: Tensor, bias: Tensor, owner: Tensor | None, owned: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradients of a projection's weight and of every expert's bias, by those of what the groups used."""
    if owner is None or owned is None:
        return weight[0], bias
    return (weight * _of_weights(owned, owner)).sum(0), _of_biases(owned, owner).T @ bias
