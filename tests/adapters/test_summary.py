import pytest
import timm
import torch
from tiny_models import TINY

import mosa_fast as mosa
from mosa_fast.adapters.adapter_file import trained_state


@pytest.mark.parametrize(
    ("config", "merged"),
    [
        ({"bottleneck": 64}, 1_208_064),
        ({"bottleneck": 16}, 322_752),
        ({"bottleneck": 64, "placement": "houlsby"}, 2_379_264),
        ({"bottleneck": 64, "experts": 1}, 1_208_064),
    ],
)
def test_counts_of_a_merged_vit_b16_are_the_papers(config, merged):
    with torch.device("meta"):
        model = mosa.adapt(timm.create_model("vit_base_patch16_224", num_classes=200), mosa.MoSAConfig(**config))
    counts = mosa.summary(model)
    assert counts["adapters"].merged == merged
    assert counts["backbone"].merged == 85_798_656
    assert counts["head"].trained == counts["head"].stored == counts["head"].merged == 768 * 200 + 200
    assert counts["backbone"].trained == counts["backbone"].stored == 0


@pytest.mark.parametrize("config", [{}, {"share": "none", "bias": "split", "scale": "trainable"}])
def test_counts_are_what_is_trained_and_what_is_saved(config):
    model = mosa.adapt(TINY["vit"](), mosa.MoSAConfig(bottleneck=4, experts=3, **config))
    counts = mosa.summary(model)
    assert counts["all"].trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counts["all"].stored == sum(tensor.numel() for tensor in trained_state(model).values())
    mosa.merge(model)
    assert mosa.summary(model)["all"].stored == counts["adapters"].merged + counts["head"].merged


def test_a_plain_model_has_a_head_and_a_backbone():
    model = TINY["vit"]()
    counts = mosa.summary(model)
    assert counts["all"].trained == counts["all"].merged == sum(p.numel() for p in model.parameters())
    assert [part.name for part in counts.parts] == ["head", "backbone"]


def test_it_prints_as_a_table():
    model = mosa.adapt(TINY["vit"](), mosa.MoSAConfig(bottleneck=4, experts=3))
    lines = str(mosa.summary(model)).splitlines()
    assert lines[0].split() == ["trained", "stored", "merged"]
    assert len({len(line) for line in lines[:-1]}) == 1
    assert lines[-2].split()[0] == "all"
    assert "%" in lines[-1]
