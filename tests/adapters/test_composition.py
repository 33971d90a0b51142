"""What composition must not break, on a small model of every family."""

import copy
import io
import pickle
from inspect import signature

import pytest
import timm
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from timm.layers import DropPath
from timm.optim import param_groups_layer_decay
from tiny_models import TINY, image
from tiny_vit import make_tiny_vit
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import mosa_fast as mosa
from mosa_fast.adapters.adapter_file import load_trained_state, timm_names, trained_state
from mosa_fast.adapters.seams import find_blocks
from mosa_fast.backbones.frozen import draws_random_numbers
from mosa_fast.nn.mixture import adapters
from mosa_fast.routing import step_seed
from mosa_fast.training.precision import autocast, input_dtype, store_frozen


def adaptable(name):
    try:
        return bool(list(find_blocks(TINY[name]())))
    except ValueError:
        return False


# One of every class of blocks, for what is slow; and one with a second head, one with a stem of convolutions.
SOME = ["vit", "deit_distilled", "hybrid", "eva02", "rope_mixed", "swin", "swin_v2", "hiera", "xcit"]
FAMILIES = [name for name in TINY if adaptable(name)]
TAKES_MASKS = [name for name in FAMILIES if "attn_mask" in signature(TINY[name]().forward).parameters]
TAKES_MASKS = [name for name in TAKES_MASKS if not name.startswith("naflex")]  # it makes one of its valid patches


def make_quiet(name, model=None):
    """A plain model that draws no random numbers: Swin drops paths by itself, others move positions."""
    model = model or TINY[name]()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "rescale_coords"):
            module.rescale_coords, module.aug_active = None, False
        if isinstance(module, DropPath):
            module.drop_prob = 0.0
    assert not draws_random_numbers(model.train())
    return model.eval()


def make(name="vit", **config):
    """An adapted model of a family, in training mode, whose adapters do something; and images for it."""
    plain = make_quiet(name)
    images = image(plain, 3)
    settings = {"bottleneck": 4, "experts": 3, "share": "none", "dropout": 0.2, "scale": 0.5}
    model = mosa.adapt(plain, mosa.MoSAConfig(**settings | config)).train()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for adapter in adapters(model):
            for parameter in adapter.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model, images


def tokens_of(model, images):
    return model.eval().forward_features(images).shape[1]


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_taken_apart_compute_what_timm_computes(name):
    plain = make_quiet(name)
    images = image(plain)
    expected = plain(images)
    model = mosa.adapt(copy.deepcopy(plain), mosa.MoSAConfig(bottleneck=4))
    torch.testing.assert_close(model.eval()(images), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.train()(images, views=2, seed=1), expected.repeat(2, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_forked_pass_equals_passes_of_each_view(name):
    model, images = make(name, dropout=0.0)
    layers = len(list(adapters(model)))
    experts = torch.randint(-1, 3, (layers, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    forked = model(images, experts=experts)
    separate = [model(images, experts=experts[:, view : view + 1]) for view in (0, 1)]
    torch.testing.assert_close(forked, torch.cat(separate), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(*separate)


@pytest.mark.parametrize("name", FAMILIES)
def test_low_rank_pairs_reach_every_target(name):
    """Also where timm would multiply with the weight of qkv by itself; the views part at the input."""
    model, images = make(name, method="lora", rank=2, targets="qkvo")
    expected = model(images, views=2, seed=1)
    changed = [model.eval()(images)]
    for lora in adapters(model):
        widths = [stop - start for start, stop in lora.columns]
        for part in lora.up.weight.data.split(widths):
            before = part.clone()
            part.zero_()
            changed.append(model(images))
            part.copy_(before)
    if name != "xcit":  # attention over channels: normalised q and k are as wide as a head, k's shift may cancel
        assert all(not torch.equal(logits, changed[0]) for logits in changed[1:])
    model.train().set_grad_checkpointing(True)
    torch.testing.assert_close(model(images, views=2, seed=1), expected, rtol=1e-5, atol=1e-5)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images, views=2, seed=1), model(images, views=2, seed=1))


def test_checkpointed_low_rank_pairs_have_the_gradients_of_plain_ones(tmp_path):
    model, images = make(method="lora", rank=2, targets="qkvo")
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        first, second = (model(images, views=2, seed=seed) for seed in (1, 2))
        (first.square().sum() + second.square().sum()).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(plain, recomputed) for plain, recomputed in zip(*gradients, strict=True))
    mosa.save_adapter(model, tmp_path / "a.safetensors")
    assert "blocks.0.attn.qkv.lora.up.weight" in load_file(tmp_path / "a.safetensors")
    loaded = mosa.load_adapter(TINY["vit"](), tmp_path / "a.safetensors").train()
    assert torch.equal(loaded(images, views=2, seed=1), model(images, views=2, seed=1))


def test_a_linear_with_low_rank_pairs_hands_out_no_weight():
    model, _ = make(method="lora")
    qkv = model.blocks[0].attn.qkv
    assert qkv.in_features == 24
    for name in ("weight", "bias"):
        with pytest.raises(AttributeError, match=f"LoRALinear has no {name} to multiply with"):
            getattr(qkv, name)
    with pytest.raises(RuntimeError, match="was not told which experts"):
        qkv(torch.randn(2, 5, 24))


def compiled_to_one_graph(model, images):
    """The model compiled, after steps with changing routes, which one graph has served."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for step in range(3):
        seed = step_seed(1, step)
        torch.testing.assert_close(
            compiled(images, views=2, seed=seed), model(images, views=2, seed=seed), rtol=1e-4, atol=1e-5
        )
    assert counter.frame_count == 1
    return compiled


def test_low_rank_pairs_compile_to_one_graph():
    compiled_to_one_graph(*make(method="lora", rank=2))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_can_be_copied_pickled_and_saved_whole(name):
    model, images = make(name)
    expected = model(images, views=2, seed=1)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    restored = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), restored):
        assert torch.equal(other(images, views=2, seed=1), expected)
        assert other.mosa_config == model.mosa_config


@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_file_brings_its_head(name, tmp_path):
    model, images = make(name)
    mosa.save_adapter(model, tmp_path / "a.safetensors")
    plain = TINY[name]()
    plain.reset_classifier(3)
    plain = make_quiet(name, plain)
    loaded = mosa.load_adapter(plain, tmp_path / "a.safetensors").train()
    assert torch.equal(loaded(images, views=2, seed=1), model(images, views=2, seed=1))


@pytest.mark.parametrize("name", FAMILIES)
def test_timms_other_ways_through_the_model_work(name):
    model, images = make(name)
    for _ in range(2):  # in training, where they draw experts, and in evaluation
        features = model.forward_features(images)
        last, between = model.forward_intermediates(images, indices=2)
        assert len(between) == 2
        assert last.shape == features.shape
        logits = model.forward_head(features)
        assert logits.shape == model(images).shape
        model.eval()
    torch.testing.assert_close(logits, model(images))
    if hasattr(model, "get_intermediate_layers"):
        assert len(model.get_intermediate_layers(images, n=2)) == 2


@pytest.mark.parametrize("name", TAKES_MASKS)
def test_attention_masks_reach_the_blocks_and_part_with_the_views(name):
    model, images = make(name, dropout=0.0)
    count = model.patch_embed.num_patches + getattr(model, "num_prefix_tokens", 0)
    mask = torch.ones(count, count, dtype=torch.bool).tril()
    seed = torch.tensor([1])
    unmasked = model(images, views=2, seed=seed)
    masked = model(images, views=2, seed=seed, attn_mask=mask)
    assert not torch.allclose(unmasked, masked)
    each = torch.stack([mask, mask | True, mask])[:, None]  # one for every image
    parted = model(images, views=2, seed=seed, attn_mask=each)
    for view in (0, 3):
        torch.testing.assert_close(parted[view], masked[view], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(parted[view + 1], unmasked[view + 1], rtol=1e-5, atol=1e-5)
    model.eval()
    assert not torch.allclose(model.forward_features(images, mask), model.forward_features(images))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_head_and_the_input_size_can_change_and_the_backbone_stays_frozen(name):
    model, images = make(name)
    model.reset_classifier(3)
    assert model(images, views=2).shape == (6, 3)
    assert model.num_classes == 3
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    try:
        TINY[name]().set_input_size(img_size=(32, 32))
    except AttributeError:
        pass  # this timm cannot do it for this model
    else:
        model.set_input_size(img_size=(32, 32))
        assert model(torch.randn(2, 3, 32, 32), views=2).shape == (4, 3)
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == frozen


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointing_two_forwards_before_one_backward_equals_two_plain_ones(name):
    model, images = make(name)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        first, second = (model(images, views=2, seed=seed) for seed in (1, 2))
        (first.square().sum() + second.square().sum()).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for key, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][key]), key


@pytest.mark.parametrize("name", SOME)
def test_one_graph_serves_changing_routes_in_training_and_one_evaluation(name):
    model, images = make(name)
    compiled = compiled_to_one_graph(model, images)
    model.eval()
    torch.testing.assert_close(compiled(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SOME)
def test_an_evaluated_model_can_be_exported(name):
    model, images = make(name)
    exported = torch.export.export(model.eval(), (images,)).module()
    torch.testing.assert_close(exported(images), model(images), rtol=1e-4, atol=1e-5)


def test_distributed_data_parallel_trains_it(tmp_path):
    model, images = make()
    expected = copy.deepcopy(model)
    expected(images, views=2, seed=1).square().sum().backward()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # the second finds every parameter used in the first
            model.zero_grad()
            parallel(images, views=2, seed=1).square().sum().backward()
    finally:
        dist.destroy_process_group()
    for own, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert (own.grad is None) == (other.grad is None)
        if own.grad is not None:
            torch.testing.assert_close(own.grad, other.grad)


@pytest.mark.parametrize("wrap", [lambda block: torch.compile(block, backend="eager"), checkpoint_wrapper])
def test_adapters_of_wrapped_blocks_are_found(wrap, tmp_path):
    model, images = make(dropout=0.0)
    expected = model(images, views=2, seed=1)
    merged = mosa.merge(copy.deepcopy(model)).eval()(images)
    plain_names = set(trained_state(model))
    model.blocks[0] = wrap(model.blocks[0])
    torch.testing.assert_close(model(images, views=2, seed=1), expected, rtol=1e-5, atol=1e-5)
    mosa.save_adapter(model, tmp_path / "a.safetensors")
    names = load_file(tmp_path / "a.safetensors").keys()
    assert "blocks.0.adapter.up.owner" in names
    assert set(names) == plain_names
    loaded = mosa.load_adapter(TINY["vit"](), tmp_path / "a.safetensors")
    torch.testing.assert_close(loaded.train()(images, views=2, seed=1), expected, rtol=1e-5, atol=1e-5)
    mosa.load_adapter(model, tmp_path / "a.safetensors")  # into the wrapped one, too
    mosa.merge(model)
    assert all(adapter.up.owner is None for adapter in adapters(model))
    torch.testing.assert_close(model.eval()(images), merged, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrap", [lambda model: torch.compile(model, backend="eager"), torch.nn.DataParallel])
def test_adapters_of_a_wrapped_model_are_saved_whole(wrap, tmp_path):
    model, images = make()
    expected = model(images, views=2, seed=1)
    mosa.save_adapter(wrap(model), tmp_path / "a.safetensors")
    assert set(load_file(tmp_path / "a.safetensors")) == set(trained_state(model))
    loaded = mosa.load_adapter(TINY["vit"](), tmp_path / "a.safetensors").train()
    assert torch.equal(loaded(images, views=2, seed=1), expected)
    mosa.load_adapter(wrap(loaded), tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["hybrid", "xcit"])
def test_trained_batchnorm_is_saved_with_its_statistics(name):
    model, other = TINY[name](), TINY[name](seed=1)
    assert not torch.equal(model(image(model)), other(image(model)))
    load_trained_state(other, trained_state(model), "the model")  # all of it is trained
    assert torch.equal(model(image(model)), other(image(model)))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_trains_and_evaluates_every_family(name, precision):
    try:
        plain = TINY[name]().bfloat16()
        plain(image(plain).bfloat16())
    except RuntimeError as error:
        pytest.skip(f"this timm's own forward does not work in bfloat16: {error}")
    model, images = make(name, dropout=0.0)
    expected = model.eval()(images)
    store_frozen(model, precision)
    images = images.to(input_dtype(precision))
    with autocast(precision, images.device):
        logits = model(images)
        model.train()(images, views=2).float().square().sum().backward()
    assert (logits - expected).abs().max() < 0.3 * expected.abs().max()
    for parameter in model.parameters():
        assert not parameter.requires_grad or parameter.dtype == parameter.grad.dtype == torch.float32


def test_todays_files_load():
    file = "tests/adapters/data/format_1.safetensors"
    model = mosa.load_adapter(make_tiny_vit(), file)
    config = mosa.MoSAConfig(bottleneck=4, experts=3, share="none", bias="split", scale="trainable", seed=1)
    assert model.mosa_config == config
    state, saved = trained_state(model), load_file(file)
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[name], saved[name]) for name in saved)


def test_layers_hold_the_configuration_they_were_made_with():
    model, _ = make(seed=1)
    assert {adapter.config for adapter in adapters(model)} == {model.mosa_config}
    assert model.mosa_config.seed == 1
    mosa.merge(model)
    assert {adapter.config.experts for adapter in adapters(model)} == {model.mosa_config.experts} == {1}


def test_names_of_the_timm_model_are_read_and_set_through_the_adapted_one():
    model, images = make()
    assert model.head is model.backbone.head
    head = torch.nn.Linear(24, 7)
    model.head = head
    assert model.backbone.head is head
    assert model(images, views=2).shape == (6, 7)
    assert model.blocks[0].attn is model.blocks[0].block.attn
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = model.nothing
    assert not hasattr(model, "nothing")
    del model.head
    assert not hasattr(model.backbone, "head")


def test_layer_decay_finds_its_groups():
    model, _ = make()
    rates = {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    model.requires_grad_(True)
    for group in param_groups_layer_decay(model, layer_decay=0.5):
        for parameter in group["params"]:
            rates[names[id(parameter)]] = group["lr_scale"]
    assert rates["backbone.cls_token"] == rates["backbone.pos_embed"] == 0.5**4
    assert rates["backbone.blocks.0.adapter.up.weight"] == rates["backbone.blocks.0.block.attn.qkv.weight"] == 0.5**3
    assert rates["backbone.blocks.2.block.attn.qkv.weight"] == 0.5
    assert rates["backbone.head.weight"] == 1
    assert "backbone.pos_embed" in model.no_weight_decay()


def test_training_without_a_route_is_an_error_that_names_the_remedy():
    model, images = make()
    with pytest.raises(RuntimeError, match="call the adapted model itself"):
        model.backbone(images)
    with pytest.raises(AssertionError):  # a pass that fails leaves no route behind
        model(images[..., :3], views=2)
    with pytest.raises(RuntimeError, match="call the adapted model itself"):
        model.blocks[0](torch.randn(2, 5, 24))
    model.eval().backbone(images)


def test_checkpointing_set_before_is_taken_over_and_set_on_the_backbone_is_refused():
    plain = TINY["vit"]()
    plain.set_grad_checkpointing(True)
    model = mosa.adapt(plain).train()
    assert not model.backbone.grad_checkpointing
    assert all(block.grad_checkpointing for block in model.blocks)
    images = image(plain)
    model(images, views=2).sum().backward()
    model.backbone.set_grad_checkpointing(True)
    for call in (lambda: model(images, views=2), lambda: model.forward_features(images)):
        with pytest.raises(RuntimeError, match="call set_grad_checkpointing on the adapted model"):
            call()
    model.set_grad_checkpointing(True)
    model(images, views=2).sum().backward()


def test_views_are_counted():
    model, images = make()
    with pytest.raises(ValueError, match="views must be at least 1, got -1"):
        model(images, views=-1)


def test_frozen_batchnorm_neither_learns_nor_normalises_by_the_batch():
    model, images = make("hybrid", dropout=0.0)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    before = [(m.running_mean.clone(), m.running_var.clone()) for m in norms]
    experts = torch.zeros(len(list(adapters(model))), 1, 2, dtype=torch.int32)
    trained = model(images, experts=experts)
    for norm, (mean, variance) in zip(norms, before, strict=True):
        assert torch.equal(norm.running_mean, mean)
        assert torch.equal(norm.running_var, variance)
    assert torch.equal(model.eval()(images, experts=experts), trained)
    norms[0].requires_grad_(True)  # one that is trained does both
    assert norms[0].training is False
    assert model.train() is model
    assert norms[0].training


@pytest.mark.parametrize("name", FAMILIES)
def test_layer_decay_works_in_every_family(name):
    model, _ = make(name)
    plain = TINY[name]()
    groups, expected = (param_groups_layer_decay(m.requires_grad_(True), layer_decay=0.5) for m in (model, plain))
    rates = {}
    for owner, found in ((plain, expected), (model, groups)):
        names = timm_names(owner)
        by_id = {id(p): names[key] for key, p in owner.named_parameters()}
        for group in found:
            for parameter in group["params"]:
                rate = (group["lr_scale"], group["weight_decay"])
                assert rates.setdefault(by_id[id(parameter)], rate) == rate


@pytest.mark.parametrize("name", ["vit", "eva02", "naflex", "hiera"])
def test_views_part_before_dropped_patches(name):
    """Every view drops its own."""
    plain = TINY[name](patch_drop_rate=0.5, drop_path_rate=0.0)
    images = image(plain, 3)
    model = mosa.adapt(plain, mosa.MoSAConfig(bottleneck=4)).train()  # which changes nothing yet
    torch.manual_seed(0)
    first, second = model(images, views=2, seed=1).chunk(2)
    assert not torch.allclose(first, second)


def test_random_positions_are_known_to_be_random():
    kwargs = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_small_patch16_dinov3", **kwargs)
    for scale, draws in ((None, False), (2.0, True)):
        model.rope.rescale_coords = scale
        assert draws_random_numbers(model.train()) == draws
        assert not draws_random_numbers(model.eval())


def test_pooling_that_timm_made_anew_is_trained_and_saved_like_the_head(tmp_path):
    kwargs = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
    plain = timm.create_model("vit_tiny_patch16_224", global_pool="map", **kwargs)
    model = mosa.adapt(copy.deepcopy(plain))
    torch.nn.init.normal_(plain.attn_pool.q.weight)
    assert all(parameter.requires_grad for parameter in model.attn_pool.parameters())
    mosa.save_adapter(model, tmp_path / "a.safetensors")
    loaded = mosa.load_adapter(plain, tmp_path / "a.safetensors")
    assert all(
        torch.equal(p, q) for p, q in zip(model.attn_pool.parameters(), loaded.attn_pool.parameters(), strict=True)
    )
    pretrained, _ = make("vit_map_pool")  # its architecture ends in attention pooling: part of the frozen backbone
    assert not any(parameter.requires_grad for parameter in pretrained.attn_pool.parameters())
