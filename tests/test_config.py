from dataclasses import asdict

import pytest

from mosa_fast.config import (
    DataConfig,
    LoaderConfig,
    LossConfig,
    ModelConfig,
    MoSAConfig,
    OptimConfig,
    TrainConfig,
)
from mosa_fast.methods import METHODS
from mosa_fast.options import facts_of
from mosa_fast.run_options import parse
from mosa_fast.training.checkpoint import changes


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
    with pytest.raises(ValueError, match="no field width"):
        MoSAConfig.from_dict({"width": 16})


def test_a_run_is_checked():
    with pytest.raises(ValueError, match=r"optim\.epochs must be at least 1, got 0"):
        TrainConfig(optim=OptimConfig(epochs=0))


NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (MoSAConfig, {"scale": NAN}, "scale must be a finite number, got nan"),
        (MoSAConfig, {"bottleneck": 4.0}, r"bottleneck must be a whole number, got 4\.0"),
        (MoSAConfig, {"experts": True}, "experts must be a whole number, got True"),
        (DataConfig, {"val_fraction": 0.0}, r"data\.val_fraction must be between 0 and 1, got 0\.0"),
        (DataConfig, {"fraction": 1.5}, r"data\.fraction must be above 0 and at most 1, got 1\.5"),
        (
            DataConfig,
            {"name": "imagenet"},
            r"data\.name must be one of digits, fashion_mnist, folder, fgvc, vtab, gicd, timm, got 'imagenet'",
        ),
        (DataConfig, {"workers": "4"}, r"data\.workers must be a whole number, got '4'"),
        (DataConfig, {"image_size": 0}, r"data\.image_size must be at least 1, got 0"),
        (ModelConfig, {"drop_path": 1.0}, r"model\.drop_path must be in \[0, 1\), got 1\.0"),
        (ModelConfig, {"pretrained": "false"}, r"model\.pretrained must be true or false, got 'false'"),
        (OptimConfig, {"lr": NAN}, r"optim\.lr must be a finite number, got nan"),
        (OptimConfig, {"lr": "1e-3"}, r"optim\.lr must be a number, got '1e-3'"),
        (OptimConfig, {"warmup_epochs": INFINITE}, r"optim\.warmup_epochs must be a finite number, got inf"),
        (LossConfig, {"views": True}, r"loss\.views must be one of 1, 2, got True"),
        (LossConfig, {"reg_weight": -1}, r"loss\.reg_weight must be at least 0, got -1"),
        (LoaderConfig, {"corrupt": "never"}, r"loader\.corrupt must be one of fatal, skip, got 'never'"),
        (
            TrainConfig,
            {"method": "lora3"},
            "method must be one of mosa, adapter, lora, random_mask, bias, partial, linear, full, scratch, got 'lora3'",
        ),
        (TrainConfig, {"patience": 0}, "patience must be at least 1, got 0"),
        (TrainConfig, {"out": None}, "out must be text, got None"),
        (TrainConfig, {"optim": {"lr": 1e-3}}, "optim must be of type OptimConfig"),
    ],
)
def test_every_section_checks_types_ranges_and_choices(section, values, message):
    with pytest.raises(ValueError, match=message) as caught:
        section(**values)
    assert "\n" not in str(caught.value)


def test_a_run_checks_sections_that_were_changed_since_they_were_made():
    optim = OptimConfig()
    optim.lr = NAN
    with pytest.raises(ValueError, match=r"optim\.lr must be a finite number"):
        TrainConfig(optim=optim)


def test_whole_numbers_are_numbers_and_none_is_a_value_where_the_type_says_so():
    config = TrainConfig(optim=OptimConfig(lr=1, warmup_epochs=0), data=DataConfig(shots=None), patience=None)
    assert config.optim.lr == 1
    assert MoSAConfig(scale=1, dropout=0).scale == 1


def test_a_half_precision_backbone_must_be_frozen():
    for method, row in METHODS.items():
        if row.freezes_backbone:
            TrainConfig(method=method, precision="bf16-true")
        else:
            with pytest.raises(ValueError, match=f"needs a frozen backbone; use bf16-mixed with method {method}"):
                TrainConfig(method=method, precision="bf16-true")


def test_facts_stand_in_the_help(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for option, words in (
        ("--optim.lr LR", "Peak learning rate. At least 0. (type: float"),
        ("--data.mode", "Only for vtab and gicd. (type: "),
        ("--data.augment", "Only for folder, fgvc, gicd and timm. (type: "),
        ("--data.shots SHOTS", "null: all of them."),
        ("--data.workers WORKERS", "At least 0. A resumed run may change it. (type: int"),
        (
            "--method",
            "adapter: dense adapters (one expert), and the head; lora: dense low-rank pairs, and",
        ),
        ("--adapter.dropout DROPOUT", "In [0, 1). (type: "),
    ):
        described = shown.split("options:")[1].split(f"{option} ")[1].split(" --")[0]
        assert words in described, described


def test_a_resumed_run_may_change_what_changes_no_result():
    free = {name for name, facts in facts_of(TrainConfig).items() if facts.free}
    assert {"out", "device", "data.root", "loader.cache", "compile", "log_every", "wandb"} <= free
    assert not free & {"seed", "precision", "method", "optim.batch_size", "data.shots", "adapter.experts"}
    then = TrainConfig(out="a", optim=OptimConfig(lr=1e-3))
    now = TrainConfig(out="b", optim=OptimConfig(lr=2e-3))
    assert changes(asdict(then), asdict(now)) == {"optim.lr": (1e-3, 2e-3)}
