"""Without its adapters a model is the frozen backbone with the trained head."""

import copy

import pytest
import torch
from tiny_models import TINY, image
from torch.testing import assert_close

import mosa_fast as mosa
from mosa_fast.nn.mixture import adapters

FAMILIES = [*("vit", "deit_distilled", "hybrid", "eva02", "eva", "swin", "swin_v2"), *("beit", "hiera", "xcit")]
CONFIGS = {name: {"placement": name} for name in ("adaptformer", "pfeiffer", "houlsby")}
CONFIGS["lora"] = {"method": "lora", "targets": "qvo", "rank": 2}


def make(family="vit", **config):
    """An adapted model whose adapters and head have been trained, the plain model with that head, and images."""
    plain = TINY[family]()
    model = mosa.adapt(copy.deepcopy(plain), mosa.MoSAConfig(bottleneck=4, experts=3, scale=0.5, dropout=0.2, **config))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in adapters(model):
            layer.up.weight.copy_(torch.randn(layer.up.weight.shape, generator=generator))
    heads = (plain.get_classifier(), model.get_classifier())
    for own, trained in zip(*(h if isinstance(h, tuple) else (h,) for h in heads), strict=True):
        trained.weight.data.mul_(2)
        own.load_state_dict(trained.state_dict())
    return model, plain, image(plain)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_backbone_with_the_trained_head(family, config):
    model, plain, images = make(family, **config)
    adapted = model(images)
    with model.disable_adapters():
        assert_close(model(images), plain(images))
        assert_close(model.forward_features(images), plain.forward_features(images))
        assert_close(model.backbone(images), plain(images))
        experts = torch.zeros(sum(layer.draws for layer in adapters(model)), 2, 2, dtype=torch.int32)
        assert_close(model(images, experts=experts), plain(images).repeat(2, 1))
    assert torch.equal(model(images), adapted)
    assert (model(images) - plain(images)).abs().max() > 1e-3


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_training_the_head_learns_from_the_frozen_features_and_nothing_is_drawn(config, checkpointing):
    model, plain, images = make(**config)
    model.train().set_grad_checkpointing(checkpointing)
    model.patch_embed.proj.weight.requires_grad_(True)  # so that gradients run through all blocks
    state = torch.get_rng_state()
    with model.disable_adapters():
        logits = model(images, views=2, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert_close(logits, plain.train()(images).repeat(2, 1))
    logits.square().sum().backward()  # outside of the context: what is recomputed has to know
    plain(images).repeat(2, 1).square().sum().backward()
    assert_close(model.head.weight.grad, plain.head.weight.grad)
    assert_close(model.patch_embed.proj.weight.grad, plain.patch_embed.proj.weight.grad)
    assert all(p.grad is None for layer in adapters(model) for p in layer.parameters())
    assert model(images, views=2).shape == (2 * len(images), 10)  # routed again


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_contexts_nest_and_an_error_leaves_them(config):
    model, plain, images = make(**config)
    adapted = model(images)
    with model.disable_adapters():
        with pytest.raises(AssertionError, match="Input height"), model.disable_adapters():
            model(images[:, :, :5])
        assert_close(model(images), plain(images))
    assert torch.equal(model(images), adapted)


def test_blocks_under_torch_compile_are_disabled_too():
    model, plain, images = make()
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    adapted = model(images)
    with model.disable_adapters():
        assert_close(model(images), plain(images))
    assert_close(model(images), adapted)
    compiled = torch.compile(model, backend="eager")
    assert_close(compiled(images), adapted)
    with model.disable_adapters():
        assert_close(compiled(images), plain(images))
    assert_close(compiled(images), adapted)
