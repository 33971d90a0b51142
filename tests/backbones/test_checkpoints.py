"""Every published layout, made from a random timm model, gives that model's outputs again."""

import copy
import hashlib
import pickle

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn
from tiny_vit import make_tiny_vit

from mosa_fast.backbones.checkpoints import load_checkpoint
from mosa_fast.backbones.create import create_backbone, input_size
from mosa_fast.config import ModelConfig

SWIN = {"img_size": 32, "window_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "patch_size": 4}


def make_swin(num_classes=5, seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=num_classes, **SWIN | kwargs)


def randomised(model):
    """Every weight away from its initial value, so that one that is not loaded shows."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def to_npz(model, path, **extra):
    """The original ViT release's layout."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    width = model.embed_dim
    arrays = {
        "cls": state["cls_token"],
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
        "pre_logits/kernel": np.zeros((width, width), np.float32),
        "pre_logits/bias": np.zeros(width, np.float32),
    }
    for index, block in enumerate(model.blocks):
        own, heads = f"blocks.{index}", block.attn.num_heads
        prefix = f"Transformer/encoderblock_{index}"
        attention = f"{prefix}/MultiHeadDotProductAttention_1"
        for name, weight, bias in zip(
            ("query", "key", "value"),
            np.split(state[f"{own}.attn.qkv.weight"], 3),
            np.split(state[f"{own}.attn.qkv.bias"], 3),
            strict=True,
        ):
            arrays[f"{attention}/{name}/kernel"] = weight.T.reshape(width, heads, -1)
            arrays[f"{attention}/{name}/bias"] = bias.reshape(heads, -1)
        arrays[f"{attention}/out/kernel"] = state[f"{own}.attn.proj.weight"].T.reshape(heads, -1, width)
        arrays[f"{attention}/out/bias"] = state[f"{own}.attn.proj.bias"]
        for norm, theirs in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            arrays[f"{prefix}/{theirs}/scale"] = state[f"{own}.{norm}.weight"]
            arrays[f"{prefix}/{theirs}/bias"] = state[f"{own}.{norm}.bias"]
        for layer, theirs in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
            arrays[f"{prefix}/MlpBlock_3/{theirs}/kernel"] = state[f"{own}.mlp.{layer}.weight"].T
            arrays[f"{prefix}/MlpBlock_3/{theirs}/bias"] = state[f"{own}.mlp.{layer}.bias"]
    np.savez(path, **arrays | extra)


def original_swin(state):
    """timm's names back to the release's, with the buffers that it saves."""
    names = {"layers.1.downsample": "layers.0.downsample", "head.fc": "head"}
    content = {}
    for name, tensor in state.items():
        for own, theirs in names.items():
            name = name.replace(own, theirs)
        content[name] = tensor
    return {
        **content,
        "layers.0.blocks.1.attn_mask": torch.zeros(1),
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(1),
    }


def original_dinov2(state):
    """Register tokens, and position embeddings that cover the class token too."""
    content = {name: tensor for name, tensor in state.items() if name not in ("reg_token", "cls_token", "pos_embed")}
    shift = torch.full_like(state["cls_token"], 0.25)
    return content | {
        "mask_token": torch.zeros(1, 24),
        "register_tokens": state["reg_token"],
        "cls_token": state["cls_token"] - shift,
        "pos_embed": torch.cat([shift, state["pos_embed"]], 1),
    }


LAYOUTS = {
    "timm": lambda s: s,
    "deit": lambda s: {"model": s},
    "moco probe": lambda s: {
        "epoch": 90,
        "arch": "vit_base",
        "state_dict": {f"module.{name}": tensor for name, tensor in s.items()},
        "best_acc1": torch.tensor(76.7),
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]},
    },
    "moco": lambda s: {
        "state_dict": {f"module.base_encoder.{name}": tensor for name, tensor in s.items()}
        | {f"module.momentum_encoder.{name}": torch.zeros_like(tensor) for name, tensor in s.items()}
        | {"module.predictor.0.weight": torch.zeros(2, 2), "module.base_encoder.head.0.weight": torch.zeros(2, 2)}
    },
    "mae": lambda s: {
        "model": {**{n: t for n, t in s.items() if not n.startswith("head.")}, "mask_token": torch.zeros(1, 1, 8)}
        | {"decoder_embed.weight": torch.zeros(8, 24), "decoder_pos_embed": torch.zeros(1, 5, 8)}
    },
}


def assert_same(model, source, images):
    """Features to the bit, and, with the source's head, logits to the bit."""
    model, source = model.eval(), source.eval()
    assert torch.equal(model.forward_features(images), source.forward_features(images))
    model.reset_classifier(source.num_classes)
    model.get_classifier().load_state_dict(source.get_classifier().state_dict())
    assert torch.equal(model(images), source(images))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_torch_files_give_the_source_models_logits(tmp_path, images, layout):
    source = randomised(make_tiny_vit(7))
    path = tmp_path / "file.pth.tar"
    torch.save(LAYOUTS[layout](source.state_dict()), path)
    model = make_tiny_vit(5)
    head = copy.deepcopy(model.head.state_dict())
    load_checkpoint(model, path)
    assert all(torch.equal(model.head.state_dict()[name], head[name]) for name in head)  # the file's is dropped
    assert_same(model, source, images)


@pytest.mark.parametrize("classes", [5, 7])
def test_npz_files_give_the_source_models_logits(tmp_path, images, classes):
    source = randomised(make_tiny_vit(7))
    to_npz(source, tmp_path / "ViT-B_16.npz")
    model = make_tiny_vit(classes)
    head = model.head.weight.clone()
    load_checkpoint(model, tmp_path / "ViT-B_16.npz")
    assert torch.equal(model.head.weight, head)  # also where the file's has as many classes
    assert_same(model, source, images)


def test_swin_files_give_the_source_models_logits(tmp_path):
    source = randomised(make_swin(7))
    torch.save({"model": original_swin(source.state_dict())}, tmp_path / "swin.pth")
    model = make_swin(seed=1)
    load_checkpoint(model, tmp_path / "swin.pth")
    assert_same(model, source, torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("registers", [True, False])
def test_dinov2_files_give_the_source_models_logits(tmp_path, images, registers):
    vit = {"init_values": 1e-5} | ({"reg_tokens": 4, "no_embed_class": True} if registers else {})
    source = randomised(make_tiny_vit(7, **vit))
    state = source.state_dict()
    content = original_dinov2(state) if registers else {**state, "mask_token": torch.zeros(1, 24)}
    torch.save({name: t for name, t in content.items() if not name.startswith("head.")}, tmp_path / "dinov2.pth")
    model = make_tiny_vit(5, **vit)
    load_checkpoint(model, tmp_path / "dinov2.pth")
    # (cls - shift) + shift is cls but for a rounding
    features, expected = (m.eval().forward_features(images) for m in (model, source))
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5 if registers else 0)


def test_safetensors_files_give_the_source_models_logits(tmp_path, images):
    source = randomised(make_tiny_vit(7))
    save_file(source.state_dict(), tmp_path / "vit.safetensors")
    model = make_tiny_vit(5)
    load_checkpoint(model, tmp_path / "vit.safetensors")
    assert_same(model, source, images)


@pytest.mark.parametrize("layout", ["npz", "pth"])
def test_position_embeddings_are_resampled_to_the_image_size(tmp_path, layout):
    source = randomised(make_tiny_vit(7))
    path = tmp_path / f"file.{layout}"
    if layout == "npz":
        to_npz(source, path)
    else:
        torch.save(source.state_dict(), path)
    model = make_tiny_vit(5, img_size=16)
    load_checkpoint(model, path)
    assert torch.equal(model.pos_embed[:, :1], source.pos_embed[:, :1])  # the class token's is kept
    if layout == "pth":
        expected = checkpoint_filter_fn(source.state_dict(), model)["pos_embed"]
        assert torch.equal(model.pos_embed, expected)
    grid = model.pos_embed[0, 1:].reshape(4, 4, -1).mean((0, 1))
    torch.testing.assert_close(grid, source.pos_embed[0, 1:].mean(0), rtol=0, atol=2e-2)
    assert torch.isfinite(model.eval()(torch.randn(1, 3, 16, 16))).all()


def test_files_that_do_not_fit_are_refused_with_what_is_wrong_and_change_nothing(tmp_path):
    state = randomised(make_tiny_vit()).state_dict()
    model = make_tiny_vit()
    before = copy.deepcopy(model.state_dict())
    deeper = make_tiny_vit(depth=4).state_dict()
    wider = make_tiny_vit(embed_dim=48).state_dict()
    part = {name: tensor for name, tensor in state.items() if name != "norm.weight"}
    cases = [
        (part, r"does not fit this VisionTransformer: missing norm\.weight$"),
        ({**state, "neck.weight": torch.zeros(1)}, r": unexpected neck\.weight$"),
        (deeper, r"unexpected blocks\.3\.norm1\.weight; .*; and 4 more$"),
        (wider, r"cls_token is \[1, 1, 48\], the model's is \[1, 1, 24\]"),
        (make_swin().state_dict(), "missing cls_token"),
        ({"epoch": 3}, "holds no weights of a backbone"),
    ]
    for content, message in cases:
        torch.save(content, tmp_path / "file.pth")
        with pytest.raises(ValueError, match=message):
            load_checkpoint(model, tmp_path / "file.pth")
    to_npz(make_tiny_vit(embed_dim=48), tmp_path / "wide.npz")
    to_npz(make_tiny_vit(), tmp_path / "more.npz", **{"Transformer/encoderblock_3/LayerNorm_0/scale": np.zeros(24)})
    np.savez(tmp_path / "other.npz", weight=np.zeros(3))
    for name, message in (
        ("wide.npz", r"cls is \[1, 1, 48\], the model's is \[1, 1, 24\]"),
        ("more.npz", "unexpected Transformer/encoderblock_3/LayerNorm_0/scale$"),
        ("other.npz", "missing cls; .* and .* more$"),
    ):
        with pytest.raises(ValueError, match=message):
            load_checkpoint(model, tmp_path / name)
    with pytest.raises(ValueError, match="npz files hold a ViT, the model is a SwinTransformer"):
        load_checkpoint(make_swin(), tmp_path / "wide.npz")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class Harmful:
    def __reduce__(self):
        return print, ("this ran",)


def test_unreadable_and_harmful_files_are_one_line(tmp_path, capsys):
    (tmp_path / "harmful.pth").write_bytes(pickle.dumps({"model": Harmful()}, protocol=2))
    torch.save({"model": {}, "args": Harmful()}, tmp_path / "harmful2.pth")
    for name in ("cut.pth", "cut.npz", "cut.safetensors"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 not whole")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_bytes(b"hello")
    for name in ("harmful.pth", "harmful2.pth", "cut.pth", "cut.npz", "cut.safetensors", "empty.pth", "text.pth"):
        with pytest.raises(ValueError, match=name) as caught:
            load_checkpoint(make_tiny_vit(), tmp_path / name)
        assert "\n" not in str(caught.value)
    assert "it is no file that torch.save wrote" in str(caught.value)
    assert "this ran" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="no checkpoint file nowhere.pth"):
        load_checkpoint(make_tiny_vit(), "nowhere.pth")


def test_the_digest_is_checked_where_a_recipe_names_one(tmp_path):
    torch.save(make_tiny_vit().state_dict(), tmp_path / "vit.pth")
    digest = hashlib.md5((tmp_path / "vit.pth").read_bytes()).hexdigest()
    load_checkpoint(make_tiny_vit(), tmp_path / "vit.pth", digest[:6].upper())
    wrong = "0" * 6 if digest[:6] != "0" * 6 else "1" * 6
    with pytest.raises(ValueError, match=rf"has the MD5 digest {digest[:8]}\.\.\., the recipe asks for {wrong}"):
        load_checkpoint(make_tiny_vit(), tmp_path / "vit.pth", wrong)


def test_a_run_reads_its_checkpoint_and_nothing_else(tmp_path, monkeypatch):
    source = randomised(timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3))
    torch.save({"model": source.state_dict()}, tmp_path / "vit.pth")
    config = ModelConfig("vit_tiny_patch16_224.augreg_in21k", checkpoint=str(tmp_path / "vit.pth"))
    model = create_backbone(config, 4, 32)  # would download without the file
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(model.eval().forward_features(x), source.forward_features(x))
    config.pretrained = False
    assert not torch.equal(create_backbone(config, 4, 32).eval().forward_features(x), source.forward_features(x))

    def offline(*args, **kwargs):
        raise OSError("no network\nat all")

    monkeypatch.setattr("mosa_fast.backbones.create.timm.create_model", offline)
    config.pretrained, config.checkpoint = True, None
    with pytest.raises(ValueError, match=r"no pretrained weights of .* \(no network\): give a local file with --model"):
        create_backbone(config, 4, 32)


def test_swin_is_made_with_its_drop_path():
    config = ModelConfig(
        "swin_tiny_patch4_window7_224.ms_in22k", pretrained=False, drop_path=0.5, head_init="published"
    )
    with torch.device("meta"):
        model = create_backbone(config, 6, 224)
    assert model.head.fc.out_features == 6
    assert model.layers[-1].blocks[-1].drop_path1.drop_prob == 0.5
    assert input_size(config) == 224


def test_the_published_backbones_drop_on_embeddings_and_in_mlps_only():
    model = create_backbone(ModelConfig("vit_tiny_patch16_224", pretrained=False, backbone_dropout=0.1), 3, 32)
    block = model.blocks[0]
    rates = [model.pos_drop.p, block.mlp.drop1.p, block.mlp.drop2.p, block.attn.proj_drop.p, block.attn.attn_drop.p]
    assert rates == [0.1, 0.1, 0.1, 0.0, 0.0]
