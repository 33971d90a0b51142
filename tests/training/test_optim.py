import math

import pytest
import torch
from torch import Tensor, nn

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


def resumed(before: bool, after: bool, device: str = "cpu") -> torch.optim.Optimizer:
    """An optimizer, graphed or not, that went on from a checkpoint of one that was graphed or not, after two steps."""
    model = nn.Linear(2, 2)
    old = make_optimizer(model, 1.0, 0.0, graphed=before)
    schedule = make_schedule(old, steps=20, warmup_steps=4)
    for _ in range(2):
        model(torch.ones(1, 2)).sum().backward()
        old.step()
        schedule.step()
    new = make_optimizer(nn.Linear(2, 2, device=device), 1.0, 0.0, graphed=after)
    new.load_state_dict(old.state_dict())
    return new


def test_a_resumed_graph_reads_its_learning_rate_on_the_device_of_its_weights():
    """On the CPU, where a checkpoint has it, the rate of the captured step would be that of all later ones."""
    groups = resumed(True, True, device="meta").param_groups
    assert {group["lr"].device.type for group in groups} == {"meta"}


@pytest.mark.parametrize("before", [False, True])
def test_a_resumed_run_may_begin_and_cease_to_capture_graphs(before):
    for group in resumed(before, True).param_groups:
        assert isinstance(group["lr"], Tensor)
        assert group["lr"].item() == 0.75
        assert group["capturable"]
    for group in resumed(before, False).param_groups:
        assert group["lr"] == 0.75
        assert not isinstance(group["lr"], Tensor)
        assert not group["capturable"]
