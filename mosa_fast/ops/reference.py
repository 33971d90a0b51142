"""The operators in plain PyTorch: the oracle of every kernel, and what runs on a CPU.

sparse_adapter: for group v with experts (d, u), M tokens x in R^[M, D]:

    n = norm(x)                                     (or x)
    h = act(n W_down[d]^T + b_down[d])              [M, r]
    y = drop(h) W_up[u]^T + b_up[u]                 [M, D]
    out = (x) + (skip) + scale * y

sparse_lora: for group v and a target, which draw the experts (d, u), M tokens x in R^[M, D], y in R^[M, O]:

    out = y + scale * (x W_down[d]^T) W_up[u]^T     in the target's columns, y in those of no target

adapter_bank: for a sample of task t, M tokens x in R^[M, D]:

    n = norm_t(x)                                       (or x)
    h = act(n W_down[t]^T + b_down[t])                  [M, r] for each target
    out = (x) + (skip) + h W_up[t]^T + b_up[t]          [M, O] in the target's columns, else (x) + (skip)

The first two with W[e] = W0 + (W - W0) * [owner == e] and, for the merged id -1, W0 + (W - W0) / E (docs/method.md,
Weights and gradients, Merge). They are differentiable by autograd, so that this file also defines their gradients: an
expert's weights get one only where it owns them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from mosa_fast.ops.arguments import AdapterBankCall, SparseAdapterCall, SparseLoRACall
from mosa_fast.ops.philox import dropout_keep

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}
IDENTITY = "identity"  # the activation of low-rank pairs, which only a bank's operator is told
MERGED = -1  # the expert id that means: all of them, averaged


def sparse_adapter(call: SparseAdapterCall) -> Tensor:
    """`mosa_fast.ops.sparse_adapter` on a checked call."""
    c, x = call, call.x
    sum_dtype = c.sum_dtype
    samples = x.shape[0] if c.fork else x.shape[0] // c.groups

    with torch.autocast(x.device.type, enabled=False):
        # [1, M, D] when all groups read the same tokens, else [groups, M, D].
        streams = x.reshape(1 if c.fork else c.groups, samples * c.tokens, c.width)
        normed = streams.to(sum_dtype)
        if c.norm_weight is not None and c.norm_bias is not None:
            normed = F.layer_norm(normed, (c.width,), c.norm_weight.to(sum_dtype), c.norm_bias.to(sum_dtype), c.eps)

        down = expert_weight(c.down_weight, c.down_init, c.down_owner, c.experts[:, 0], c.down_bias.shape[0])
        bias = expert_bias(c.down_bias, c.down_owner, c.experts[:, 0])
        pre = affine(normed.to(c.product_dtype), down.to(c.product_dtype), bias.to(sum_dtype))
        hidden = ACTIVATIONS[c.activation](pre)
        if c.seed is not None:
            keep = dropout_keep(c.seed, c.dropout, c.groups, samples, c.tokens, c.bottleneck)
            hidden = hidden * keep.flatten(1, 2).to(sum_dtype).mul_(c.dropout_scale)

        scale: float | Tensor | None = c.scale if c.scale_tensor is None else c.scale_tensor.view(())
        up_weight, up_bias = c.up_weight, c.up_bias
        if c.scale_tensor is None and c.product_dtype == sum_dtype:
            # In the weights, which are the least. Not where that would round them, nor a scale that wants a gradient.
            up_weight, up_bias, scale = up_weight.to(sum_dtype) * c.scale, up_bias.to(sum_dtype) * c.scale, None
        up = expert_weight(up_weight, None, c.up_owner, c.experts[:, 1], up_bias.shape[0])
        bias = expert_bias(up_bias, c.up_owner, c.experts[:, 1])
        out = affine(hidden.to(c.product_dtype), up.to(c.product_dtype), bias.to(sum_dtype))
        if scale is not None:
            out = out * scale
        # For a sum in place of a view, as linear returns one, backward would copy three times. Under vmap, what is
        # added may have samples that out has not; and a compiler makes its own choice of memory.
        transformed = torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None
        in_place = not transformed and not (torch.is_grad_enabled() and out._is_view())
        for added in (streams if c.add_input else None, None if c.skip is None else c.skip.reshape(streams.shape)):
            if added is not None:
                out = out.add_(added) if in_place else (out + added).to(out.dtype)
        return out.expand(c.groups, -1, -1).reshape(c.out_samples, *x.shape[1:]).to(c.out_dtype)


def sparse_lora(call: SparseLoRACall) -> Tensor:
    """`mosa_fast.ops.sparse_lora` on a checked call."""
    c, x, y = call, call.x, call.y
    sum_dtype = c.sum_dtype
    groups = 1 if c.fork else c.groups
    down_ids, up_ids = c.experts.unbind(-1)  # [T, V]

    with torch.autocast(x.device.type, enabled=False):
        ids = down_ids.mT.repeat_interleave(c.rank, dim=1)  # [V, T r]: of each row of the weight
        down = expert_weight(c.down_weight, c.down_init, c.down_owner, ids, c.num_experts)
        # [1, M, D] when all groups read the same tokens, else [groups, M, D].
        streams = x.reshape(groups, c.in_rows // groups, c.width).to(c.product_dtype)
        hidden = project(streams, down.to(c.product_dtype))
        passed = y.reshape(*streams.shape[:2], y.shape[-1])

        parts, first_row, end = [], 0, 0
        for target, (start, stop) in enumerate(c.ranges):
            rows = slice(first_row, first_row + stop - start)
            owner = None if c.up_owner is None else c.up_owner[rows]
            up = expert_weight(c.up_weight[rows], None, owner, up_ids[target], c.num_experts)
            ranks = hidden[..., target * c.rank : (target + 1) * c.rank]
            update = project(ranks, up.to(c.product_dtype)).to(sum_dtype)
            update = update * (c.scale if c.scale_tensor is None else c.scale_tensor.view(()))
            parts += [passed[..., end:start], (passed[..., start:stop] + update).to(y.dtype)]
            first_row, end = rows.stop, stop
        parts.append(passed[..., end:])
        parts = [part.expand(c.groups, -1, -1) for part in parts if part.shape[-1]]
        out = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        return out.reshape(c.out_samples, *y.shape[1:])


def adapter_bank(call: AdapterBankCall, out: Tensor) -> None:
    """`mosa_fast.ops.adapter_bank` on a checked call, into `out`, which may be skip.

    Neighbouring samples of one task share their products. To give every sample a copy of its task's weights, and make
    one batched product of all, took twice as long on a CPU (64 samples of 197 tokens, D = 192 and 768, r = 64).
    """
    c, x = call, call.x
    sum_dtype = c.sum_dtype
    streams = x.reshape(-1, c.width)
    skips = None if c.skip is None else c.skip.reshape(-1, c.out_width)
    outs = out.view(-1, c.out_width)

    with torch.autocast(x.device.type, enabled=False):
        for task, samples in runs(c.tasks):
            rows = slice(samples.start * c.tokens, samples.stop * c.tokens)
            stream, own = streams[rows], outs[rows]
            hidden = _bank_hidden(c, stream.to(sum_dtype), task)
            total = own if own.dtype == sum_dtype else torch.empty_like(own, dtype=sum_dtype)
            # First what is added, then products in place: the fewest passes over the output.
            if skips is not None and c.add_input:
                torch.add(skips[rows], stream, out=total)
            elif skips is not None:
                if total.data_ptr() != skips[rows].data_ptr():
                    total.copy_(skips[rows])
            elif c.add_input:
                total.copy_(stream)
            else:
                total.zero_()
            _add_up_projections(c, total, hidden, task)
            if total is not own:
                own.copy_(total)


def _bank_hidden(c: AdapterBankCall, stream: Tensor, task: int) -> Tensor:
    """Hidden values h of a task's tokens `[M, D]`, all targets' side by side: `[M, R]` in the product dtype."""
    sum_dtype = stream.dtype
    if c.norm_weight is not None and c.norm_bias is not None:
        affine = (c.norm_weight[task].to(sum_dtype), c.norm_bias[task].to(sum_dtype))
        stream = F.layer_norm(stream, (c.width,), *affine, c.eps)
    weight, bias = c.down_weight[task].to(c.product_dtype), c.down_bias
    if bias is None:
        hidden = F.linear(stream.to(c.product_dtype), weight)
    elif c.product_dtype == sum_dtype:
        hidden = F.linear(stream, weight, bias[task].to(sum_dtype))
    else:  # added after the product, to spare it the rounding
        hidden = F.linear(stream.to(c.product_dtype), weight) + bias[task].to(sum_dtype)
    return (hidden if c.activation == IDENTITY else ACTIVATIONS[c.activation](hidden)).to(c.product_dtype)


def _add_up_projections(c: AdapterBankCall, total: Tensor, hidden: Tensor, task: int) -> None:
    """Add each target's up-projection of h, and its bias, to its columns of `total`, `[M, O]`."""
    first_row = 0
    for target, (start, stop) in enumerate(c.ranges):
        rows = slice(first_row, first_row + stop - start)
        ranks = hidden[:, target * c.rank : (target + 1) * c.rank]
        weight = c.up_weight[task, rows].to(c.product_dtype)
        columns = total[:, start:stop]
        if hidden.dtype == total.dtype:
            columns.addmm_(ranks, weight.T)
        else:
            columns += ranks @ weight.T
        if c.up_bias is not None:
            columns += c.up_bias[task, rows]
        first_row = rows.stop


def runs(tasks: Tensor) -> Iterator[tuple[int, slice]]:
    """Each run of equal tasks: the task, and where its samples are."""
    start = 0
    for task, equal in groupby(tasks.tolist()):
        stop = start + len(list(equal))
        yield task, slice(start, stop)
        start = stop


def ownership(owner: Tensor, ids: Tensor, experts: int, dtype: torch.dtype) -> Tensor:
    """How much of each weight each group uses: 1 or 0 for an expert, 1 / E merged; `[V, *owner.shape]`.

    ids: `[V]`, or `[V, rows]` where the rows of a weight have experts of their own.
    """
    ids = ids.view(*ids.shape, *[1] * (1 + owner.ndim - ids.ndim))
    # Compared in place, as numbers: on a CPU to make bools, and to turn them into numbers, takes twice as long.
    return (owner.to(dtype) - ids).eq_(0).add_(ids == MERGED, alpha=1.0 / experts)


def expert_weight(weight: Tensor, init: Tensor | None, owner: Tensor | None, ids: Tensor, experts: int) -> Tensor:
    """The weights that each group computes with: `[V, out, in]`, or `[out, in]` of a dense projection."""
    if owner is None:
        return weight
    owned = ownership(owner, ids, experts, weight.dtype)
    return weight * owned if init is None else init + (weight - init) * owned


def expert_bias(bias: Tensor, owner: Tensor | None, ids: Tensor) -> Tensor:
    """Each group's bias: its expert's row, or the mean of all rows; `[V, 1, out]`, or `[out]` of a dense projection."""
    if owner is None:
        return bias.flatten()
    rows = torch.arange(bias.shape[0], device=bias.device)
    return (ownership(rows, ids, bias.shape[0], bias.dtype) @ bias).unsqueeze(1)


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`project`'s product, plus `[V, 1, out]` or `[out]`, in the bias's dtype."""
    if x.dtype == bias.dtype:
        return project(x, weight, bias)
    return project(x, weight).to(bias.dtype) + bias  # the bias is spared the rounding of the product


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`[G, M, in]` times `[V, out, in]` or `[out, in]`, plus `[V, 1, out]` or `[out]`.

    Either of G and V may be 1; the result is `[max(G, V), M, out]`.
    """
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    if x.shape[0] == 1:
        # One product for all groups, so that x is read once.
        rows = F.linear(x[0], weight.flatten(0, 1), None if bias is None else bias.flatten())
        return rows.unflatten(-1, weight.shape[:2]).transpose(0, 1)
    return torch.bmm(x, weight.mT) if bias is None else torch.baddbmm(bias, x, weight.mT)
