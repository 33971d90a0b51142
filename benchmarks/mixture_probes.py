"""What tells why a mixture learns as it does: how far apart its experts are, and how noisy its gradients.

All of it is computed without dropout, in evaluation mode, on the CPU, with the evidence's arithmetic (products in
bfloat16). A *draw* is one expert for every layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mosa_fast.adapters.model import AdaptedModel
from mosa_fast.nn.mixture import adapters

BATCH = 250


def balanced_draws(model: AdaptedModel, count: int, seed: int) -> Tensor:
    """Draws, int32 `[layers, count, 2]`, in which every expert of a layer comes as often as the others.

    Raises:
        ValueError: the number of experts does not divide `count`.
    """
    experts = model.mosa_config.experts
    if count % experts:
        raise ValueError(f"{count} draws cannot have each of {experts} experts equally often")
    generator = torch.Generator().manual_seed(seed)
    layers = sum(1 for _ in adapters(model))
    orders = [torch.randperm(count, generator=generator) % experts for _ in range(2 * layers)]
    return torch.stack(orders).view(layers, 2, count).transpose(1, 2).int().contiguous()


@torch.no_grad()
def logits_of(model: AdaptedModel, images: Tensor, draws: Tensor | None = None) -> Tensor:
    """Logits `[V, N, classes]` of V draws, or with V = 1 of the merged model."""
    views = 1 if draws is None else draws.shape[1]
    with torch.autocast("cpu", torch.bfloat16):
        parts = [model.eval()(part, experts=draws).unflatten(0, (views, len(part))) for part in images.split(BATCH)]
    return torch.cat(parts, 1).float()


@contextmanager
def scaled(model: AdaptedModel, factor: float) -> Iterator[None]:
    """Inside, what all adapters add is `factor` times as much; the number of experts makes a sum of the mean merge."""
    layers = list(adapters(model))
    before = [layer.scale for layer in layers]
    for layer in layers:
        layer.scale = layer.scale * factor
    try:
        yield
    finally:
        for layer, scale in zip(layers, before, strict=True):
            layer.scale = scale


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """In percent, the mean over the first dimension of `[V, N, classes]`."""
    return 100 * (logits.argmax(-1) == labels).double().mean().item()


def kl(p: Tensor, q: Tensor) -> float:
    """Mean of KL(p || q) over all but the last dimension; logits in."""
    log_p, log_q = F.log_softmax(p, -1), F.log_softmax(q, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


def l2(p: Tensor, q: Tensor) -> float:
    """Mean Euclidean distance of logits, each centred: a constant that is added to all changes no prediction."""
    difference = p - q
    return (difference - difference.mean(-1, keepdim=True)).norm(dim=-1).mean().item()


def distances(model: AdaptedModel, images: Tensor, draws: Tensor) -> dict[str, float]:
    """How far apart sampled, merged and frozen models are.

    Returns:
        KL and L2 from draws to the merged model and from one draw to the next; L2 from either to the model whose
        adapters add nothing, with the same head: what a draw, and what the merged adapter changes at all.
    """
    merged, sampled = logits_of(model, images), logits_of(model, images, draws)
    with model.disable_adapters():
        frozen = logits_of(model, images)
    return {
        "kl_sampled_merged": kl(sampled, merged),
        "kl_sampled_sampled": kl(sampled, sampled.roll(1, 0)),
        "l2_sampled_merged": l2(sampled, merged),
        "l2_sampled_sampled": l2(sampled, sampled.roll(1, 0)),
        "l2_merged_frozen": l2(merged, frozen),
        "l2_sampled_frozen": l2(sampled, frozen),
    }


@torch.no_grad()
def weight_sizes(model: AdaptedModel) -> dict[str, float]:
    """Root mean square of the up-projections' weights: as they are trained, and merged."""
    weights = [layer.up.weight for layer in adapters(model)]
    trained = torch.cat([weight.flatten() for weight in weights]).square().mean().sqrt().item()
    return {"trained": trained, "merged": trained / model.mosa_config.experts}


def gradient_noise(model: AdaptedModel, batches: Sequence[tuple[Tensor, Tensor]], draws: Tensor) -> dict[str, Any]:
    """Variance of the cross-entropy's gradient over draws and over minibatches, for the up- and the down-projections.

    Args:
        model: with a dense down-projection (share = down), or a dense adapter.
        batches: minibatches of images and labels.
        draws: balanced; with one expert, of one draw.

    Returns:
        For "up" and "down", as sums over the weights: "signal", the squared mean gradient; "batches", the variance over
        minibatches of the mean over draws; "draws", the variance over draws for the same minibatch. "active" is the
        same for the up-projections' weights in those draws alone in which they learn, each weight in its own.
    """
    layers = list(adapters(model))
    weights = [layer.up.weight for layer in layers] + [layer.down.weight for layer in layers]
    rows = []
    for images, labels in batches:
        for draw in draws.split(1, dim=1):
            with torch.autocast("cpu", torch.bfloat16):
                logits = model.eval()(images, experts=draw)
            found = torch.autograd.grad(F.cross_entropy(logits.float(), labels), weights)
            rows.append(torch.cat([gradient.flatten() for gradient in found]))
    gradients = torch.stack(rows).unflatten(0, (len(batches), draws.shape[1]))  # [minibatches, draws, weights]
    up_weights = sum(layer.up.weight.numel() for layer in layers)
    up, down = gradients[..., :up_weights], gradients[..., up_weights:]
    everywhere = torch.ones(draws.shape[1], 1, dtype=torch.bool)
    owners = [layer.up.owner for layer in layers]
    active = everywhere
    if owners[0] is not None:
        own = [owner.flatten() == chosen[:, None] for owner, chosen in zip(owners, draws[:, :, 1], strict=True)]
        active = torch.cat(own, 1)
    return {
        "up": parts_of_variance(up, everywhere),
        "down": parts_of_variance(down, everywhere),
        "active": parts_of_variance(up, active),
    }


def parts_of_variance(gradients: Tensor, counted: Tensor) -> dict[str, float]:
    """Signal and variances of gradients `[minibatches, draws, weights]`, sums over the weights, without their bias.

    Args:
        gradients: of all minibatches with all draws.
        counted: bool `[draws, weights or 1]`: the draws that count for a weight, as many for each.
    """
    counted = counted.expand(gradients.shape[1:])
    draws = int(counted[:, 0].sum())
    own = gradients.transpose(1, 2)[:, counted.T].unflatten(1, (-1, draws))  # [minibatches, weights, draws that count]
    means = own.mean(-1)
    over_draws = own.var(-1).mean(0).sum().item() if draws > 1 else 0.0
    over_means = means.var(0).sum().item()
    signal = means.mean(0).square().sum().item() - over_means / len(gradients)
    return {"signal": signal, "batches": over_means - over_draws / draws, "draws": over_draws}
