"""Which backbones a fingerprint takes for the same one."""

import pytest
import timm
import torch
from tiny_vit import make_tiny_vit

from mosa_fast.backbones.fingerprint import SAMPLES, Fingerprint


def weights(model):
    """The frozen backbone's."""
    return {name: p for name, p in model.named_parameters() if not name.startswith("head.")}


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    model = make_tiny_vit()
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))  # zeros are the same in every precision
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_copy_in_another_precision_is_the_same_backbone_both_ways(backbone, dtype):
    original, text = weights(backbone), Fingerprint.of(weights(backbone)).to_text()
    assert Fingerprint.from_text(text).differences(original) == []
    copy = {name: parameter.to(dtype) for name, parameter in original.items()}
    assert Fingerprint.from_text(text).differences(copy) == []
    assert Fingerprint.of(copy).differences(original) == []


@pytest.mark.parametrize(
    ("dtype", "step"),
    [(torch.float32, 1e-6), (torch.bfloat16, 1e-3), (torch.float16, 1e-4)],
)
def test_other_weights_are_another_backbone_in_every_precision(backbone, dtype, step):
    """Of the values around 0.02, a step of training in the learning rate's size is more than the precision hides."""
    fingerprint = Fingerprint.of({name: p.to(dtype) for name, p in weights(backbone).items()})
    moved = weights(backbone)
    name = "blocks.1.mlp.fc1.weight"
    moved[name] = moved[name] + step
    assert fingerprint.differences(moved) == [name]
    moved[name] = torch.full_like(moved[name], float("nan"))
    assert fingerprint.differences(moved) == [name]


def test_every_parameter_counts_but_position_embeddings(backbone):
    fingerprint = Fingerprint.of(weights(backbone))
    for name, parameter in weights(backbone).items():
        changed = weights(backbone) | {name: parameter + 1}
        assert fingerprint.differences(changed) == ([] if name == "pos_embed" else [name])


def test_more_or_fewer_parameters_are_another_backbone(backbone):
    fingerprint = Fingerprint.of(weights(backbone))
    fewer = weights(backbone)
    del fewer["norm.weight"]
    assert fingerprint.differences(fewer) == sorted(set(fewer) - {"pos_embed"})


def test_the_size_of_the_images_does_not_matter():
    model = timm.create_model("test_vit", img_size=32)
    fingerprint = Fingerprint.of(weights(model))
    model.set_input_size((64, 64))
    assert fingerprint.differences(weights(model)) == []


def test_a_text_that_is_no_fingerprint_is_refused(backbone):
    for text in ("?", "AAAA", Fingerprint.of(weights(backbone)).to_text()[4:]):
        with pytest.raises(ValueError, match="not a sample of weights"):
            Fingerprint.from_text(text)


def test_it_is_small_for_a_large_model():
    narrow = timm.create_model("vit_large_patch16_224", embed_dim=16, num_heads=1, num_classes=0)
    text = Fingerprint.of(weights(narrow)).to_text()  # as many parameters as the wide one has
    assert len(text) == 4 * -(-(len(weights(narrow)) - 1) * 2 * SAMPLES * 4 // 3)  # but for the position embedding
    assert len(text) < 15_000
