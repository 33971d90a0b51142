"""Every recipe is parsed, and built as far as it goes without its data: model on the meta device."""

import itertools
import re
from dataclasses import replace
from functools import cache

import pytest
import torch

from mosa_fast.adapters.placements import PLACEMENTS
from mosa_fast.backbones.create import create_backbone
from mosa_fast.config import TrainConfig
from mosa_fast.data import load_data
from mosa_fast.data.fgvc import MULTITASK_CLASSES, SETS
from mosa_fast.data.gicd import TASKS as GICD
from mosa_fast.data.vtab import TASKS as VTAB
from mosa_fast.methods import METHODS
from mosa_fast.nn.mixture import adapters
from mosa_fast.recipes import find_recipe, load_grid, load_recipe, merge, packaged
from mosa_fast.sweeps.arguments import FOLDERS_OF_PARTS
from mosa_fast.train import parse
from mosa_fast.training.model import build_model, count_trained

ROOT = packaged()
RECIPES = sorted(str(p.relative_to(ROOT)) for p in ROOT.rglob("*.yaml") if p.parent.name not in FOLDERS_OF_PARTS)
BACKBONES = sorted(p.stem for p in (ROOT / "backbones").glob("*.yaml"))
CLASSES = {**{task: fgvc.classes for task, fgvc in SETS.items()}, "multitask": MULTITASK_CLASSES, **VTAB, **GICD}


@cache
def config_of(*names) -> TrainConfig:
    return parse([word for name in names for word in ("--config", name)])[0]


def build(config, classes):
    """The model without memory; without its weights, which nobody has here."""
    config.model.pretrained = False
    with torch.device("meta"):
        return build_model(config, classes)


def test_there_is_a_recipe_for_every_data_set_of_the_paper():
    expected = {f"fgvc/{task}" for task in (*SETS, "multitask")} | {f"vtab/{task}" for task in VTAB}
    expected |= {f"gicd/{task}" for task in GICD} | {
        f"{kind}/{task}" for kind in ("linear", "full", "swin") for task in SETS
    }
    expected |= {f"digits/{method}" for method in METHODS} | {"digits"}
    names = {name.removesuffix(".yaml") for name in RECIPES}
    assert {name for name in names if not name.startswith("evidence/")} == expected


@pytest.mark.parametrize("recipe", [name for name in RECIPES if not name.startswith(("digits", "evidence"))])
def test_every_recipe_parses_and_says_what_data_it_wants(recipe):
    config = config_of(str(ROOT / recipe))
    assert config.data.name == {"vtab": "vtab", "gicd": "gicd"}.get(recipe.split("/")[0], "fgvc")
    assert config.data.task == recipe.split("/")[1].removesuffix(".yaml")
    assert config.out == f"runs/{recipe.removesuffix('.yaml')}"
    assert (config.data.image_size, config.seed, config.optim.epochs, config.optim.warmup_epochs) == (
        224,
        3407,
        100,
        10,
    )
    assert config.model.head_init == "published"
    with pytest.raises(ValueError, match=r"data\.root is needed"):
        load_data(config.data, 224, config.seed)


@pytest.mark.parametrize("method", METHODS)
def test_methods_on_the_embedded_digits_differ_in_the_method_alone(method):
    config, default = config_of(f"digits/{method}"), config_of("digits")
    assert config == replace(default, method=method, out=f"runs/digits/{method}")
    assert list(load_grid(f"digits/{method}")) == ["optim.lr"]


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name.startswith("evidence")])
def test_methods_of_the_evidence_differ_in_what_is_trained_and_in_views_alone(recipe):
    config, first = config_of(str(ROOT / recipe)), config_of("evidence/dense")
    adapter = replace(first.adapter, **{n: getattr(config.adapter, n) for n in ("method", "experts", "share")})
    same = {"method": config.method, "adapter": adapter, "loss": replace(first.loss, views=config.loss.views)}
    assert config == replace(first, **same, out=f"runs/{recipe.removesuffix('.yaml')}")
    grid = load_grid(ROOT / recipe)
    assert list(grid) == ["optim.lr", "adapter.scale"][: 1 + METHODS[config.method].has_adapters]
    assert all(b == 2 * a for values in grid.values() for a, b in itertools.pairwise(values))


# docs/data.md, Training recipes: lr, bottleneck, experts, share, deep_reg, batch
PAPER = {
    "fgvc/cub": (1e-3, 64, 4, "down", False, 128),
    "fgvc/nabirds": (5e-4, 64, 4, "down", False, 128),
    "fgvc/dogs": (5e-4, 64, 4, "down", False, 128),
    "fgvc/flowers": (5e-3, 64, 4, "down", False, 128),
    "fgvc/cars": (5e-3, 64, 2, "up", True, 128),
    "fgvc/multitask": (5e-4, 64, 2, "none", False, 128),
    "gicd/cifar100": (5e-4, 64, 4, "down", False, 128),
    "gicd/food101": (5e-4, 64, 4, "down", False, 128),
    "gicd/aircraft": (5e-3, 64, 4, "down", False, 128),
    **{f"vtab/{task}": (5e-3, 16, 4, "down", False, 128) for task in VTAB},
}
PAPER |= {f"swin/{task}": PAPER[f"fgvc/{task}"] for task in SETS}


@pytest.mark.parametrize("name", PAPER)
def test_recipes_have_the_papers_settings(name):
    config = config_of(name)
    adapter, optim, loss, model = config.adapter, config.optim, config.loss, config.model
    setting = (optim.lr, adapter.bottleneck, adapter.experts, adapter.share, loss.deep_reg, optim.batch_size)
    assert setting == PAPER[name]
    assert (config.method, optim.optimizer, optim.weight_decay) == ("mosa", "adamw", 0.01)
    assert (adapter.scale, adapter.dropout, adapter.merge, adapter.seed) == ("auto", "auto", "mean", 3407)
    placement = PLACEMENTS[adapter.placement]
    assert (placement.scale, placement.dropout) == (0.1, 0.1)
    views = METHODS[config.method].views_of(loss.views)
    assert (views, loss.add_weight, loss.reg_weight) == (2, 0, 1)
    swin = name.startswith("swin")
    assert (model.backbone_dropout, model.drop_path) == ((0, 0.5) if swin else (0.1, 0))
    assert model.checkpoint_md5 == ("bf9cc1" if swin else "d9715d")
    assert config.data.mode == ("final" if name.startswith("vtab") or name == "gicd/aircraft" else "tune")


@pytest.mark.parametrize("task", SETS)
def test_probes_and_full_fine_tuning_have_their_settings(task):
    linear, full = config_of(f"linear/{task}"), config_of(f"full/{task}")
    rate = (0.1, 1e-2) if task in ("cub", "nabirds") else (1e-3, 1e-4)
    assert (linear.method, linear.optim.optimizer, linear.optim.batch_size) == ("linear", "sgd", 1024)
    assert (linear.optim.lr, linear.optim.weight_decay) == rate
    assert (full.method, full.optim.optimizer, full.optim.batch_size) == ("full", "adamw", 384)
    assert (full.optim.lr, full.optim.weight_decay) == (1e-4, 0.01)


@pytest.mark.parametrize("recipe", ["fgvc/cub", "fgvc/cars", "fgvc/multitask", "vtab/sun397", "gicd/food101"])
def test_models_of_the_recipes_have_the_papers_size(recipe):
    config = parse(["--config", recipe])[0]
    model = build(config, CLASSES[config.data.task])
    assert model.num_classes == CLASSES[config.data.task]
    counts = count_trained(model)
    # docs/method.md, Results to compare with: trained weights of the merged adapter, and the backbone's
    assert counts["trained_weights"] == {64: 1_208_064, 16: 322_752}[config.adapter.bottleneck]
    assert counts["head_weights"] == 769 * model.num_classes
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert frozen == 85_798_656


# Rows of configs/README.md, Other methods: (words after a recipe, trained weights with fgvc/cub)
OTHERS = [
    (words.split(), int(count.replace(",", "")))
    for words, count in re.findall(r"^\| [^|]+ \| `(--[^`]+)` \| ([\d,]+) \|$", (ROOT / "README.md").read_text(), re.M)
]


def test_there_is_a_way_to_every_method_from_every_recipe():
    described = [parse(["--config", "fgvc/cub", *words])[0] for words, _ in OTHERS]
    assert {config.method for config in described} == set(METHODS)
    assert {(config.method, config.adapter.method) for config in described} >= {("mosa", "lora"), ("mosa", "adapter")}


@pytest.mark.parametrize(("words", "count"), OTHERS, ids=lambda value: value[-1] if isinstance(value, list) else "")
def test_other_methods_after_a_recipe_build_and_train_what_the_table_says(words, count):
    """On fine-grained sets and on VTAB-1k; the scale of adapters elsewhere and of pairs is their own, not 0.1."""
    for recipe in ("fgvc/cub", "vtab/dtd"):
        config = parse(["--config", recipe, *words])[0]
        default = config_of(recipe)
        assert (config.data, config.loss, config.seed) == (default.data, default.loss, default.seed)
        assert (config.optim.epochs, config.optim.warmup_epochs) == (100, 10)
        if "--config" not in words:
            assert config.optim == default.optim
        model = build(config, CLASSES[config.data.task])
        counts = count_trained(model)
        assert counts["head_weights"] == 769 * model.num_classes
        if recipe == "fgvc/cub" or config.method not in ("mosa", "adapter", "random_mask"):
            assert counts["trained_weights"] == count
        if METHODS[config.method].has_adapters:
            elsewhere = config.adapter.placement != "adaptformer" or "lora" in words
            assert {adapter.scale for adapter in adapters(model)} == {1.0 if elsewhere else 0.1}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_second_recipe_changes_the_backbone_of_the_first(backbone):
    config = parse(["--config", "fgvc/cub", "--config", f"backbones/{backbone}"])[0]
    assert config.optim.lr == 1e-3
    model = build(config, 200)
    assert model.num_classes == 200
    if backbone.startswith("swin"):  # inside the MLPs, without norms, as wide as their stages
        widths = [
            width for width, depth in zip((128, 256, 512, 1024), (2, 2, 18, 2), strict=True) for _ in range(depth)
        ]
        assert count_trained(model)["trained_weights"] == sum(2 * width * 64 + width + 64 for width in widths)
    if not backbone.startswith("swin"):
        assert model.patch_embed.img_size == (224, 224)
        assert len(model.blocks) == {"l": 24, "h": 32}.get(backbone.split("_")[1][0], 12)
        assert (config.model.checkpoint is not None) == ("moco" in backbone)


def test_moco_without_its_file_is_not_silently_another_backbone():
    config = config_of("fgvc/cub", "backbones/vit_b16_moco_v3")
    with torch.device("meta"), pytest.raises(ValueError, match=r"no checkpoint file linear-vit-b-300ep\.pth\.tar"):
        create_backbone(config.model, 200, 224)


def test_recipes_are_found_by_path_by_name_and_where_nothing_is_checked_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("fgvc/cub", "fgvc/cub.yaml", "configs/fgvc/cub.yaml"):
        assert find_recipe(name) == ROOT / "fgvc" / "cub.yaml"
    (tmp_path / "configs" / "fgvc").mkdir(parents=True)
    (tmp_path / "configs" / "fgvc" / "cub.yaml").write_text("seed: 1\n")
    assert load_recipe("configs/fgvc/cub.yaml") == {"seed": 1}
    with pytest.raises(ValueError, match=re.escape("no recipe fgvc/owl: neither a file nor one of those in")):
        find_recipe("fgvc/owl")
    with pytest.raises(ValueError, match=re.escape("no recipe .: neither a file nor one of those in")):
        find_recipe(".")


def test_bases_are_merged_section_by_section_and_later_ones_win(tmp_path):
    (tmp_path / "a.yaml").write_text("optim: {lr: 1e-2, epochs: 3}\nseed: 1\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.yaml").write_text("base: ../a.yaml\noptim: {lr: 2e-2}\n")
    (tmp_path / "c.yaml").write_text("base: [a.yaml, sub/b.yaml]\noptim: {batch_size: 7}\nseed: 2\n")
    expected = {"optim": {"lr": 2e-2, "epochs": 3, "batch_size": 7}, "seed": 2}
    assert load_recipe(tmp_path / "c.yaml") == expected
    config = parse(["--config", str(tmp_path / "c.yaml"), "--optim.lr", "0.5"])[0]
    assert (config.optim.lr, config.optim.epochs, config.optim.batch_size, config.seed) == (0.5, 3, 7, 2)
    first, second = {"a": {"b": 1}}, {"a": {"c": 2}}
    assert merge(first, second) == {"a": {"b": 1, "c": 2}}
    assert first == {"a": {"b": 1}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: gone.yaml\n", r"recipe\.yaml: no base .*gone\.yaml"),
        ("base: recipe.yaml\n", r"include each other: .*recipe\.yaml -> .*recipe\.yaml"),
        ("base: 3\n", "base must be a file name or a list of them, got 3"),
        ("- 1\n", "must be a mapping of options, it is a list"),
        ("optim: [1\n", "is not YAML"),
    ],
)
def test_bad_recipes_are_named_on_one_line(tmp_path, text, message, command):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe(tmp_path / "recipe.yaml")
    assert "\n" not in str(caught.value)
    from mosa_fast.train import main

    code, _, error = command(main, "--config", tmp_path / "recipe.yaml")
    assert code == 2
    assert re.search(message, error)


def test_every_recipe_is_in_the_table():
    table = (ROOT / "README.md").read_text()
    for name in RECIPES:
        assert f"]({name}) | `python -m mosa_fast.train" in table, name
        assert name.startswith(("digits", "evidence")) or f"--config configs/{name} --data.root PATH" in table, name
