import math

import pytest
import torch
import torch.nn.functional as F

from mosa_fast.config import LossConfig
from mosa_fast.training.losses import class_weights, deep_distance, mosa_loss, symmetric_kl

P1, P2 = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])


def test_default_loss_is_cross_entropy_of_the_first_view_plus_symmetric_kl():
    p, q = P1.softmax(1), P2.softmax(1)
    kl = ((q * (q.log() - p.log())).sum(1) + (p * (p.log() - q.log())).sum(1)).mean() / 2
    expected = F.cross_entropy(P1, LABELS) + kl
    torch.testing.assert_close(mosa_loss(torch.cat([P1, P2]), LABELS, LossConfig()), expected)


def test_the_target_of_each_divergence_gets_no_gradient():
    first, second = P1.clone().requires_grad_(), P2.clone().requires_grad_()
    symmetric_kl(first, second).backward()
    # d KL(sg q || softmax(a)) / d a = (softmax(a) - q) / B
    expected = (P1.softmax(1) - P2.softmax(1)) / (2 * len(P1))
    torch.testing.assert_close(first.grad, expected)
    torch.testing.assert_close(second.grad, -expected)


def test_add_weight_and_deep_terms():
    outputs = [torch.randn(12, 3, 5, dtype=torch.float64) for _ in range(8)]
    deep = sum((o[:6] - o[6:]).square().mean() for o in outputs[:6]) / 6
    torch.testing.assert_close(deep_distance(outputs), deep)
    plain = mosa_loss(torch.cat([P1, P2]), LABELS, LossConfig(reg_weight=2.0))
    config = LossConfig(add_weight=0.5, reg_weight=2.0, deep_reg=True)
    loss = mosa_loss(torch.cat([P1, P2]), LABELS, config, block_outputs=outputs)
    expected = plain + 0.5 * F.cross_entropy(P2, LABELS) + 2.0 * 0.01 * deep
    torch.testing.assert_close(loss, expected)
    few = outputs[:2]
    torch.testing.assert_close(deep_distance(few), sum((o[:6] - o[6:]).square().mean() for o in few) / 2)


def test_weighted_cross_entropy_is_divided_by_the_batch_size():
    weights = torch.tensor([2.0, 1.0, 0.5, 0.5], dtype=torch.float64)
    loss = mosa_loss(P1, LABELS, LossConfig(views=1), weights)
    expected = -(weights[LABELS] * P1.log_softmax(1)[range(6), LABELS]).sum() / 6
    torch.testing.assert_close(loss, expected)


def test_class_weights_come_from_the_counts():
    labels = [0] * 4 + [1]
    assert class_weights(labels, 2, "none") is None
    torch.testing.assert_close(class_weights(labels, 2, "inverse"), torch.tensor([0.4, 1.6]))
    root = class_weights(labels, 2, "inverse_sqrt")
    torch.testing.assert_close(root, torch.tensor([1.0, 2.0]) * 2 / 3)
    assert math.isclose(root.sum(), 2, rel_tol=1e-6)
    with pytest.raises(ValueError, match="class 2 has no training image"):
        class_weights(labels, 3, "inverse")
