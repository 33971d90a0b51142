import pytest

from mosa_fast.config import MoSAConfig, OptimConfig, TrainConfig


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"bottleneck": 0}, "bottleneck must be at least 1"),
        ({"experts": 256}, "experts must be 1 to 255"),
        ({"share": "left"}, "share must be one of"),
        ({"bias": "none"}, "bias must be one of"),
        ({"merge": "sum"}, "merge must be one of"),
        ({"placement": "nowhere"}, "placement must be one of"),
        ({"scale": "big"}, "scale must be one of auto, trainable"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
    ],
)
def test_values_out_of_range_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MoSAConfig(**kwargs)


def test_round_trip_through_a_dict():
    config = MoSAConfig(bottleneck=8, scale=0.5, share="none")
    assert MoSAConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="no field rank"):
        MoSAConfig.from_dict({"rank": 16})


def test_a_run_is_checked():
    with pytest.raises(ValueError, match=r"optim\.epochs must be at least 1, got 0"):
        TrainConfig(optim=OptimConfig(epochs=0))
