import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_vit import make_tiny_vit

import mosa_fast as mosa
from mosa_fast.adapters.adapter_file import FORMAT


def make_trained(**config):
    model = mosa.adapt(make_tiny_vit(), mosa.MoSAConfig(bottleneck=8, **config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    return model.eval()


@pytest.mark.parametrize(
    "config", [{}, {"share": "none", "bias": "split"}, {"share": "up", "merge": "joint", "scale": "trainable"}]
)
@pytest.mark.parametrize("head", [5, 3])
def test_round_trip_into_a_plain_model(tmp_path, images, config, head):
    model = make_trained(**config)
    mosa.save_adapter(model, tmp_path / "a.safetensors")
    plain = make_tiny_vit()
    plain.reset_classifier(head)
    loaded = mosa.load_adapter(plain, tmp_path / "a.safetensors").eval()
    assert loaded.mosa_config == model.mosa_config
    assert torch.equal(loaded(images), model(images))
    experts = torch.ones(3, 2, 2, dtype=torch.int32)
    assert torch.equal(loaded(images, experts=experts), model(images, experts=experts))  # owner maps and W0 travel


def test_round_trip_of_a_merged_model(tmp_path, images):
    model = mosa.merge(make_trained())
    mosa.save_adapter(model, tmp_path / "a.safetensors")
    loaded = mosa.load_adapter(make_tiny_vit(), tmp_path / "a.safetensors").eval()
    assert torch.equal(loaded(images), model(images))


def test_the_backbone_is_not_in_the_file(tmp_path):
    mosa.save_adapter(make_trained(), tmp_path / "a.safetensors")
    names = load_file(tmp_path / "a.safetensors")
    assert all(".adapter." in name or name.startswith("head.") for name in names)


def test_files_that_do_not_fit_are_refused_and_change_nothing(tmp_path, images):
    path = tmp_path / "a.safetensors"
    model = make_trained()
    mosa.save_adapter(model, path)
    with pytest.raises(ValueError, match="was saved with"):
        mosa.load_adapter(mosa.adapt(make_tiny_vit()), path)
    deeper = make_tiny_vit(num_classes=9, depth=4)
    before = deeper.eval()(images)
    with pytest.raises(ValueError, match=r"does not fit this model: .*missing blocks\.3\.adapter"):
        mosa.load_adapter(deeper, path)
    assert type(deeper.blocks[0]).__name__ == "Block"
    assert torch.equal(deeper(images), before)
    with pytest.raises(FileNotFoundError, match="no adapter file"):
        mosa.load_adapter(make_tiny_vit(), tmp_path / "b.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        mosa.load_adapter(make_tiny_vit(), path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=f"not an adapter file of this version.*{FORMAT}"):
        mosa.load_adapter(make_tiny_vit(), path)


def test_owner_ids_out_of_range_are_refused(tmp_path, images):
    model = make_trained()
    before = model(images)
    model.blocks[1].adapter.up.owner[0, 0] = 200
    mosa.save_adapter(model, tmp_path / "a.safetensors")
    other = make_trained()
    with pytest.raises(ValueError, match=r"blocks\.1\.adapter\.up\.owner names expert 200"):
        mosa.load_adapter(other, tmp_path / "a.safetensors")
    assert torch.equal(other(images), before)
