import json

import torch

from benchmarks import probe
from mosa_fast.backbones.embedded import IMAGE_SIZE

ASSETS_README = probe.Path(probe.__file__).parents[1] / "mosa_fast" / "assets" / "README.md"


def test_the_digits_are_cut_into_a_pool_and_a_test_that_never_changes():
    digits, again = probe.load_digits(), probe.load_digits()
    assert digits.test_images.shape == (800, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert len(digits.labels) == 1797 - 800
    assert torch.equal(digits.test_images, again.test_images)
    assert digits.images.min() == -1
    assert digits.images.max() == 1


def test_a_probe_finds_the_classes_where_they_are_and_is_at_chance_where_they_are_not():
    torch.manual_seed(0)
    labels, noise = torch.arange(10).repeat(40), torch.randn(400, 16)
    centres = 3 * torch.randn(10, 16)
    features = centres[labels] + noise
    arguments = {"shots": 10, "seed": 0}
    assert probe.probe(features[:300], labels[:300], features[300:], labels[300:], **arguments) > 95
    assert probe.probe(noise[:300], labels[:300], noise[300:], labels[300:], **arguments) < 30


def test_what_is_measured_is_not_measured_again(monkeypatch):
    calls = []

    def method(weights, data, all_shots):
        calls.append(all_shots)
        return {shots: [90.0, 92.0] for shots in all_shots}

    monkeypatch.setitem(probe.METHODS, "linear probe", method)
    results = {"table": []}
    for _ in range(2):
        probe.measure("before", None, "linear probe", "digits", None, results)
    assert calls == [(20, 50)]
    rows = [(row["shots"], row["mean"], row["standard_error"]) for row in results["table"]]
    assert rows == [(20, 91, 1), (50, 91, 1)]


def test_the_table_beside_the_weights_is_that_of_the_results():
    results = json.loads(probe.RESULTS.read_text())
    assert probe.markdown(results["table"]) in ASSETS_README.read_text()
    digest = probe.hashlib.sha256((ASSETS_README.parent / "backbone.safetensors").read_bytes()).hexdigest()
    assert results["weights"]["after"]["sha256"] == digest
