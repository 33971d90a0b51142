"""What is measured inside a mixture is what the words say."""

import json

import pytest
import torch
from tiny_vit import make_tiny_vit

from benchmarks import mixture
from benchmarks.mixture import Case, config_of, learning, markdown, merges
from benchmarks.mixture_probes import (
    balanced_draws,
    distances,
    gradient_noise,
    kl,
    l2,
    logits_of,
    parts_of_variance,
    scaled,
    weight_sizes,
)
from mosa_fast import MoSAConfig, adapt, merge
from mosa_fast.nn.mixture import adapters
from mosa_fast.training.loop import train


def trained_model(experts):
    """With up-projections that are not zero, so that experts differ."""
    model = adapt(make_tiny_vit(), MoSAConfig(bottleneck=4, experts=experts, scale=1.0))
    generator = torch.Generator().manual_seed(2)
    for layer in adapters(model):
        layer.up.weight.data.normal_(generator=generator)
    return model


def test_in_balanced_draws_every_expert_of_a_layer_comes_as_often():
    model = trained_model(4)
    draws = balanced_draws(model, 8, seed=0)
    assert draws.shape == (sum(1 for _ in adapters(model)), 8, 2)
    assert torch.equal(draws.long().sort(1).values[..., 1], torch.arange(8).expand(len(draws), 8) // 2)
    with pytest.raises(ValueError, match="6 draws cannot have each of 4 experts equally often"):
        balanced_draws(model, 6, seed=0)


def test_a_factor_of_the_number_of_experts_makes_a_sum_of_the_mean(images):
    model = trained_model(4)
    with scaled(model, 4.0):
        summed = logits_of(model, images)
    for layer in adapters(model):  # a dense adapter with all of the weights at once
        layer.up.owner = None
        layer.up.experts = 1
        layer.up.bias = torch.nn.Parameter(layer.up.bias.sum(0, keepdim=True))
    assert torch.allclose(logits_of(model, images), summed, atol=0.02)  # bfloat16
    assert all(layer.scale == 1.0 for layer in adapters(model))


def test_draws_are_the_experts_and_merged_is_merged(images):
    model = trained_model(2)
    draws = balanced_draws(model, 2, seed=0)
    expected = model.eval()(images, experts=draws[:, 1:])
    assert torch.allclose(logits_of(model, images, draws)[1], expected, atol=0.02)
    merged = logits_of(model, images)
    merge(model)
    assert torch.equal(logits_of(model, images), merged)


def test_distances_are_of_what_their_names_say(images):
    model = trained_model(2)
    draws = balanced_draws(model, 2, seed=0)
    merged, (first, second) = logits_of(model, images)[0], logits_of(model, images, draws)
    found = distances(model, images, draws)
    assert found["l2_sampled_merged"] == pytest.approx((l2(first, merged) + l2(second, merged)) / 2, rel=1e-4)
    assert found["kl_sampled_sampled"] == pytest.approx((kl(first, second) + kl(second, first)) / 2, rel=1e-4)
    assert found["l2_merged_frozen"] > 0
    assert kl(merged, merged + 3) == pytest.approx(0, abs=1e-6)
    assert l2(merged, merged + 3) == pytest.approx(0, abs=1e-5)
    assert l2(torch.tensor([[1.0, -1.0]]), torch.tensor([[-2.0, 2.0]])) == pytest.approx(18**0.5)
    for layer in adapters(model):
        layer.up.weight.data.zero_()
    assert {name: value for name, value in distances(model, images, draws).items() if value > 1e-6} == {}


def test_variances_are_those_that_the_gradients_were_made_with():
    generator = torch.Generator().manual_seed(0)
    minibatches, draws, weights = 200, 4, 50
    of_minibatch = torch.randn(minibatches, 1, weights, generator=generator) * 2
    of_draw = torch.randn(minibatches, draws, weights, generator=generator) * 3
    gradients = 5 + of_minibatch + of_draw
    found = parts_of_variance(gradients, torch.ones(draws, 1, dtype=torch.bool))
    assert {name: value / weights for name, value in found.items()} == {
        "signal": pytest.approx(25, rel=0.05),
        "batches": pytest.approx(4, rel=0.1),
        "draws": pytest.approx(9, rel=0.05),
    }
    # A weight that learns in half of the draws alone, and always in the same way then.
    counted = torch.rand(draws, weights, generator=generator).argsort(0) < 2
    found = parts_of_variance((5 + of_minibatch) * counted, counted)
    assert found["draws"] == pytest.approx(0, abs=1e-4)
    assert found["signal"] / weights == pytest.approx(25, rel=0.05)


def test_a_weight_has_a_gradient_in_its_own_draws_only(images):
    model = trained_model(2)
    labels = torch.arange(len(images)) % model.num_classes
    batches = [(images[:2], labels[:2]), (images[2:], labels[2:])]
    assert gradient_noise(model, batches, balanced_draws(model, 4, seed=0))["active"]["draws"] > 0
    for layer in adapters(model):  # all experts compute the same; but which weights learn, they differ in
        layer.up.weight.data.zero_()
    found = gradient_noise(model, batches, balanced_draws(model, 4, seed=0))
    assert found["active"]["draws"] < 1e-4 * found["active"]["batches"]
    # A gradient g in two of four draws, zero in the others: the variance is g^2 / 3.
    squares = found["active"]["signal"] + found["active"]["batches"]
    assert found["up"]["draws"] == pytest.approx(squares / 3, rel=0.01)
    dense = gradient_noise(trained_model(1), batches, torch.zeros(3, 1, 2, dtype=torch.int32))
    assert dense["up"]["draws"] == dense["down"]["draws"] == 0
    assert dense["up"] == dense["active"]


def test_sizes_of_weights():
    model = trained_model(4)
    weights = torch.cat([layer.up.weight.flatten() for layer in adapters(model)])
    sizes = weight_sizes(model)
    assert sizes["trained"] == pytest.approx(weights.square().mean().sqrt().item())
    merge(model)
    assert weight_sizes(model)["trained"] == pytest.approx(sizes["merged"])


@pytest.mark.parametrize("case", mixture.CASES)
def test_cases_are_the_evidences_methods(case):
    config = config_of(case, ["--optim.epochs=3", "--optim.warmup_epochs=0"])
    assert (config.method, config.adapter.experts) == ("adapter" if case.experts == 1 else "mosa", case.experts)
    assert (config.adapter.scale, config.seed, config.adapter.seed) == (case.scale, case.seed, case.seed)
    assert (config.data.name, config.data.shots, config.optim.epochs) == ("fashion_mnist", 20, 3)


@pytest.fixture
def short(tmp_path, monkeypatch):
    """Two cases on the digits, with few images."""
    monkeypatch.setattr(mixture, "CASES", (Case(1, 1.0, 1), Case(2, 4.0, 1)))
    for name, few in (("IMAGES", 20), ("DISTANCE_IMAGES", 4), ("MINIBATCHES", 2), ("NOISE_DRAWS", 4)):
        monkeypatch.setattr(mixture, name, few)
    monkeypatch.setattr(mixture, "FACTORS", (1.0, 2.0))
    words = ["--data.name=digits", "--data.root=null", "--data.shots=2", "--model.name=test_vit"]
    words += ["--model.pretrained=false", "--data.image_size=32", "--optim.epochs=20", "--optim.warmup_epochs=0"]
    return ["--out", tmp_path / "mixture.json", *words]


def test_the_command_makes_what_is_missing_and_a_table_and_a_plot(short, command, monkeypatch):
    path = short[1]
    code, out, error = command(mixture.main, *short)
    assert code == 0, error
    assert out.rstrip().endswith(f"{path.with_suffix('.md')}, {path.with_name('mixture_training.png')}")
    results = json.loads(path.read_text())
    assert [(row["experts"], row["scale"]) for row in results["runs"]] == [(1, 1.0), (2, 4.0)]
    assert [row["step"] for row in results["runs"][1]["distances"]] == [2, 5, 10, 20, 40]
    assert path.with_suffix(".md").read_text() == markdown(results)
    last = merges(results["runs"]).splitlines()[-1].split(" | ")
    accuracies = results["runs"][1]["merged"]
    assert [float(last[2]), float(last[4])] == [round(accuracies[factor], 1) for factor in ("1.0", "2.0")]
    assert [len(line.split("|")) for line in learning(results["runs"]).splitlines()] == [13] * 4

    def again(*_):
        raise AssertionError("it is there")

    monkeypatch.setattr(mixture, "run", again)
    assert command(mixture.main, *short)[0] == 0


def test_a_training_is_the_evidences_own(short, tmp_path, monkeypatch):
    """The numbers of mosa_fast.train, whatever is measured on the way."""
    monkeypatch.setattr(mixture, "IMAGES", 200)  # all
    config = config_of(Case(2, 4.0, 1), [str(word) for word in short[2:]])
    found = mixture.run(config)
    config.out, config.test = str(tmp_path / "run"), False
    assert train(config, progress=False)["val_accuracy"] == pytest.approx(found["merged"]["1.0"], abs=0.6)
