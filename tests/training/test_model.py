"""Which weights a method trains, and that the others stay as they are."""

import copy
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import load_file
from tiny_runs import tiny_run

from mosa_fast.adapters.adapter_file import timm_names, trained_state
from mosa_fast.adapters.fold import merge
from mosa_fast.backbones.frozen import set_training
from mosa_fast.config import DataConfig, ModelConfig, MoSAConfig, OptimConfig, TrainConfig
from mosa_fast.data import digits
from mosa_fast.evaluate import evaluate_run
from mosa_fast.methods import BLOCK, METHODS, Method
from mosa_fast.nn.mixture import adapters
from mosa_fast.run_folder import RunFolder
from mosa_fast.training.finished_run import open_run
from mosa_fast.training.loop import train
from mosa_fast.training.model import build_model, count_trained

BATCH_NORM = ModelConfig("vit_small_resnet26d_224", pretrained=False)


def trained_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_what_its_row_says(tmp_path, method):
    config = tiny_run(tmp_path, method=method)
    model = build_model(config, 10)
    timm_names_of = timm_names(model)
    names = {timm_names_of[name] for name in trained_names(model)}
    everything = {timm_names_of[name] for name, _ in model.named_parameters()}
    head = {"head.weight", "head.bias"}
    layers = {name for name in everything if ".adapter." in name or ".lora." in name}
    assert bool(layers) == (method in ("mosa", "adapter", "lora", "random_mask"))
    last = {name for name in everything if name.startswith((f"blocks.{len(model.blocks) - 1}.", "norm.", "fc_norm."))}
    expected = {
        "bias": {name for name in everything if name.endswith("bias")} | head,
        "partial": last | head,
        "linear": head,
        "full": everything,
        "scratch": everything,
    }
    assert names == expected.get(method, head | layers)


def test_biases_of_a_vit_b16_are_as_many_as_published(tmp_path):
    model = ModelConfig("vit_base_patch16_224", pretrained=False)
    with torch.device("meta"):
        built = build_model(tiny_run(tmp_path, method="bias", model=model, data=DataConfig(image_size=224)), 200)
    assert count_trained(built) == {"trained_weights": 102_912, "head_weights": 200 * 769}


@pytest.mark.parametrize(("name", "blocks"), [("swin_tiny_patch4_window7_224", 3), ("xcit_nano_12_p8_224", 2)])
def test_the_last_blocks_are_found_in_every_family(tmp_path, name, blocks):
    config = tiny_run(
        tmp_path, method="partial", model=ModelConfig(name, pretrained=False), data=DataConfig(image_size=224)
    )
    config.partial_blocks = blocks
    with torch.device("meta"):
        model = build_model(config, 10)
    found = {BLOCK.match(name)[0] for name in trained_names(model) if BLOCK.match(name)}
    swin = {"layers.3.blocks.1", "layers.3.blocks.0", "layers.2.blocks.5"}
    assert found == (swin if "swin" in config.model.name else {"blocks.11", "blocks.10"})
    assert "norm.weight" in trained_names(model)
    config.partial_blocks = 100
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match="partial_blocks must be at most 12, which the model has"),
    ):
        build_model(config, 10)


def test_partial_trains_the_norm_in_a_head_and_refuses_what_has_no_blocks(tmp_path):
    config = tiny_run(tmp_path, method="partial", model=ModelConfig("hiera_tiny_224", pretrained=False))
    config.data.image_size = 224
    with torch.device("meta"):
        assert "head.norm.weight" in trained_names(build_model(config, 10))
    config.model.name = "resnet10t"
    with pytest.raises(ValueError, match="method partial needs a model made of blocks, ResNet has none"):
        build_model(config, 10)


def test_a_full_run_on_batchnorm_reports_what_it_evaluates_to(tmp_path):
    optim = OptimConfig(lr=1e-2, epochs=3, warmup_epochs=0, batch_size=8)
    config = tiny_run(tmp_path, method="full", model=ModelConfig("resnet10t", pretrained=False), optim=optim)
    summary = train(config, progress=False)
    accuracy, _ = evaluate_run(open_run(RunFolder(tmp_path)), "test")
    assert accuracy == summary["test_accuracy"]


@pytest.mark.parametrize("share", ["down", "up", "none"])
def test_a_random_mask_is_one_expert_for_good(tmp_path, share):
    """Undivided, in training, evaluation, and merged: the weights of other experts never count."""
    config = tiny_run(tmp_path, method="random_mask", adapter=MoSAConfig(bottleneck=4, share=share, dropout=0.0))
    model = build_model(config, 10)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for adapter in adapters(model):
            for parameter in adapter.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    expert = torch.zeros(len(list(adapters(model))), 1, 2, dtype=torch.int32)
    expected = model.train()(images, experts=expert)
    assert torch.equal(model(images, seed=3), expected)
    torch.testing.assert_close(model.eval()(images), expected)
    merged = merge(copy.deepcopy(model))
    torch.testing.assert_close(merged(images), expected)
    for adapter, dense in zip(adapters(model), adapters(merged), strict=True):
        for own, other in ((adapter.down, dense.down), (adapter.up, dense.up)):
            if own.owner is not None:
                rest = other.weight[own.owner != 0]
                assert torch.equal(rest, torch.zeros_like(rest) if own.init is None else own.init[own.owner != 0])


def test_the_dense_adapter_has_one_expert_whatever_the_section_says(tmp_path):
    model = build_model(tiny_run(tmp_path, method="adapter", adapter=MoSAConfig(bottleneck=4, experts=8)), 10)
    assert {adapter.config.experts for adapter in adapters(model)} == {1}
    counts = count_trained(model)
    mixture = build_model(tiny_run(tmp_path, adapter=MoSAConfig(bottleneck=4, experts=8)), 10)
    assert count_trained(mixture) == counts  # a mixture merges into as many weights
    assert counts["trained_weights"] == sum(p.numel() for a in adapters(model) for p in a.parameters())


def test_the_dense_adapter_is_trained_with_one_view_and_read_again(tmp_path, monkeypatch):
    views = []
    from mosa_fast.training import step

    loss = step.mosa_loss
    monkeypatch.setattr(step, "mosa_loss", lambda *args: views.append(args[2].views) or loss(*args))
    summary = train(tiny_run(tmp_path, method="adapter"), progress=False)
    assert set(views) == {1}
    folder = RunFolder(tmp_path)
    run = open_run(folder)
    model = run.load_model()
    saved = load_file(folder.adapter)
    assert all(torch.equal(trained_state(model)[name], tensor) for name, tensor in saved.items())
    accuracy, images = evaluate_run(run, "test")
    assert (accuracy, images) == (summary["test_accuracy"], 800)


def test_a_method_costs_a_row(tmp_path, monkeypatch):
    """Every bias and the head, from here."""

    def biases(model, heads, blocks):
        yield from (p for name, p in model.named_parameters() if name.endswith("bias"))
        yield from (p for head in heads for p in head.parameters())

    monkeypatch.setitem(METHODS, "new", Method("new", "biases and the head", biases))
    config = tiny_run(tmp_path, test=False)
    config.method = "new"
    summary = train(config, progress=False)
    saved = load_file(RunFolder(tmp_path).model)
    assert {name for name in saved if not name.endswith("bias")} == {"head.weight"}
    assert summary["trained_weights"] > 0


def test_weights_that_timm_keeps_fixed_stay_fixed(tmp_path, monkeypatch):
    make = timm.create_model

    def with_fixed_positions(*args, **kwargs):
        model = make(*args, **kwargs)
        model.pos_embed.requires_grad_(False)
        return model

    monkeypatch.setattr("mosa_fast.backbones.create.timm.create_model", with_fixed_positions)
    assert "pos_embed" not in trained_names(build_model(tiny_run(tmp_path, method="full"), 10))


def test_frozen_batch_norm_stays_in_evaluation_mode_and_trained_batch_norm_does_not():
    model = timm.create_model("resnet10t", num_classes=2)
    set_training(model, True)
    assert model.bn1.training
    model.requires_grad_(False).fc.requires_grad_(True)
    set_training(model, True)
    assert model.training
    assert not any(m.training for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    set_training(model, False)
    assert not model.training


def test_a_linear_probe_leaves_the_backbones_statistics_alone_and_reports_what_it_evaluates_to(tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "TEST_PER_CLASS", 2)
    monkeypatch.setattr(digits, "VAL_PER_CLASS", 2)
    config = TrainConfig(
        data=DataConfig(shots=1, image_size=32),
        model=BATCH_NORM,
        method="linear",
        optim=OptimConfig(lr=1e-2, epochs=1, warmup_epochs=0, batch_size=10),
        out=str(tmp_path),
        tensorboard=False,
    )
    untrained = build_model(copy.deepcopy(config), 10)
    seen = {}

    def remember(model, folder, method):
        seen.update({name: buffer.clone() for name, buffer in model.named_buffers()})
        save(model, folder, method)

    from mosa_fast.training import loop

    save = loop.save_trained
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save_trained", remember)
        summary = train(config, progress=False)
    statistics = {name: buffer for name, buffer in untrained.named_buffers() if "running" in name}
    assert len(statistics) > 20
    assert all(torch.equal(seen[name], buffer) for name, buffer in statistics.items())
    accuracy, _ = evaluate_run(open_run(RunFolder(tmp_path)), "test")
    assert accuracy == summary["test_accuracy"]


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "resnet10t", "swin_tiny_patch4_window7_224"])
def test_any_timm_model_can_be_probed(name):
    data, model = DataConfig(image_size=64), ModelConfig(name, pretrained=False, head_init="published")
    with torch.device("meta"):
        probed = build_model(TrainConfig(data=data, model=model, method="linear"), 3)
    assert probed(torch.zeros(2, 3, 64, 64, device="meta")).shape == (2, 3)
    assert count_trained(probed)["trained_weights"] == 0
    assert len(trained_names(probed)) == 2


def test_what_a_model_of_timm_lacks_is_said_in_one_line():
    config = ModelConfig("resnet10t", pretrained=False, backbone_dropout=0.1)
    with pytest.raises(ValueError, match=r"model\.backbone_dropout must be 0 for resnet10t") as caught:
        build_model(TrainConfig(model=config, method="linear"), 3)
    assert "\n" not in str(caught.value)
    config = TrainConfig(model=replace(config, backbone_dropout=0.0), method="linear", grad_checkpointing=True)
    build_model(config, 3)
    config.model.name = "dla34"
    with pytest.raises(ValueError, match="grad_checkpointing: dla34 has no such thing"), torch.device("meta"):
        build_model(config, 3)
