import copy
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file
from test_composition import FAMILIES, make
from tiny_models import TINY

import mosa_fast as mosa
from mosa_fast.adapters.block import AdaptedBlock
from mosa_fast.adapters.fold import why_not_folded
from mosa_fast.nn.mixture import adapters

NO = {  # families whose MLPs are not plain ones with the exact GELU after norm2
    "vit_tanh_gelu": "GELUTanh",
    "vit_quick_gelu": "QuickGELU",
    "vit_mlp_norm": "a norm inside",
    "vit_glu": "gated",
    "vit_rms_norm": "gated",
    "vit_post_norm": "after the MLP",
    "eva02": "gated",
    "eva02_small": "gated",
    "eva_post_norm": "after the MLP",
    "sapiens2": "gated",
    "swin_v2": "after the MLP",
    "swin_v2_cr": "after the MLP",
    "relpos_post_norm": "after the MLP",
    "naflex_map_pool": "GELUTanh",
}
EXACT = [name for name in FAMILIES if name not in (*NO, "hybrid")]  # whose small stem is no argument of timm's


def reason(model):
    return why_not_folded(next(module for module in model.modules() if isinstance(module, AdaptedBlock)))


@pytest.mark.parametrize("share", ["down", "none"])
@pytest.mark.parametrize("name", EXACT)
def test_a_folded_model_computes_the_same_without_adapters(name, share):
    model, images = make(name, share=share, scale="trainable" if share == "none" else 0.1)
    model, images = model.double().eval(), images.double()
    expected = model(images)
    plain = mosa.fold(model)
    assert not isinstance(plain, type(model))
    assert not any("mosa_fast" in type(module).__module__ for module in plain.modules())
    torch.testing.assert_close(plain(images), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(model(images), expected, rtol=0, atol=0)  # it is left as it is
    other = timm.create_model(plain.pretrained_cfg["architecture"], **plain.create_kwargs).double().eval()
    other.load_state_dict(plain.state_dict())
    torch.testing.assert_close(other(images), plain(images), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in NO if name in FAMILIES])
def test_what_is_not_exact_is_refused_with_the_reason(name):
    model, _ = make(name)
    with pytest.raises(ValueError, match=f"cannot be folded exactly: .*{NO[name]}.*; merge"):
        mosa.fold(model)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"placement": "pfeiffer"}, "a pfeiffer adapter does not read"),
        ({"placement": "houlsby"}, "a houlsby adapter does not read"),
        ({"activation": "relu"}, "the adapter's activation is relu"),
    ],
)
def test_other_placements_and_activations_are_refused(config, message):
    model, _ = make("vit", **config)
    with pytest.raises(ValueError, match=message):
        mosa.fold(model)


def test_wrapped_blocks_and_models_fold_and_all_is_trainable():
    model, images = make()
    expected = mosa.fold(model.eval())(images)
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    plain = mosa.fold(torch.compile(model, backend="eager"))
    torch.testing.assert_close(plain(images), expected)
    assert all(parameter.requires_grad for parameter in plain.parameters())


def test_a_merged_model_folds_to_the_same():
    model, images = make()
    plain = mosa.fold(model.eval())
    merged = mosa.fold(mosa.merge(copy.deepcopy(model)))
    torch.testing.assert_close(merged(images), plain(images))


def test_the_folded_weights_load_where_this_package_is_not(tmp_path):
    model, images = make()
    plain = mosa.fold(model.eval())
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    save_file({"images": images, "logits": model(images)}, tmp_path / "case.safetensors")
    code = f"""
import sys, timm, torch
from safetensors.torch import load_file
model = timm.create_model({plain.pretrained_cfg["architecture"]!r}, **{plain.create_kwargs!r}).eval()
model.load_state_dict(load_file({str(tmp_path / "plain.safetensors")!r}))
case = load_file({str(tmp_path / "case.safetensors")!r})
torch.testing.assert_close(model(case["images"]), case["logits"], rtol=1e-4, atol=1e-5)
assert "mosa_fast" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_a_model_that_timm_would_make_otherwise_is_refused():
    plain = TINY["vit"]()
    plain._model_args = {}
    model = mosa.adapt(plain, mosa.MoSAConfig(bottleneck=4))
    with pytest.raises(ValueError, match="give fold its create_kwargs"):
        mosa.fold(model)
    kwargs = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
    assert mosa.fold(model, kwargs).create_kwargs["depth"] == 3


def test_what_timm_did_not_keep_is_not_guessed():
    plain = TINY["vit"]()
    kept = plain._model_args
    del plain._model_args
    model = mosa.adapt(plain, mosa.MoSAConfig(bottleneck=4))
    with pytest.raises(ValueError, match="did not keep what it was made with .*: give fold its create_kwargs"):
        mosa.fold(model)
    assert mosa.fold(model, kept).create_kwargs["num_heads"] == 2


def test_merging_changes_no_logit_and_training_goes_on():
    model, images = make()
    expected = model.eval()(images)
    mosa.merge(model)
    torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-6)
    model.train()(images, views=2).sum().backward()
    assert all(adapter.up.weight.grad is not None for adapter in adapters(model))
