"""Which weights a method trains, and that the others stay as they are."""

import copy
from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import load_file
from tiny_runs import tiny_run

from mosa_fast.adapters.adapter_file import timm_names, trained_state
from mosa_fast.adapters.model import adapters
from mosa_fast.backbones.frozen import set_training
from mosa_fast.config import DataConfig, ModelConfig, MoSAConfig, OptimConfig, TrainConfig
from mosa_fast.data import digits
from mosa_fast.evaluate import evaluate_run
from mosa_fast.methods import METHODS, Method
from mosa_fast.run_folder import RunFolder
from mosa_fast.training.finished_run import load_run_model
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
    layers = {name for name in everything if ".adapter." in name}
    assert bool(layers) == (method in ("mosa", "adapter"))
    assert names == {"linear": head, "full": everything, "scratch": everything}.get(method, head | layers)


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
    model = load_run_model(folder, tiny_run(tmp_path, method="adapter"), [str(i) for i in range(10)])
    saved = load_file(folder.adapter)
    assert all(torch.equal(trained_state(model)[name], tensor) for name, tensor in saved.items())
    accuracy, images = evaluate_run(folder, tiny_run(tmp_path, method="adapter"), [str(i) for i in range(10)], "test")
    assert (accuracy, images) == (summary["test_accuracy"], 800)


def test_a_method_costs_a_row(tmp_path, monkeypatch):
    """Every bias and the head, from here."""

    def biases(model, heads):
        yield from (p for name, p in model.named_parameters() if name.endswith("bias"))
        yield from (p for head in heads for p in head.parameters())

    monkeypatch.setitem(METHODS, "bias", Method("bias", "biases and the head", biases))
    config = tiny_run(tmp_path, test=False)
    config.method = "bias"
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
    accuracy, _ = evaluate_run(RunFolder(tmp_path), config, [str(i) for i in range(10)], "test")
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
