"""Every family with every placement and every way of splitting, against brute force in float64."""

import copy
import itertools

import pytest
import torch
from oracle import OracleModel
from test_composition import FAMILIES, make_quiet
from tiny_models import image

import mosa_fast as mosa
from mosa_fast.adapters.block import AdaptedBlock
from mosa_fast.adapters.linears import LoRALinear
from mosa_fast.adapters.placements import PLACEMENTS
from mosa_fast.backbones.heads import heads
from mosa_fast.nn.mixture import adapters
from mosa_fast.routing import draw, step_seed
from mosa_fast.training.optim import make_optimizer

AXES = {
    "family": FAMILIES,
    "placement": list(PLACEMENTS),
    "share": ["down", "up", "none"],
    "bias": ["per_expert", "split"],
    "merge": ["mean", "joint"],
    "scale": [0.7, "trainable"],
}
EXPERTS, STEPS = 3, 20


def pairwise(axes):
    """Some points of the product such that every two values of different axes meet in one."""
    points = list(itertools.product(*axes))
    missing = {frozenset(pair) for point in points for pair in itertools.combinations(enumerate(point), 2)}
    chosen = []
    while missing:
        best = max(
            points, key=lambda p: sum(frozenset(pair) in missing for pair in itertools.combinations(enumerate(p), 2))
        )
        chosen.append(best)
        missing -= {frozenset(pair) for pair in itertools.combinations(enumerate(best), 2)}
    return chosen


SOME = pairwise(AXES.values())
ALL = list(itertools.product(*AXES.values()))
POINTS = [*SOME, *(pytest.param(*point, marks=pytest.mark.slow) for point in ALL if point not in SOME)]


@pytest.mark.parametrize(tuple(AXES), POINTS)
def test_logits_gradients_and_optimizer_steps_equal_brute_force(family, placement, share, bias, merge, scale):
    plain = make_quiet(family).double()
    images = image(plain, 2).double()
    settings = {"bottleneck": 4, "experts": EXPERTS, "dropout": 0.0}
    config = mosa.MoSAConfig(placement=placement, share=share, bias=bias, merge=merge, scale=scale, **settings)
    model = mosa.adapt(copy.deepcopy(plain), config).train()
    randomise(model)
    blocks = [name for name, module in model.backbone.named_modules() if isinstance(module, AdaptedBlock)]
    oracle = OracleModel(plain, blocks, placement, adapters(model)).eval()  # frozen BatchNorm as in evaluation
    train_side_by_side(model, oracle, images, len(oracle.adapters), share, lambda: compare_gradients(model, oracle))
    for adapter, expected in zip(adapters(model), oracle.adapters, strict=True):
        for own, other in ((adapter.down, expected.down), (adapter.up, expected.up)):
            close(own.weight, other.value())
    close(model.eval()(images), oracle.forward_merged(images, merge))


LORA_AXES = {
    "family": FAMILIES,
    "targets": ["qv", "qkvo", "o", "k"],
    "share": ["down", "up", "none"],
    "merge": ["mean", "joint"],
    "scale": [0.7, "trainable"],
}
LORA_SOME, LORA_ALL = pairwise(LORA_AXES.values()), list(itertools.product(*LORA_AXES.values()))
LORA_POINTS = [*LORA_SOME, *(pytest.param(*p, marks=pytest.mark.slow) for p in LORA_ALL if p not in LORA_SOME)]


@pytest.mark.parametrize(tuple(LORA_AXES), LORA_POINTS)
def test_low_rank_pairs_equal_brute_force(family, targets, share, merge, scale):
    plain = make_quiet(family).double()
    images = image(plain, 2).double()
    settings = {"method": "lora", "rank": 3, "experts": EXPERTS}
    config = mosa.MoSAConfig(targets=targets, share=share, merge=merge, scale=scale, **settings)
    model = mosa.adapt(copy.deepcopy(plain), config).train()
    randomise(model)
    names = {id(module.lora): name for name, module in model.backbone.named_modules() if isinstance(module, LoRALinear)}
    loras = [(names[id(lora)].replace(".block.", "."), lora) for lora in adapters(model)]
    oracle = OracleModel(plain, (), "qkvo", loras).eval()

    def compare():
        for (_, lora), expected in zip(loras, oracle.adapters, strict=True):
            for number, own in enumerate((lora.down, lora.up)):
                close(own.weight.grad, torch.cat([pair[number].gradient()[0] for pair in expected.pairs]))
            if isinstance(lora.scale, torch.nn.Parameter):
                close(lora.scale.grad, expected.scale.grad)

    train_side_by_side(model, oracle, images, sum(lora.draws for _, lora in loras), share, compare)
    for (_, lora), expected in zip(loras, oracle.adapters, strict=True):
        for number, own in enumerate((lora.down, lora.up)):
            close(own.weight, torch.cat([pair[number].value() for pair in expected.pairs]))
    close(model.eval()(images), oracle.forward_merged(images, merge))
    if family not in ("hybrid",):
        close(mosa.fold(model)(images), oracle.forward_merged(images, merge))
    assert not torch.allclose(model(images), plain(images))
    close(mosa.merge(model)(images), oracle.forward_merged(images, merge))


def train_side_by_side(model, oracle, images, draws, share, compare_gradients):
    """Steps of both with the same experts: logits are compared in each, gradients in the first and the last."""
    labels = torch.tensor([3, 7]).repeat(2)
    # The copies of W0 in an expert that does not own them would decay (docs/method.md, Weights and gradients).
    decay = 0.1 if share == "down" else 0.0
    optimizers = [make_optimizer(m, lr=1e-3, weight_decay=decay) for m in (model, oracle)]
    for step in range(STEPS):
        experts = draw(step_seed(5, step), draws, 2, EXPERTS).experts
        logits = []
        for m, optimizer in zip((model, oracle), optimizers, strict=True):
            optimizer.zero_grad()
            logits.append(m(images, experts=experts))
            torch.nn.functional.cross_entropy(logits[-1], labels).backward()
            if m is oracle:
                oracle.mask_gradients()
        close(*logits)
        if step in (0, STEPS - 1):
            compare_gradients()
        for optimizer in optimizers:
            optimizer.step()


def randomise(model):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for adapter in adapters(model):
            for parameter in adapter.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).double())


def compare_gradients(model, oracle):
    for adapter, expected in zip(adapters(model), oracle.adapters, strict=True):
        for own, other in ((adapter.down, expected.down), (adapter.up, expected.up)):
            weight, bias_rows = other.gradient()
            close(own.weight.grad, weight)
            close(own.bias.grad, bias_rows.sum(0) if own.bias.ndim == 1 else bias_rows)
        if adapter.norm is not None:
            close(adapter.norm.weight.grad, expected.norm.weight.grad)
            close(adapter.norm.bias.grad, expected.norm.bias.grad)
        if isinstance(adapter.scale, torch.nn.Parameter):
            close(adapter.scale.grad, expected.scale.grad)
    for own, other in zip(heads(model), heads(oracle.backbone), strict=True):
        for parameter, wanted in zip(own.parameters(), other.parameters(), strict=True):
            close(parameter.grad, wanted.grad)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
