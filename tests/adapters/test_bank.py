import pytest
import torch
from tiny_models import TINY, image, make_tiny
from tiny_vit import make_tiny_vit

import mosa_fast as mosa
from mosa_fast.adapters.bank import AdapterBank

ADAPTER, LORA = {"bottleneck": 4}, {"method": "lora", "rank": 2, "targets": "qo"}
CASES = [
    (name, {**ADAPTER, "placement": placement}) for name in ("vit", "swin") for placement in ("pfeiffer", "houlsby")
]
CASES += [
    (name, config)
    for config, names in (
        (ADAPTER, "vit vit_post_norm deit_distilled beit swin swin_v2 relpos sam naflex cait hiera xcit hybrid"),
        (LORA, "vit eva eva02 swin_v2 sam sapiens2"),
    )
    for name in names.split()
    if name in TINY
]


def trained(model, classes=5, seed=0, **config):
    """An adapted model whose adapters and head are random."""
    model.reset_classifier(classes)
    model = mosa.adapt(model, mosa.MoSAConfig(**{"bottleneck": 8} | config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def trained_vit(classes=5, seed=0, **config):
    return trained(make_tiny_vit(), classes, seed, **config)


def assert_like_alone(bank, models, images, names, atol, **arguments):
    """Each sample's logits are those of its task's own model, and -inf past its classes."""
    logits = bank(images, tasks=names, **arguments)
    assert logits.shape == (len(names), max(models[name].num_classes for name in bank.tasks))
    for name in set(names):
        with torch.no_grad():
            alone = models[name](images, **arguments)
        own = [index for index, other in enumerate(names) if other == name]
        torch.testing.assert_close(logits[own, : alone.shape[1]], alone[own], rtol=0, atol=atol)
        assert (logits[own, alone.shape[1] :] == -torch.inf).all()


@pytest.mark.parametrize(("name", "config"), CASES, ids=str)
def test_every_sample_gets_what_its_task_gives_alone(name, config):
    models = {
        "a": trained(make_tiny(name), 5, 1, **config).double(),
        "b": trained(make_tiny(name), 3, 2, **config, share="none").double(),
    }
    plain = make_tiny(name).double()
    bank = mosa.AdapterBank(plain, models)
    assert_like_alone(bank, models, image(plain, 5).double(), ["b", "a", "b", "b", "a"], 1e-12)


@pytest.fixture
def models():
    """Tasks that differ in whatever may differ."""
    return {
        "cub": trained_vit(7, 1),
        "cars": trained_vit(3, 2, bottleneck=3, experts=2, share="none", bias="split"),
        "dogs": mosa.merge(trained_vit(4, 3, bottleneck=12, scale="trainable", share="up", merge="joint")),
        "fixed": trained_vit(4, 4, scale=0.7, routing="fixed"),
    }


NAMES = ["dogs", "cub", "fixed", "cars"]


def test_tasks_from_files(tmp_path, models, images):
    for name, model in models.items():
        mosa.save_adapter(model, tmp_path / f"{name}.safetensors")
    plain = make_tiny_vit()
    plain.reset_classifier(0)
    bank = mosa.AdapterBank(plain, {name: tmp_path / f"{name}.safetensors" for name in models})
    assert bank.tasks == ("cub", "cars", "dogs", "fixed")
    assert_like_alone(bank, models, images, NAMES, 1e-6)
    assert_like_alone(bank, models, images, ["cars"] * 4, 1e-6)
    assert torch.equal(bank(images, tasks="cars"), bank(images, tasks=["cars"] * 4))


def test_tasks_of_low_rank_pairs(images):
    models = {"a": trained_vit(5, 1, method="lora", rank=4), "b": trained_vit(2, 2, method="lora", rank=1, scale=0.3)}
    assert_like_alone(AdapterBank(make_tiny_vit(), models), models, images, ["a", "b", "b", "a"], 1e-6)


def test_tasks_come_and_go(models, images):
    bank = AdapterBank(make_tiny_vit())
    with pytest.raises(ValueError, match="no task 'cub'; it has none"):
        bank(images, tasks="cub")
    for name, model in models.items():
        bank.add(name, model)
    assert_like_alone(bank, models, images, NAMES, 1e-6)
    bank.remove("cub")  # the one with the most classes
    assert bank.tasks == ("cars", "dogs", "fixed")
    assert_like_alone(bank, models, images, ["dogs", "cars", "fixed", "cars"], 1e-6)
    bank.remove("dogs")  # the one with the largest bottleneck
    assert bank.blocks[0].adapter.down_weight.shape[:2] == (2, 8)
    bank.add("cub", models["cub"])
    assert_like_alone(bank, models, images, ["cub", "cars", "fixed", "cub"], 1e-6)
    for name in bank.tasks:
        bank.remove(name)
    bank.add("dogs", models["dogs"])
    assert_like_alone(bank, models, images, ["dogs"] * 4, 1e-6)


KINDS = [
    ("vit", ADAPTER),
    ("vit", {**ADAPTER, "placement": "houlsby"}),
    ("vit", LORA),
    ("beit", LORA),
    ("deit_distilled", ADAPTER),
    ("swin_v2", LORA),
]


def modules_of(model):
    return {path: (module, module.training) for path, module in model.named_modules()}


@pytest.mark.parametrize(("name", "config"), KINDS, ids=str)
def test_an_emptied_bank_has_the_model_as_it_was_and_takes_tasks_of_any_kind(name, config):
    plain = make_tiny(name).eval()
    modules, x = modules_of(plain), image(plain, 4)
    separate = [getattr(getattr(block, "attn", None), "qkv_bias_separate", None) for block in plain.modules()]
    with torch.no_grad():
        before = plain(x)
    bank = AdapterBank(plain, {"a": trained(make_tiny(name), 3, 1, **config)})
    bank.remove("a")
    assert modules_of(plain) == modules
    assert [getattr(getattr(block, "attn", None), "qkv_bias_separate", None) for block in plain.modules()] == separate
    assert torch.equal(plain(x), before)
    with pytest.raises(ValueError, match="no task 'a'; it has none"):
        bank(x, tasks="a")
    models = {"b": trained(make_tiny(name), 5, 2, **(LORA if config is ADAPTER else ADAPTER))}
    bank.add("b", models["b"])
    assert_like_alone(bank, models, x, ["b"] * 4, 4e-6)


def test_heads_of_an_emptied_bank_have_moved_with_it(images):
    plain = make_tiny_vit()
    bank = AdapterBank(plain, {"a": trained_vit()}).double()
    bank.remove("a")
    assert plain(images.double()).dtype == torch.float64


@pytest.mark.parametrize("config", [ADAPTER, LORA], ids=str)
def test_a_bank_that_fails_to_open_leaves_the_model_as_it_was(tmp_path, images, config):
    plain = make_tiny_vit().train()
    plain.blocks[0].requires_grad_(False)
    plain.norm.eval()
    modules = modules_of(plain)
    gradients = {name: parameter.requires_grad for name, parameter in plain.named_parameters()}
    models = {"a": trained_vit(**config)}
    with pytest.raises(FileNotFoundError):
        AdapterBank(plain, models | {"z": tmp_path / "missing.safetensors"})
    assert modules_of(plain) == modules
    assert {name: parameter.requires_grad for name, parameter in plain.named_parameters()} == gradients
    assert_like_alone(AdapterBank(plain, models), models, images, ["a"] * 4, 1e-6)


def test_models_that_are_added_stay_as_they_are_and_share_no_memory(models, images):
    with torch.no_grad():
        before = {name: model(images) for name, model in models.items()}
        bank = AdapterBank(make_tiny_vit(), models)
        logits = bank(images, tasks=NAMES)
        for name, model in models.items():
            assert torch.equal(model(images), before[name])
            for parameter in model.parameters():
                parameter.zero_()
    assert torch.equal(bank(images, tasks=NAMES), logits)


def test_arguments_that_carry_the_batch_go_with_their_images(images):
    models = {"a": trained_vit(5, 1), "b": trained_vit(3, 2)}
    bank = AdapterBank(make_tiny_vit(), models)
    mask = torch.rand(4, 1, 5, 5, generator=torch.Generator().manual_seed(0)) > 0.3
    mask |= torch.eye(5, dtype=torch.bool)
    assert_like_alone(bank, models, images, ["b", "a", "b", "a"], 1e-6, attn_mask=mask)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"placement": "houlsby"}, "task 'new' has houlsby adapters with silu, but those of the bank have adaptformer"),
        (
            {"activation": "relu"},
            "adaptformer adapters with relu, but those of the bank have adaptformer adapters with g",
        ),
        ({"method": "lora"}, "low-rank pairs on qv, but"),
    ],
)
def test_adapters_of_another_kind_are_refused(models, images, config, message):
    bank = AdapterBank(make_tiny_vit(), models)
    before = bank(images, tasks=NAMES)
    with pytest.raises(ValueError, match=message):
        bank.add("new", trained_vit(20, 5, **config))
    assert bank.tasks == tuple(models)
    assert torch.equal(bank(images, tasks=NAMES), before)


def test_low_rank_pairs_on_other_targets_are_refused():
    bank = AdapterBank(make_tiny_vit(), {"a": trained_vit(method="lora", targets="qv")})
    with pytest.raises(ValueError, match="low-rank pairs on o, but those of the bank have low-rank pairs on qv"):
        bank.add("b", trained_vit(method="lora", targets="o"))


def test_trained_weights_of_the_backbone_are_refused(tmp_path):
    model = trained_vit()
    model.blocks[1].norm1.requires_grad_(True)
    mosa.save_adapter(model, tmp_path / "a.safetensors")
    plain = make_tiny_vit()
    with pytest.raises(ValueError, match=r"trained weights of the backbone, .*: blocks\.1\.norm1\.bias and 1 more"):
        AdapterBank(plain, {"a": tmp_path / "a.safetensors"})
    assert type(plain.blocks[0]).__name__ == "Block"
    assert type(plain.head) is torch.nn.Linear


def test_another_backbone_is_refused(tmp_path, images):
    mosa.save_adapter(trained_vit(), tmp_path / "a.safetensors")
    other = make_tiny_vit()
    with torch.no_grad():
        other.blocks[1].attn.qkv.weight.add_(0.01)
    with pytest.raises(
        ValueError, match=r"a\.safetensors\) was trained on another backbone.*blocks\.1\.attn\.qkv\.weight"
    ):
        AdapterBank(other, {"a": tmp_path / "a.safetensors"})
    with pytest.raises(ValueError, match="task 'b' was trained on another backbone"):
        AdapterBank(make_tiny_vit(), {"a": trained_vit(), "b": trained(other)})


def test_a_task_knows_its_classes(tmp_path):
    model = trained_vit(2)
    model.classes = ["wren", "crow"]
    mosa.save_adapter(model, tmp_path / "a.safetensors")
    bank = AdapterBank(make_tiny_vit(), {"file": tmp_path / "a.safetensors", "model": model, "without": trained_vit(3)})
    assert bank.classes("file") == bank.classes("model") == ["wren", "crow"]
    assert bank.classes("without") is None
    assert bank.preprocessing("file") is None
    with pytest.raises(ValueError, match="no task 'cat'"):
        bank.classes("cat")


def test_attention_pooling_that_is_trained_is_refused():
    with pytest.raises(ValueError, match="attention pooling is trained with its task"):
        AdapterBank(make_tiny_vit(global_pool="map", class_token=False))


def test_heads_that_are_no_linear_are_refused():
    model = trained_vit()
    plain = make_tiny_vit()
    for owner in (model.backbone, plain):
        owner.head = torch.nn.Sequential(torch.nn.Linear(32, 5), torch.nn.Linear(5, 5))
    with pytest.raises(ValueError, match="a bank holds linear heads, but head is Sequential"):
        AdapterBank(plain, {"a": model})


def test_mistakes_are_one_clear_line(models, images, tmp_path):
    bank = AdapterBank(make_tiny_vit(), models)
    for call, message in [
        (lambda: bank(images, tasks=["cub", "cat", "cub", "cub"]), "no task 'cat'; it has cub, cars, dogs, fixed"),
        (lambda: bank(images, tasks=["cub"]), "each of the 4 images, got 1 names"),
        (lambda: bank.remove("cat"), "no task 'cat'"),
        (lambda: bank.add("cub", models["cub"]), "a task 'cub' already"),
        (
            lambda: bank.add("plain", make_tiny_vit()),
            "task 'plain' must be an adapter file or an adapted model, got a V",
        ),
        (lambda: bank.add("deep", trained(make_tiny_vit(depth=4))), "task 'deep' does not fit .*unexpected blocks.3"),
        (lambda: AdapterBank(trained_vit(), {}), "the model has adapters already"),
        (lambda: AdapterBank(torch.nn.Linear(2, 2)), "adapt knows timm's"),
        (bank.train, "only evaluates"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(FileNotFoundError, match="no adapter file"):
        bank.add("file", tmp_path / "nowhere.safetensors")
    assert bank.tasks == tuple(models)


def test_other_ways_through_the_model_are_refused_and_a_pass_that_fails_leaves_nothing(models, images):
    bank = AdapterBank(make_tiny_vit(), models)
    with pytest.raises(RuntimeError, match="call the bank itself"):
        bank.forward_features(images)
    with pytest.raises(RuntimeError):
        bank(images[:, :2], tasks="cub")
    with pytest.raises(RuntimeError, match="call the bank itself"):
        bank.forward_features(images)


def test_there_are_no_gradients_and_nothing_is_trained(models, images):
    bank = AdapterBank(make_tiny_vit(), models)
    assert not bank(images.requires_grad_(), tasks="cub").requires_grad
    assert not any(parameter.requires_grad for parameter in bank.parameters())
    assert not bank.eval().training


def test_half_precision_and_autocast(models, images):
    bank = AdapterBank(make_tiny_vit(), models)
    exact = bank(images, tasks=NAMES)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = bank(images, tasks=NAMES)
    finite = exact.isfinite()
    assert torch.equal(mixed.isfinite(), finite)
    assert 0 < (mixed.float() - exact)[finite].abs().max() < 0.1
