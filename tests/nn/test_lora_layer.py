"""Low-rank pairs as a layer that stands alone: which experts a pass computes with when it is given none."""

import copy

import pytest
import torch

from mosa_fast.nn import SparseLoRA

WIDTH, COLUMNS = 6, ((0, 5), (10, 15))  # q and v of a fused qkv


def make(**options):
    generator = torch.Generator().manual_seed(0)
    settings = {"rank": 3, "experts": 4, "share": "none", "generator": generator, "dtype": torch.float64}
    layer = SparseLoRA(WIDTH, COLUMNS, **settings | options)
    with torch.no_grad():
        layer.up.weight.copy_(torch.randn(layer.up.weight.shape, generator=generator))
        layer.down.weight.add_(torch.randn(layer.down.weight.shape, generator=generator))
    return layer


@pytest.fixture
def x():
    return torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def y():
    return torch.randn(2, 7, 15, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_training_draws_a_pair_for_every_target_from_the_seed(x, y):
    layer = make()
    assert torch.equal(layer(x, y, seed=1), layer(x, y, seed=1))
    outs = torch.stack([layer(x, y, seed=seed) for seed in range(6)])
    for start, stop in COLUMNS:
        assert (outs[0] != outs[1:])[..., start:stop].any()
    assert torch.equal(outs[..., 5:10], y[..., 5:10].expand(6, -1, -1, -1))


@pytest.mark.parametrize("options", [{}, {"merge": "joint"}, {"routing": "fixed"}, {"scale": "trainable"}], ids=str)
def test_evaluation_computes_what_the_layer_becomes_by_merging(x, y, options):
    layer = make(**options).eval()
    merged = copy.deepcopy(layer)
    merged.merge()
    assert (merged.down.owner, merged.config.experts) == (None, 1)
    torch.testing.assert_close(layer(x, y), merged(x, y), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(make(merge="mean").eval()(x, y), make(merge="joint").eval()(x, y))


def test_a_fixed_expert_is_that_of_every_pass(x, y):
    layer = make(routing="fixed")
    zeros = torch.zeros(2, 1, 2, dtype=torch.int32)
    assert torch.equal(layer(x, y), layer(x, y, zeros))
    assert torch.equal(layer(x, y), layer.eval()(x, y))


def test_the_scale_of_a_layer_is_its_own_to_say():
    with pytest.raises(ValueError, match="scale must be given"):
        make(scale="auto")
