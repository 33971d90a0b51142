import math

import torch
from torch import nn

from mosa_fast.training.optim import make_optimizer, make_schedule


def test_everything_but_biases_is_decayed_and_frozen_weights_are_left_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2).requires_grad_(False))
    decayed, biases = make_optimizer(model, 0.1, 0.3).param_groups
    assert decayed["weight_decay"] == 0.3
    assert {id(p) for p in decayed["params"]} == {id(model[0].weight), id(model[1].weight)}
    assert biases["weight_decay"] == 0.0
    assert {id(p) for p in biases["params"]} == {id(model[0].bias), id(model[1].bias)}


def test_weight_decay_zero_is_adamw_without_decay():
    optimizer = make_optimizer(nn.Linear(2, 2), 0.1, 0.0)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0, 0.0]


def test_probes_use_sgd_with_momentum():
    optimizer = make_optimizer(nn.Linear(2, 2), 0.1, 0.3, "sgd")
    assert isinstance(optimizer, torch.optim.SGD)
    assert [(g["momentum"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.9, 0.3), (0.9, 0.0)]


def test_warm_up_is_per_step_and_never_zero_then_cosine_to_zero():
    optimizer = make_optimizer(nn.Linear(2, 2), 1.0, 0.0)
    schedule = make_schedule(optimizer, steps=20, warmup_steps=4)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    for step in range(4, 20):
        assert math.isclose(rates[step], 0.5 * (1 + math.cos(math.pi * (step - 4) / 16)))
    assert math.isclose(optimizer.param_groups[0]["lr"], 0.0, abs_tol=1e-12)
