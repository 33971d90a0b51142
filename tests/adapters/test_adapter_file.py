import json
import os
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_vit import make_tiny_vit

import mosa_fast as mosa
from mosa_fast.adapters.adapter_file import DIGEST, content_digest
from mosa_fast.adapters.metadata import FORMAT, read_metadata
from mosa_fast.backbones.embedded import create_embedded
from mosa_fast.data.preprocessing import cropped
from mosa_fast.training.precision import store_frozen


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


def rewrite(path, **texts):
    """Let a file have been written with other metadata; None: without them."""
    with safe_open(path, "pt") as handle:
        texts = {name: text for name, text in {**handle.metadata(), **texts}.items() if text is not None}
    tensors = load_file(path)
    if DIGEST in texts:
        texts[DIGEST] = content_digest(tensors, texts)
    save_file(tensors, path, texts)


@pytest.fixture
def saved(tmp_path):
    """A file of a trained model, with everything that it can know."""
    model = make_trained()
    model.classes = ["ant", "bee", "cat", "Möwe", "owl"]
    model.preprocessing = cropped(8)
    path = tmp_path / "a.safetensors"
    mosa.save_adapter(model, path)
    return path


def test_a_file_tells_what_it_is_for_without_its_tensors(saved):
    metadata = read_metadata(saved)
    assert metadata.config == mosa.MoSAConfig(bottleneck=8)
    assert metadata.backbone == "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    assert metadata.classes == ["ant", "bee", "cat", "Möwe", "owl"]
    assert metadata.preprocessing == cropped(8)
    assert metadata.versions["torch"] == torch.__version__
    assert metadata.versions["mosa_fast"] == mosa.__version__


def test_a_loaded_model_knows_its_classes_and_preprocessing_and_hands_them_on(saved, tmp_path):
    plain = make_tiny_vit()
    plain.reset_classifier(2)
    model = mosa.load_adapter(plain, saved)
    assert (model.classes, model.preprocessing) == (["ant", "bee", "cat", "Möwe", "owl"], cropped(8))
    mosa.save_adapter(model, tmp_path / "b.safetensors")
    assert read_metadata(tmp_path / "b.safetensors").to_dict() == read_metadata(saved).to_dict()


def test_another_backbone_of_the_same_shape_is_refused_by_name_and_stays_as_it_was(saved, images):
    other = make_tiny_vit().eval()
    other.blocks[1].mlp.fc1.weight.data.mul_(1.001)
    before = other(images)
    with pytest.raises(
        ValueError, match=r"another backbone: .*vit_tiny.* other weights in blocks\.1\.mlp\.fc1\.weight$"
    ):
        mosa.load_adapter(other, saved)
    assert torch.equal(other(images), before)
    embedded = mosa.adapt(create_embedded(5, pretrained=True), mosa.MoSAConfig(bottleneck=8))
    path = saved.with_name("embedded.safetensors")
    mosa.save_adapter(embedded, path)
    assert read_metadata(path).backbone == "embedded"
    with pytest.raises(ValueError, match="embedded, and this is embedded with other weights in .* and 73 more"):
        mosa.load_adapter(create_embedded(5), path)
    mosa.load_adapter(create_embedded(2, pretrained=True), path)


def test_precision_head_wrappers_and_image_size_of_the_backbone_do_not_matter(saved):
    half = make_tiny_vit()
    store_frozen(half.requires_grad_(False), "bf16-true")
    mosa.load_adapter(half, saved)
    compiled = make_tiny_vit()
    compiled.reset_classifier(3)
    compiled.blocks[0] = torch.compile(compiled.blocks[0])
    adapted = mosa.adapt(make_tiny_vit(), mosa.MoSAConfig(bottleneck=8))
    adapted.blocks[0] = torch.compile(adapted.blocks[0])
    mosa.load_adapter(torch.compile(adapted), saved)
    larger = make_tiny_vit(img_size=8)
    larger.set_input_size((16, 16))
    mosa.load_adapter(larger, saved)


def test_what_is_trained_besides_the_adapters_does_not_count_as_backbone(tmp_path, images):
    model = mosa.adapt(make_tiny_vit(), mosa.MoSAConfig(bottleneck=8)).eval()
    model.norm.weight.requires_grad_(True).data.mul_(2)
    mosa.save_adapter(model, tmp_path / "a.safetensors")
    assert torch.equal(mosa.load_adapter(make_tiny_vit(), tmp_path / "a.safetensors").eval()(images), model(images))


def test_other_classes_are_refused(saved):
    model = mosa.adapt(make_tiny_vit(), mosa.MoSAConfig(bottleneck=8))
    model.classes = ["a", "b", "c", "d", "e"]
    with pytest.raises(ValueError, match="is for ant, bee, cat and 2 more, but the model is for a, b, c and 2 more"):
        mosa.load_adapter(model, saved)
    rewrite(saved, classes='["ant", "bee"]')
    with pytest.raises(ValueError, match="is broken: it names ant, bee, its head has 5"):
        mosa.load_adapter(make_tiny_vit(), saved)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["ant", "bee"], "model.classes must have 5 names, one for each output, got 2"),
        ([0, 1, 2, 3, 4], "model.classes must be a list of names, by label, or None, got .0, 1, 2, 3, 4."),
        ("snail", "model.classes must be a list of names, by label, or None, got snail"),
    ],
)
def test_classes_that_no_file_could_be_loaded_with_are_not_written(tmp_path, classes, message):
    model = mosa.adapt(make_tiny_vit(), mosa.MoSAConfig(bottleneck=8))
    model.classes = classes
    with pytest.raises(ValueError, match=message):
        mosa.save_adapter(model, tmp_path / "a.safetensors")
    model.classes, model.preprocessing = None, {"image_size": 32}
    with pytest.raises(ValueError, match="model.preprocessing must be a Preprocessing or None, got {'image_size': 32}"):
        mosa.save_adapter(model, tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


def test_classes_may_be_a_tuple(tmp_path):
    model = mosa.adapt(make_tiny_vit(), mosa.MoSAConfig(bottleneck=8))
    model.classes = tuple("abcde")
    mosa.save_adapter(model, tmp_path / "a.safetensors")
    assert mosa.load_adapter(model, tmp_path / "a.safetensors").classes == list("abcde")


def test_files_of_the_first_version_still_load(saved, images):
    model = mosa.load_adapter(make_tiny_vit(), saved).eval()
    texts = ("backbone", "backbone_arguments", "fingerprint", "classes", "preprocessing", "versions", DIGEST)
    rewrite(saved, **dict.fromkeys(texts))
    with safe_open(saved, "pt") as handle:
        assert handle.metadata().keys() == {"format", "config"}
    old = mosa.load_adapter(make_tiny_vit(), saved).eval()
    assert torch.equal(old(images), model(images))
    assert (old.classes, old.preprocessing) == (None, None)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config", None),
        ("config", "{"),
        ("config", "[1]"),
        ("config", '{"bottleneck": "many"}'),
        ("config", '{"bottles": 1}'),
        ("backbone_arguments", "3"),
        ("fingerprint", "!"),
        ("classes", '{"a": 1}'),
        ("classes", "[1, 2]"),
        ("preprocessing", "null"),
        ("preprocessing", '{"image_size": 8}'),
        ("preprocessing", '{"image_size": "8", "resize": null}'),
        ("preprocessing", '{"image_size": 8, "resize": null, "mean": [0.5]}'),
        ("preprocessing", '{"image_size": 8, "resize": null, "interpolation": "magic"}'),
        ("versions", "[" * 100_000),
    ],
)
def test_broken_metadata_are_one_error_that_names_them(saved, name, text):
    rewrite(saved, **{name: text})
    for read in (read_metadata, lambda path: mosa.load_adapter(make_tiny_vit(), path)):
        with pytest.raises(ValueError, match=f"a.safetensors is broken: .*{name}") as error:
            read(saved)
        assert len(str(error.value)) < 300
        assert not isinstance(error.value, json.JSONDecodeError)


def test_a_file_has_the_permissions_of_other_new_files(tmp_path):
    before = os.umask(0o027)
    try:
        mosa.save_adapter(make_trained(), tmp_path / "a.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o640


def test_a_link_stays_one_and_its_target_is_written(tmp_path):
    (tmp_path / "there").mkdir()
    link = tmp_path / "a.safetensors"
    link.symlink_to("there/b.safetensors")  # not there yet
    mosa.save_adapter(make_trained(), link)
    assert link.is_symlink()
    assert read_metadata(tmp_path / "there" / "b.safetensors").config == read_metadata(link).config
    assert [path.name for path in tmp_path.rglob("*.tmp")] == []


def test_only_a_regular_file_is_written_over(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for path in (tmp_path / "folder", tmp_path / "pipe", tmp_path / "link", "/dev/null"):
        with pytest.raises(ValueError, match="is not a regular file, and is not written over"):
            mosa.save_adapter(make_trained(), path)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_what_was_trained_of_the_backbone_is_saved_again(tmp_path, images):
    model = mosa.adapt(make_tiny_vit(), mosa.MoSAConfig(bottleneck=2))
    model.norm.requires_grad_(True)
    with torch.no_grad():
        model.norm.weight += 1
    mosa.save_adapter(model, tmp_path / "a.safetensors")
    loaded = mosa.load_adapter(make_tiny_vit(), tmp_path / "a.safetensors")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in loaded.named_parameters() if parameter.requires_grad} == trained
    mosa.save_adapter(loaded, tmp_path / "b.safetensors")
    again = mosa.load_adapter(make_tiny_vit(), tmp_path / "b.safetensors").eval()
    assert torch.equal(again(images), model.eval()(images))
