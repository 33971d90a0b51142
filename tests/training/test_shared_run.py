import pytest
import torch
from tiny_runs import tiny_run

import mosa_fast as mosa
from mosa_fast.backbones.embedded import create_embedded
from mosa_fast.config import ModelConfig
from mosa_fast.run_folder import RunFolder
from mosa_fast.training.loop import train


def test_a_runs_folder_loads_and_its_card_has_the_numbers_of_the_run(tmp_path):
    summary = train(tiny_run(tmp_path / "run", model=ModelConfig()), progress=False)
    model = mosa.AdaptedModel.from_pretrained(tmp_path / "run")
    assert model.classes == [str(digit) for digit in range(10)]
    model.save_pretrained(tmp_path / "shared", run=tmp_path / "run")
    card = (tmp_path / "shared" / "README.md").read_text()
    for line in (
        "| data | digits (2 images per class) |",
        f"| test accuracy | {summary['test_accuracy']:.2f} % |",
        f"| trained weights | {summary['trained_weights']:,} + head {summary['head_weights']:,} |",
        "| training | 3 epochs of adamw, learning rate 0.005, batch size 8, fp32 |",
    ):
        assert line in card, card


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("shared") / "run"
    train(tiny_run(out, model=ModelConfig(), test=False), progress=False)
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_in_another_precision_is_still_the_runs(run, tmp_path, dtype):
    mosa.AdaptedModel.from_pretrained(run).to(dtype).save_pretrained(tmp_path, run=run)
    assert "| training |" in (tmp_path / "README.md").read_text()


def test_a_model_that_is_computed_in_another_form_is_still_the_runs(run, tmp_path):
    model = mosa.adapt(create_embedded(10, pretrained=True), mosa.MoSAConfig(bottleneck=4, form="branch"))
    mosa.load_adapter(model, run / "adapter.safetensors").save_pretrained(tmp_path, run=run)
    assert "| training |" in (tmp_path / "README.md").read_text()


def test_numbers_of_a_run_that_trained_another_model_are_refused_and_nothing_is_written(run, tmp_path):
    changed = mosa.AdaptedModel.from_pretrained(run)
    changed.blocks[1].adapter.up.weight.data[0, 0] += 1
    with pytest.raises(
        ValueError, match=r"run did not train this model: they differ in blocks\.1\.adapter\.up\.weight$"
    ):
        changed.save_pretrained(tmp_path / "shared", run=run)
    other = mosa.adapt(create_embedded(10, pretrained=True), mosa.MoSAConfig(bottleneck=2))
    with pytest.raises(ValueError, match=r"differ in the configuration of the adapters and \d+ more"):
        other.save_pretrained(tmp_path / "shared", run=run)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "summary.json").write_text("{}")  # of a method without adapters
    with pytest.raises(ValueError, match=r"full did not train this model: it has no adapter\.safetensors"):
        other.save_pretrained(tmp_path / "shared", run=tmp_path / "full")
    assert not (tmp_path / "shared").exists()


def test_a_card_does_not_promise_weights_that_a_run_did_not_have(tmp_path):
    train(tiny_run(tmp_path / "run", model=ModelConfig(pretrained=False), test=False), progress=False)
    model = mosa.AdaptedModel.from_pretrained(tmp_path / "run", create_embedded_unpretrained())
    model.save_pretrained(tmp_path / "shared", run=tmp_path / "run")
    card = (tmp_path / "shared" / "README.md").read_text()
    assert "| backbone's weights | random weights (seed 3407) |" in card
    assert "from_pretrained(" in card
    assert ", backbone=backbone)" in card
    assert "base_model" not in card
    assert "test accuracy" not in card


def test_an_overwritten_runs_adapters_are_not_loaded_for_the_new_ones(tmp_path):
    train(tiny_run(tmp_path, model=ModelConfig(), test=False), progress=False)
    train(tiny_run(tmp_path, model=ModelConfig(), method="linear", test=False), progress=False, overwrite=True)
    with pytest.raises(FileNotFoundError, match="no adapter file at "):
        mosa.AdaptedModel.from_pretrained(tmp_path)


def test_the_folder_of_an_unfinished_run_is_not_loaded(tmp_path):
    train(tiny_run(tmp_path, model=ModelConfig(), test=False), progress=False)
    RunFolder(tmp_path).summary.unlink()
    with pytest.raises(ValueError, match="holds an unfinished run: go on with it"):
        mosa.AdaptedModel.from_pretrained(tmp_path)


def create_embedded_unpretrained():
    torch.manual_seed(3407)  # as build_model does
    return create_embedded(10)
