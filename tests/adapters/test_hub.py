import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from hub_server import FakeHub
from PIL import ExifTags, Image
from tiny_vit import make_tiny_vit

import mosa_fast as mosa
from mosa_fast.adapters.metadata import read_metadata
from mosa_fast.backbones.create import create_backbone
from mosa_fast.backbones.embedded import create_embedded
from mosa_fast.backbones.identity import arguments_of
from mosa_fast.config import ModelConfig
from mosa_fast.data.image_file import read_image
from mosa_fast.data.preprocessing import squashed
from mosa_fast.data.transforms import evaluation_transform

CLASSES = ["ant", "bee", "cat"]


def make_shared(**config):
    """Trained adapters, or as good as, in the embedded backbone."""
    model = mosa.adapt(create_embedded(3, pretrained=True), mosa.MoSAConfig(bottleneck=4, **config)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.classes, model.preprocessing = CLASSES, squashed(32)
    return model


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("config", [{}, {"method": "lora"}])
def test_a_shared_folder_is_the_model_again_on_a_backbone_that_is_made_for_it(tmp_path, images, config):
    model = make_shared(**config)
    model.save_pretrained(tmp_path / "new" / "folder")
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        *("README.md", "adapter.safetensors", "config.json")
    ]
    loaded = mosa.AdaptedModel.from_pretrained(tmp_path / "new" / "folder").eval()
    assert torch.equal(loaded(images), model(images))
    assert (loaded.classes, loaded.preprocessing) == (CLASSES, squashed(32))
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "new/folder/config.json").read_text()


def test_the_config_says_what_it_is_and_leaves_the_rest_to_the_adapter_file(tmp_path):
    make_shared().save_pretrained(tmp_path)
    facts = json.loads((tmp_path / "config.json").read_text())
    assert mosa.MoSAConfig.from_dict(facts.pop("config")) == mosa.MoSAConfig(bottleneck=4)
    assert facts == {"library_name": "mosa_fast", "library_version": mosa.__version__, "backbone": "embedded"}
    assert read_metadata(tmp_path / "adapter.safetensors").classes == CLASSES


def test_a_backbone_can_be_given_and_has_to_be_the_right_one(tmp_path):
    backbone = make_tiny_vit()
    mosa.adapt(make_tiny_vit()).save_pretrained(tmp_path)
    loaded = mosa.AdaptedModel.from_pretrained(tmp_path, backbone)
    assert loaded.backbone is backbone
    other = make_tiny_vit()
    other.norm.bias.data += 1
    with pytest.raises(ValueError, match=r"another backbone: .* other weights in norm\.bias"):
        mosa.AdaptedModel.from_pretrained(tmp_path, other)


def test_a_backbone_that_was_made_in_an_unknown_way_is_not_guessed(tmp_path):
    backbone = make_tiny_vit(img_size=16)  # not what timm would make of the name alone
    backbone.__dict__.pop("_model_args", None)  # timm 1.0.20 keeps none
    mosa.adapt(backbone).save_pretrained(tmp_path)
    assert read_metadata(tmp_path / "adapter.safetensors").backbone_arguments is None
    with pytest.raises(ValueError, match="does not say how its backbone is made: give the backbone"):
        mosa.AdaptedModel.from_pretrained(tmp_path)
    assert ", backbone=backbone)" in (tmp_path / "README.md").read_text()


def test_a_backbone_of_this_package_says_how_it_is_made(tmp_path):
    backbones = create_embedded(3, drop_path_rate=0.1), create_backbone(ModelConfig("test_vit", pretrained=False), 3)
    made = [arguments_of(backbone) for backbone in backbones]
    assert made[0] == {"drop_path_rate": 0.1}
    assert made[1] is not None


def test_what_cannot_be_loaded_is_one_clear_error(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no adapter file at .*adapter.safetensors"):
        mosa.AdaptedModel.from_pretrained(tmp_path)
    nameless = make_tiny_vit()
    del nameless.pretrained_cfg
    mosa.adapt(nameless).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not say how its backbone is made: give the backbone"):
        mosa.AdaptedModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is no folder, and the Hub does not give its adapter.safetensors: "):
        mosa.AdaptedModel.from_pretrained("not/a/name")
    with pytest.raises(ValueError, match="is not the folder of a finished run"):
        make_shared().save_pretrained(tmp_path, run=tmp_path)


def test_the_card_says_what_is_known_and_its_header_is_yaml(tmp_path):
    model = make_shared()
    model.classes = ["a|b", "c\nd", "e"]
    model.save_pretrained(tmp_path)
    _, header, text = (tmp_path / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "mosa_fast",
        "pipeline_tag": "image-classification",
        "tags": ["mosa", "adapter", "timm"],
    }
    assert "| adapters | placement adaptformer, bottleneck 4, 4 experts, share down |" in text
    assert "| 3 classes | a\\|b, c d, e |" in text
    assert "both sides resized, bilinear" in text
    assert f'mosa_fast.AdaptedModel.from_pretrained("{tmp_path}").eval()' in text
    assert "accuracy" not in text  # nobody said where it was trained
    mosa.adapt(make_tiny_vit()).save_pretrained(tmp_path)
    header = (tmp_path / "README.md").read_text().split("---\n")[1]
    assert yaml.safe_load(header)["base_model"] == "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"


def test_the_cards_example_reads_images_as_training_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo = Image.effect_noise((40, 30), 64)
    exif = photo.getexif()
    exif[ExifTags.Base.Orientation] = 6  # a phone that was held upright
    photo.save("image.jpg", exif=exif)
    make_shared().save_pretrained("shared")
    example = (tmp_path / "shared" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    scope = {}
    exec(example, scope)
    assert torch.equal(scope["image"], evaluation_transform(squashed(32))(read_image("image.jpg")))


ROUND_TRIP = """
import sys, torch
sys.path.insert(0, {tests!r})
import mosa_fast as mosa
from adapters.test_hub import make_shared
model = make_shared()
print(model.push_to_hub("birds", private=True, token="hf_secret"))
loaded = mosa.AdaptedModel.from_pretrained("me/birds", token="hf_secret").eval()
images = torch.randn(2, 3, 32, 32)
assert torch.equal(loaded(images), model(images))
try:
    mosa.AdaptedModel.from_pretrained("me/fish")
except ValueError as error:
    print(error)
"""


def test_a_model_goes_to_the_hub_and_comes_back(tmp_path):
    tests = os.path.dirname(os.path.dirname(__file__))
    with FakeHub() as hub:
        # In a process of its own: the client reads the address when it is imported.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, "-c", ROUND_TRIP.format(tests=tests)], capture_output=True, text=True, env=environment
        )
    assert done.returncode == 0, done.stderr
    address, missing = done.stdout.splitlines()
    assert address == f"{hub.address}/me/birds"
    assert "me/fish is no folder, and the Hub does not give its adapter.safetensors: " in missing
    assert hub.private == {"me/birds": True}
    assert {path for _, path in hub.files} == {"README.md", "adapter.safetensors", "config.json"}
    assert 'from_pretrained("me/birds")' in hub.files["me/birds", "README.md"].decode()
    uploads = [request for request in hub.requests if request[0] == "POST"]
    assert {token for *_, token in uploads if token} == {"Bearer hf_secret"}
    assert ("GET", "/me/birds/resolve/main/adapter.safetensors", "Bearer hf_secret") in [
        (method, path.replace("0" * 40, "main"), token) for method, path, token in hub.requests
    ]
