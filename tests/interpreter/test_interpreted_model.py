"""Adapted timm models on the triton backend, against the same model on the reference."""

import copy

import pytest
import torch
from tiny_vit import make_tiny_vit

import mosa_fast as mosa
from mosa_fast.adapters.block import routed
from mosa_fast.routing import draw, step_seed


@pytest.fixture
def model():
    # Width 32: below the widths that matter, but the interpreter is slow.
    plain = make_tiny_vit(embed_dim=32, depth=2, num_heads=2)
    model = mosa.adapt(plain, mosa.MoSAConfig(bottleneck=16, experts=3, share="none", scale="trainable", dropout=0.2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def test_logits_gradients_and_evaluation_equal_the_reference(model):
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    other = copy.deepcopy(model)
    results = []
    for name, m in (("triton", model), ("reference", other)):
        with mosa.backend(name):
            logits = m.train()(images, views=2, seed=7)
            logits.square().sum().backward()
            gradients = {n: p.grad for n, p in m.named_parameters() if p.requires_grad}
            with torch.no_grad():
                merged = m.eval()(images)
        results.append((logits.detach(), merged, gradients))
    (logits, merged, gradients), (expected_logits, expected_merged, expected) = results
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(merged, expected_merged, rtol=1e-4, atol=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_an_adapted_block_compiles_without_a_graph_break(model):
    routing = draw(step_seed(0, 0), 1, 2, 3)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))
    block = model.blocks[0]
    results = []
    with mosa.backend("triton"):
        for call in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
            model.zero_grad()
            with routed(model.blocks[:1], routing, fork=True):
                out = call(x)
            out.square().sum().backward()
            results.append([out.detach(), *(p.grad.clone() for p in block.adapter.parameters())])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
