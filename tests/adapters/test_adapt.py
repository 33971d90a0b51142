import copy

import pytest
import timm
import torch
from oracle import OracleModel
from tiny_vit import make_tiny_vit

import mosa_fast as mosa
from mosa_fast.adapters.block import routed
from mosa_fast.nn.mixture import adapters
from mosa_fast.routing import draw, step_seed
from mosa_fast.training.optim import make_optimizer

BLOCKS = [f"blocks.{index}" for index in range(3)]


def make_pair(trained=True, dtype=torch.float64, vit=None, **config):
    """An adapted model and the plain one it was made from."""
    plain = make_tiny_vit(**vit or {}).to(dtype)
    settings = {"bottleneck": 8, "experts": 4, "dropout": 0.0, "scale": 0.7}
    model = mosa.adapt(copy.deepcopy(plain), mosa.MoSAConfig(**settings | config))
    generator = torch.Generator().manual_seed(2)
    if trained:
        with torch.no_grad():
            for adapter in adapters(model):
                for parameter in adapter.parameters():
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(dtype))
    return model, plain


def test_a_fresh_adapter_changes_nothing(images):
    model, plain = make_pair(trained=False)
    expected = plain.eval()(images.double())
    assert torch.equal(model.eval()(images.double()), expected)
    assert torch.equal(model.train()(images.double(), views=2, seed=1), expected.repeat(2, 1))


@pytest.mark.parametrize("vit", [{}, {"class_token": False, "global_pool": "avg"}, {"init_values": 0.1}])
@pytest.mark.parametrize("share", ["down", "up", "none"])
def test_logits_and_gradients_equal_the_oracle(images, share, vit):
    model, plain = make_pair(share=share, scale="trainable", vit=vit)
    oracle = OracleModel(plain, BLOCKS, "adaptformer", adapters(model))
    experts = draw(step_seed(3, 0), 3, 2, 4).experts
    out, expected = model(images.double(), experts=experts), oracle(images.double(), experts)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    oracle.mask_gradients()
    for block, expected_adapter in zip(model.blocks, oracle.adapters, strict=True):
        adapter = block.adapter
        for own, other in ((adapter.down, expected_adapter.down), (adapter.up, expected_adapter.up)):
            for actual, wanted in zip((own.weight.grad, own.bias.grad), other.gradient(), strict=True):
                torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(adapter.norm.weight.grad, expected_adapter.norm.weight.grad, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(adapter.scale.grad, expected_adapter.scale.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.head.weight.grad, oracle.backbone.head.weight.grad, rtol=1e-10, atol=1e-10)


def test_fifty_optimizer_steps_equal_the_oracle(images):
    model, plain = make_pair(trained=False, share="down")
    oracle = OracleModel(plain, BLOCKS, "adaptformer", adapters(model))
    labels = torch.tensor([0, 1, 2, 3]).repeat(2)
    optimizers = [make_optimizer(m, lr=5e-3, weight_decay=0.1) for m in (model, oracle)]
    for step in range(50):
        experts = draw(step_seed(5, step), 3, 2, 4).experts
        for m, optimizer in zip((model, oracle), optimizers, strict=True):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(m(images.double(), experts=experts), labels).backward()
            if m is oracle:
                oracle.mask_gradients()
            optimizer.step()
    for block, expected in zip(model.blocks, oracle.adapters, strict=True):
        for own, other in ((block.adapter.down, expected.down), (block.adapter.up, expected.up)):
            assert own.weight.abs().max() > 0.05  # it has moved
            torch.testing.assert_close(own.weight, other.value(), rtol=0, atol=1e-10)
    merged = oracle.forward_merged(images.double())
    torch.testing.assert_close(model.eval()(images.double()), merged, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_forked_pass_equals_a_doubled_batch(images, dropout):
    """The same computation with the two views as a batch of 2 B that is never forked."""
    model, _ = make_pair(dropout=dropout)
    seed = step_seed(1, 1)
    routing = draw(seed, 3, 2, 4)
    forked = model(images.double(), views=2, seed=seed)
    with routed(list(model.blocks), routing):
        doubled = model.backbone(images.double().repeat(2, 1, 1, 1))
    torch.testing.assert_close(forked, doubled, rtol=1e-12, atol=1e-12)
    if dropout == 0:
        separate = [model(images.double(), experts=routing.experts[:, v : v + 1]) for v in (0, 1)]
        torch.testing.assert_close(forked, torch.cat(separate), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("vit", [{"pos_drop_rate": 0.5}, {"proj_drop_rate": 0.5}, {"patch_drop_rate": 0.5}])
def test_views_part_before_the_first_dropout_of_the_backbone(images, vit):
    model, _ = make_pair(vit=vit | {"depth": 1})  # of one block, so that no later dropout parts them
    same = torch.zeros(1, 2, 2, dtype=torch.int32)  # the same experts in both views
    first, second = model(images.double(), experts=same).chunk(2)
    assert not torch.allclose(first, second)
    model.eval()
    first, second = model(images.double(), experts=same).chunk(2)
    assert torch.equal(first, second)


def test_evaluation_uses_the_weights_of_this_moment(images):
    model, _ = make_pair()
    before = model.eval()(images.double())
    optimizer = make_optimizer(model, lr=0.1, weight_decay=0.0)
    model.train()(images.double(), views=2, seed=0).square().sum().backward()
    optimizer.step()
    after = model.eval()(images.double())
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, mosa.merge(copy.deepcopy(model))(images.double()))


def test_only_adapters_and_head_are_trained(images):
    model, _ = make_pair()
    model(images.double(), views=2).sum().backward()
    for name, parameter in model.named_parameters():
        trained = ".adapter." in name or name.startswith("backbone.head.")
        assert parameter.requires_grad == trained, name
        assert (parameter.grad is not None) == trained, name  # dense: no unused parameter under DDP


def test_gradient_checkpointing_recomputes_with_the_same_draws(images):
    model, _ = make_pair(dropout=0.3)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images.double(), views=2, seed=11).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_block_outputs_are_handed_out(images):
    model, _ = make_pair()
    outputs = []
    model(images.double(), views=2, block_outputs=outputs)
    assert [o.shape for o in outputs] == [(8, 5, 24)] * 3
    evaluated = []
    model.eval()(images.double(), block_outputs=evaluated)
    assert [o.shape for o in evaluated] == [(4, 5, 24)] * 3


def test_same_seed_same_bits(images):
    first, second = (make_pair(trained=False)[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = make_pair(trained=False, seed=1)[0]
    assert not torch.equal(other.blocks[0].adapter.up.owner, first["backbone.blocks.0.adapter.up.owner"])
    model, _ = make_pair(dropout=0.2)
    assert torch.equal(model(images.double(), views=2, seed=4), model(images.double(), views=2, seed=4))


def test_views_of_an_evaluated_model_are_alike(images):
    model, _ = make_pair()
    model.eval()
    assert torch.equal(model(images.double(), views=2), model(images.double()).repeat(2, 1))


def test_an_adapted_block_compiles_without_a_graph_break(images):
    model, _ = make_pair(dtype=torch.float32, dropout=0.2)
    routing = draw(step_seed(0, 0), 1, 2, 4)
    x = torch.randn(4, 5, 24)
    # Without code generation, which needs a C++ compiler: tracing is what a graph break would end.
    compiled = torch.compile(model.blocks[0], fullgraph=True, backend="aot_eager")
    results = []
    for block in (model.blocks[0], compiled):
        model.zero_grad()
        with routed(model.blocks[:1], routing, fork=True):
            out = block(x)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad.clone() for p in model.blocks[0].adapter.parameters())])
    for eager, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-5)


def test_other_models_are_refused():
    with pytest.raises(
        ValueError, match=r"adapt knows timm's VisionTransformer, .* Eva, .*, but the model is a ResNet"
    ):
        mosa.adapt(timm.create_model("resnet10t"))
    with pytest.raises(ValueError, match="but the model is a PoolingVisionTransformer"):  # of blocks that are known
        mosa.adapt(timm.create_model("pit_ti_224"))
    model, _ = make_pair()
    with pytest.raises(ValueError, match="has adapters already"):
        mosa.adapt(model)
    with pytest.raises(ValueError, match=r"blocks.0 is a ParallelScalingBlock, .* products and residual in common"):
        mosa.adapt(make_tiny_vit(block_fn=timm.models.vision_transformer.ParallelScalingBlock))
    with pytest.raises(ValueError, match="has no adapters"):
        mosa.merge(make_tiny_vit())
    with pytest.raises(ValueError, match="VisionTransformer has no adapters"):
        mosa.fold(make_tiny_vit())


def test_experts_of_the_wrong_shape_are_refused(images):
    model, _ = make_pair()
    with pytest.raises(ValueError, match=r"experts must be int32 \[3, V, 2\], got \[2, 2, 2\]"):
        model(images.double(), experts=torch.zeros(2, 2, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"experts must be int32 \[3, V, 2\], got list"):
        model(images.double(), experts=[1])
