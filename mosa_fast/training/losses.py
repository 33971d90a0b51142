"""The two-view loss (docs/method.md, Loss; paper, section 3.4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mosa_fast.config import LossConfig

DEEP_BLOCKS = 6  # the deep term looks at so many blocks, from the first
DEEP_WEIGHT = 0.01  # on top of reg_weight


def mosa_loss(
    logits: Tensor,
    labels: Tensor,
    config: LossConfig,
    class_weights: Tensor | None = None,
    block_outputs: list[Tensor] | None = None,
) -> Tensor:
    """`CE(p1) + add_weight CE(p2) + reg_weight KLsym + 0.01 reg_weight DEEP`, or `CE(p1)` with one view.

    Args:
        logits: `[V * B, classes]`, view after view; V is 1 or 2.
        labels: int64 `[B]`, or probabilities of the classes, float `[B, classes]`.
        class_weights: `[classes]`, for the cross-entropy; its sum is divided by the batch size all the same.
        block_outputs: outputs of the first blocks, `[V * B, T, D]` each, for the deep term.

    Returns:
        Scalar, float32 (float64 for float64 logits).
    """
    logits = _at_least_float(logits)
    if len(logits) == len(labels):
        return _cross_entropy(logits, labels, class_weights)
    first, second = logits.chunk(2)
    loss = _cross_entropy(first, labels, class_weights)
    if config.add_weight:
        loss = loss + config.add_weight * _cross_entropy(second, labels, class_weights)
    if config.reg_weight:
        loss = loss + config.reg_weight * symmetric_kl(first, second)
        if config.deep_reg:
            if not block_outputs:
                raise ValueError("deep_reg needs the outputs of the first blocks")
            loss = loss + config.reg_weight * DEEP_WEIGHT * deep_distance(block_outputs)
    return loss


def symmetric_kl(first: Tensor, second: Tensor) -> Tensor:
    """`(KL(sg q || p) + KL(sg p || q)) / 2` of two views' class distributions, mean over the batch; logits in."""
    log_p, log_q = F.log_softmax(first, dim=-1), F.log_softmax(second, dim=-1)
    forward = F.kl_div(log_p, log_q.detach(), reduction="batchmean", log_target=True)
    backward = F.kl_div(log_q, log_p.detach(), reduction="batchmean", log_target=True)
    return (forward + backward) / 2


def deep_distance(block_outputs: list[Tensor]) -> Tensor:
    """Mean over the first (at most six) blocks of the mean squared difference between the two views."""
    outputs = block_outputs[:DEEP_BLOCKS]
    pairs = [_at_least_float(output).chunk(2) for output in outputs]
    return torch.stack([F.mse_loss(first, second) for first, second in pairs]).mean()


def class_weights(labels: list[int], classes: int, rule: str) -> Tensor | None:
    """Weights from the training counts, scaled to sum to the number of classes; None for the rule "none".

    Args:
        labels: of the training images.
        classes: number of classes.
        rule: "none", "inverse" or "inverse_sqrt".

    Raises:
        ValueError: a class has no training image.
    """
    if rule == "none":
        return None
    counts = torch.bincount(torch.tensor(labels), minlength=classes).float()
    if (counts == 0).any():
        raise ValueError(f"loss.class_weights: class {int((counts == 0).nonzero()[0])} has no training image")
    weights = 1 / counts if rule == "inverse" else counts.rsqrt()
    return weights * classes / weights.sum()


def _cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    weights = None if weights is None else weights.to(logits.dtype)
    labels = labels.to(logits.dtype) if labels.is_floating_point() else labels
    return F.cross_entropy(logits, labels, weight=weights, reduction="sum") / max(1, len(labels))


def _at_least_float(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
