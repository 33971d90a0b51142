import itertools

import pytest
import torch
from oracle import OracleAdapter

from mosa_fast import SparseAdapter

DIM = 12


def make_adapter(seed=0, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    settings = {"bottleneck": 8, "experts": 3, "dropout": 0.0, "scale": 0.5, "dtype": torch.float64}
    adapter = SparseAdapter(DIM, generator=generator, **settings | kwargs)
    with torch.no_grad():  # as after some training
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return adapter


@pytest.fixture
def x():
    return torch.randn(4, 5, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_it_starts_as_the_identity(x):
    adapter = SparseAdapter(DIM, bottleneck=8, experts=3, dtype=torch.float64)
    assert torch.equal(adapter(x), x)
    assert torch.equal(adapter.eval()(x, skip=x), 2 * x)


@pytest.mark.parametrize("merge", ["mean", "joint"])
@pytest.mark.parametrize("bias", ["per_expert", "split"])
@pytest.mark.parametrize("share", ["down", "up", "none"])
def test_every_expert_and_the_merge_equal_the_oracle(x, share, bias, merge):
    adapter = make_adapter(share=share, bias=bias, merge=merge)
    oracle = OracleAdapter(adapter)
    for pair in itertools.product(range(3), repeat=2):
        out = adapter(x, experts=torch.tensor([pair], dtype=torch.int32))
        torch.testing.assert_close(out, x + oracle(x, pair), rtol=1e-12, atol=1e-12)
    merged = x + oracle.forward_merged(x, merge)
    torch.testing.assert_close(adapter.eval()(x), merged, rtol=1e-12, atol=1e-12)
    adapter.merge()
    assert adapter.down.owner is None
    assert adapter.up.owner is None
    torch.testing.assert_close(adapter(x), merged, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", ["per_expert", "split"])
@pytest.mark.parametrize("share", ["down", "up", "none"])
def test_gradients_equal_the_oracle(x, share, bias):
    adapter = make_adapter(share=share, bias=bias, scale="trainable")
    oracle = OracleAdapter(adapter)
    pairs = [(2, 1), (0, 1)]
    adapter(x, experts=torch.tensor(pairs, dtype=torch.int32), fork=True).square().sum().backward()
    torch.cat([x + oracle(x, pair) for pair in pairs]).square().sum().backward()
    for projection, expected in ((adapter.down, oracle.down), (adapter.up, oracle.up)):
        expected.mask_gradients()
        weight, bias_rows = expected.gradient()
        torch.testing.assert_close(projection.weight.grad, weight, rtol=1e-10, atol=1e-12)
        rows = bias_rows.sum(0) if projection.bias.ndim == 1 else bias_rows
        torch.testing.assert_close(projection.bias.grad, rows, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(adapter.norm.weight.grad, oracle.norm.weight.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(adapter.scale.grad, oracle.scale.grad, rtol=1e-10, atol=1e-12)


def test_the_mean_merge_is_the_expectation_over_the_draws(x):
    """With a dense down-projection the output is linear in the split one, so the expectation is exact."""
    adapter = make_adapter(share="down")
    draws = torch.stack([adapter(x, experts=torch.tensor([[0, e]], dtype=torch.int32)) for e in range(3)])
    torch.testing.assert_close(draws.mean(0), adapter.eval()(x), rtol=1e-12, atol=1e-12)


def test_one_expert_is_a_dense_adapter():
    adapter = SparseAdapter(DIM, bottleneck=8, experts=1)
    assert adapter.up.owner is None
    assert adapter.up.bias.shape == (1, DIM)


def test_training_draws_experts_and_dropout_from_the_seed(x):
    adapter = make_adapter(dropout=0.5)
    same = [adapter(x, seed=torch.tensor([1])) for _ in range(2)]
    assert torch.equal(*same)
    outs = torch.stack([adapter(x, seed=torch.tensor([s])) for s in range(5)])
    assert (outs[0] != outs[1:]).flatten(1).any(1).all()
    torch.manual_seed(0)
    assert not torch.equal(adapter(x), adapter(x))


def test_counts_of_the_merged_adapter_are_the_papers():
    counts = [12 * SparseAdapter(768, bottleneck=r, device="meta").merged_parameters for r in (64, 16)]
    assert counts == [1_208_064, 322_752]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"experts": 0}, "experts"),
        ({"share": "both"}, "share must be one of down, up, none"),
        ({"dropout": 1.5}, "dropout"),
        ({"scale": "auto"}, "scale must be given"),
        ({"dropout": "auto"}, "dropout must be given"),
        ({"activation": "auto"}, "activation must be given"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SparseAdapter(DIM, **kwargs)
