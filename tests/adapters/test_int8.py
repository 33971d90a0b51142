"""Adapters on a frozen backbone whose weights torchao keeps in int8."""

import copy
import sys

import pytest
import torch
import torch._inductor.config
from tiny_models import TINY, image
from torch.nn.functional import cross_entropy

import mosa_fast as mosa
from mosa_fast.adapters.block import AdaptedBlock
from mosa_fast.adapters.int8 import quantise_backbone
from mosa_fast.backbones.embedded import create_embedded
from mosa_fast.backbones.fingerprint import is_quantised
from mosa_fast.config import DataConfig
from mosa_fast.data import load_data
from mosa_fast.nn.mixture import adapters

pytest.importorskip("torchao", reason="int8 needs a torchao for this torch", exc_type=ImportError)

CONFIGS = {name: {"placement": name} for name in ("adaptformer", "pfeiffer", "houlsby")}
CONFIGS["lora"] = {"method": "lora", "targets": "qkvo"}


def make(plain, **config):
    """An adapted copy whose adapters do something, in evaluation mode."""
    model = mosa.adapt(copy.deepcopy(plain), mosa.MoSAConfig(bottleneck=8, rank=4, **config)).eval()
    generator = torch.Generator().manual_seed(0)
    for layer in adapters(model):
        layer.up.weight.data.copy_(0.02 * torch.randn(layer.up.weight.shape, generator=generator))
    return model


def quantised(model):
    model = copy.deepcopy(model)
    quantise_backbone(model)
    return model


def difference(found, expected):
    """Relative RMS error."""
    return float((torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected)).detach())


def stored_bytes(parameter):
    """What a parameter takes in memory."""
    if not is_quantised(parameter):
        return parameter.nbytes
    names, _ = parameter.__tensor_flatten__()
    return sum(stored_bytes(getattr(parameter, name)) for name in names)


def backbone_bytes(model):
    return sum(stored_bytes(p) for p in model.backbone.parameters() if not p.requires_grad)


@pytest.fixture(scope="module")
def digits():
    images, labels = load_data(DataConfig(shots=2), 32, 3407).test.tensors
    return images[:24], labels[:24]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_adapters_train_and_evaluate_on_less_than_half_the_memory(digits, config):
    """Gradients are within 2 % of those on the backbone in float32."""
    images, labels = digits
    model = make(create_embedded(10, pretrained=True), **config)
    small = quantised(model)
    assert backbone_bytes(small) < 0.3 * backbone_bytes(model)
    assert not any(is_quantised(p) for p in small.parameters() if p.requires_grad)
    with torch.no_grad():
        assert difference(small(images), model(images)) < 0.02
    gradients = []
    for each in (small, model):
        logits = each.train()(images, views=2, seed=1)
        cross_entropy(logits, labels.repeat(2)).backward()
        trained = [p for p in each.parameters() if p.requires_grad]
        gradients.append(torch.cat([p.grad.flatten() for layer in adapters(each) for p in layer.parameters()]))
        assert all(p.grad is not None for p in trained)
    assert difference(*gradients) < 0.02


def test_training_lowers_the_loss(digits):
    images, labels = digits
    model = quantised(make(create_embedded(10, pretrained=True))).train()
    frozen = {name: p.dequantize() for name, p in model.named_parameters() if is_quantised(p)}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for step in range(12):
        loss = cross_entropy(model(images, views=2, seed=step), labels.repeat(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(p.dequantize(), frozen[n]) for n, p in model.named_parameters() if n in frozen)


# All classes of blocks; of those that read a fused qkv's weight themselves (BEiT, EVA, Swin v2), every one.
FAMILIES = [
    *("vit", "deit_distilled", "eva", "eva02", "eva02_small", "dinov3", "beit", "swin", "swin_v2", "swin_v2_cr"),
    *("relpos", "sam", "naflex", "cait", "hiera", "xcit"),
]


@pytest.mark.parametrize("config", [{}, {"method": "lora", "targets": "qv"}], ids=["adapter", "lora"])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name in TINY])
def test_every_family_computes_with_it_whether_adapted_before_or_after(family, config):
    plain = TINY[family]()
    model = make(plain, **config)
    small, images = quantised(model), image(plain)
    assert all(any(map(is_quantised, block.block.parameters())) for block in blocks_of(small))
    logits = small(images)
    assert 0 < difference(logits, model(images)) < 0.05

    def is_in_a_block(module, name):
        return isinstance(module, torch.nn.Linear) and any(name.startswith(f"{path}.") for path in paths)

    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    paths = [name for name, module in model.backbone.named_modules() if module in blocks_of(model)]
    before = copy.deepcopy(plain)
    quantize_(before, Int8WeightOnlyConfig(set_inductor_config=False), is_in_a_block)
    torch.testing.assert_close(make(before, **config)(images), logits)


def blocks_of(model):
    return [module for module in model.modules() if isinstance(module, AdaptedBlock)]


def test_adapter_files_go_from_one_to_the_other_and_other_weights_are_refused(tmp_path):
    plain = TINY["vit"]()
    model = make(plain)
    small = quantised(model)
    mosa.save_adapter(model, tmp_path / "full.safetensors")
    mosa.save_adapter(small, tmp_path / "small.safetensors")
    images = image(plain)
    onto_small = quantised(mosa.adapt(copy.deepcopy(plain), model.mosa_config)).eval()
    assert torch.equal(mosa.load_adapter(onto_small, tmp_path / "full.safetensors")(images), small(images))
    onto_full = mosa.load_adapter(copy.deepcopy(plain), tmp_path / "small.safetensors").eval()
    assert torch.equal(onto_full(images), model(images))
    other = TINY["vit"](seed=1)
    with pytest.raises(ValueError, match="another backbone"):
        mosa.load_adapter(copy.deepcopy(other), tmp_path / "small.safetensors")
    other = quantised(mosa.adapt(other, model.mosa_config))
    for name in ("full", "small"):
        with pytest.raises(ValueError, match="another backbone: .*blocks.0.attn.proj.weight"):
            mosa.load_adapter(other, tmp_path / f"{name}.safetensors")


def test_folding_says_why_not_and_merging_works():
    for config in ({}, {"method": "lora"}):
        model = quantised(make(TINY["vit"](), **config))
        with pytest.raises(ValueError, match=r"blocks\.0 cannot be folded exactly: its weights are quantised"):
            mosa.fold(model)
        images = image(model.backbone)
        expected = model(images)
        torch.testing.assert_close(mosa.merge(model)(images), expected)


def test_what_torch_is_set_to_does_not_change():
    before = torch.get_float32_matmul_precision(), torch._inductor.config.coordinate_descent_tuning
    quantised(make(TINY["vit"]()))
    assert (torch.get_float32_matmul_precision(), torch._inductor.config.coordinate_descent_tuning) == before


def test_mistakes_are_one_clear_error(monkeypatch):
    with pytest.raises(ValueError, match="has no adapters: call adapt"):
        quantise_backbone(TINY["vit"]())
    model = make(TINY["vit"]())
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match=r'pip install "mosa_fast\[int8\]"'):
        quantise_backbone(model)
