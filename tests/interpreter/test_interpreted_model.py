"""Adapted timm models on the triton backend, against the same model on the reference."""

import copy

import pytest
import torch
import torch._dynamo.testing
from tiny_models import TINY, image
from tiny_vit import make_tiny_vit

import mosa_fast as mosa
from mosa_fast.adapters import block
from mosa_fast.adapters.block import routed
from mosa_fast.ops import triton_launching
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
    first = model.blocks[0]
    results = []
    with mosa.backend("triton"):
        for call in (first, torch.compile(first, fullgraph=True, backend="aot_eager")):
            model.zero_grad()
            with routed(model.blocks[:1], routing, fork=True):
                out = call(x)
            out.square().sum().backward()
            results.append([out.detach(), *(p.grad.clone() for p in first.adapter.parameters())])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that are launched."""
    names, launch = [], triton_launching.launch

    def recorded(kernel, *arguments):
        names.append(kernel.fn.__name__)
        launch(kernel, *arguments)

    monkeypatch.setattr(triton_launching, "launch", recorded)
    return names


def adapted(name, **options):
    torch.manual_seed(0)
    model = mosa.adapt(TINY[name](), mosa.MoSAConfig(bottleneck=4, experts=3, share="none", **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def gradients(model, images, backend, autocast=False):
    model.zero_grad()
    torch.manual_seed(1)  # of drop-path in the backbone
    with mosa.backend(backend):
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            logits = model.train()(images, views=2, seed=7)
        logits.float().square().sum().backward()
    return {"logits": logits.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def assert_close(ours, expected, tolerance=1e-3):
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        difference = (value - expected[name]).norm() / expected[name].norm().clamp_min(1e-6)
        assert difference < tolerance, f"{name}: {difference}"


@pytest.mark.parametrize(
    ("name", "placement", "launches"),
    [("vit", "houlsby", 1), ("vit", "pfeiffer", 1), ("swin", "adaptformer", 2)],  # Swin has two widths here
)
def test_the_weights_of_all_layers_of_one_shape_are_prepared_in_one_launch(launched, name, placement, launches):
    model = adapted(name, placement=placement)
    images = image(model)
    ours = gradients(model, images, "triton")
    assert launched.count("prepare_weights_kernel") == launches
    assert launched.index("sparse_adapter_fwd_kernel") > launched.index("prepare_weights_kernel")
    assert_close(ours, gradients(model, images, "reference"))


def test_products_in_half_precision_are_prepared_for_in_one_launch(launched):
    model = adapted("vit")
    images = image(model)
    ours = gradients(model, images, "triton", autocast=True)
    assert launched.count("prepare_weights_kernel") == 1
    assert_close(ours, gradients(model, images, "reference", autocast=True), 2e-2)


def test_layers_prepare_for_themselves_what_the_model_prepared_in_another_dtype(launched, monkeypatch):
    model = adapted("vit")
    monkeypatch.setattr(block, "product_dtype_of", lambda device, dtype: torch.float16)
    images = image(model)
    ours = gradients(model, images, "triton")
    assert launched.count("prepare_weights_kernel") == 1 + 3
    assert_close(ours, gradients(model, images, "reference"))


def test_checkpointing_recomputes_with_the_weights_of_its_own_forward(launched):
    model = adapted("vit")
    images = image(model)
    plain = gradients(model, images, "triton")
    model.set_grad_checkpointing()
    launched.clear()
    checkpointed = gradients(model, images, "triton")
    assert launched.count("prepare_weights_kernel") == 1
    for name, value in plain.items():
        assert torch.equal(checkpointed[name], value), name


def test_the_model_compiles_to_one_graph_that_prepares_its_weights_once():
    model = adapted("vit")
    images = image(model)
    expected = gradients(model, images, "triton")
    recorder = torch._dynamo.testing.EagerAndRecordGraphs()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=recorder)
    compiled.zero_grad()
    with mosa.backend("triton"):
        logits = compiled.train()(images, views=2, seed=7)
    logits.square().sum().backward()
    ours = {"logits": logits.detach()} | {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert_close(ours, expected, 1e-6)
    (graph,) = recorder.graphs
    assert str(graph.code).count("torch.ops.mosa_fast.prepare_weights.default") == 1


def test_evaluation_prepares_its_weights_again_only_when_they_change(launched):
    model = adapted("vit").eval()
    images = image(model)
    with torch.no_grad(), mosa.backend("triton"):
        first = model(images)
        assert launched.count("prepare_weights_kernel") == 3
        assert torch.equal(model(images), first)
        assert launched.count("prepare_weights_kernel") == 3
        model.blocks[1].adapter.norm.weight.mul_(1.5)
        second = model(images)
    assert launched.count("prepare_weights_kernel") == 4
    assert not torch.equal(second, first)
    with torch.no_grad(), mosa.backend("reference"):
        torch.testing.assert_close(second, model(images), rtol=1e-4, atol=1e-4)
