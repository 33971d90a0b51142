"""The script that makes the embedded backbone's weights, which travels in the repository only."""

import sys

import pytest
import torch
from safetensors.torch import load_file

from mosa_fast.assets import drawings, pretrain
from mosa_fast.backbones.embedded import IMAGE_SIZE, create_embedded


def seeded_batch(seed):
    torch.manual_seed(seed)
    return drawings.Drawings().batch(16, difficulty=1.0)


def test_the_seed_fixes_formulas_and_images():
    first, again, other = seeded_batch(0), seeded_batch(0), seeded_batch(1)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    images, _, clean = first
    assert images.shape == (16, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert clean.shape == (16, drawings.CLEAN_SIZE**2)


@pytest.mark.parametrize("family", drawings.CLASSES, ids=lambda family: family.__name__)
def test_drawings_of_a_class_resemble_one_another_more_than_those_of_other_classes(family):
    torch.manual_seed(0)
    formulas = family(40)
    places = drawings.pixel_grid(16).expand(40, -1, 2)
    pen = torch.full((40, 256), 0.1)
    first, second = (formulas.ink(torch.arange(40), places, pen, pen / 2) for _ in range(2))
    assert 0 <= first.min() < 0.1 < 0.3 < first.max() <= 1
    distance = torch.cdist(first, second)
    own = distance.diagonal()
    assert own.min() > 0  # never the same twice
    assert own.mean() < 0.7 * distance.mean()


def test_a_run_goes_on_from_its_state_and_writes_weights_that_the_embedded_backbone_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "set_fused_attn", lambda enable: None)  # it would outlast this test

    def run(folder, steps):
        arguments = ["--out", str(tmp_path / folder), "--steps", str(steps), "--last-steps", "1", "--batch", "4"]
        monkeypatch.setattr(sys, "argv", ["pretrain", *arguments])
        pretrain.main()
        return load_file(tmp_path / folder / "backbone.safetensors")

    at_once = run("at_once", 3)
    before = run("in_two", 1)
    in_two = run("in_two", 3)
    assert all(torch.equal(at_once[name], in_two[name]) for name in at_once)
    assert not torch.equal(before["pos_embed"], in_two["pos_embed"])
    model = create_embedded(10)
    missing, unexpected = model.load_state_dict(in_two, strict=False)
    assert missing == ["head.weight", "head.bias"]
    assert not unexpected
