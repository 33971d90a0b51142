"""Adapters inside their MLPs' products: what models compute so, and where it is refused or not chosen."""

import copy
import gc
import itertools
import re
import shutil

import pytest
import timm
import torch
from test_fold import NO
from tiny_models import TINY, image
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import ProfilerActivity, profile

import mosa_fast as mosa
from mosa_fast.adapters import inside_mlp
from mosa_fast.adapters.adapter_file import read_adapter
from mosa_fast.adapters.block import AdaptedBlock
from mosa_fast.adapters.inside_mlp import why_branch, why_not_inside
from mosa_fast.nn.mixture import adapters
from mosa_fast.training.optim import make_optimizer

EXPERTS, STEPS = 3, 20
FAMILIES = [
    name for name in ("vit", "vit_layer_scale_registers", "swin", "cait", "hiera", "sam", "xcit") if name in TINY
]
NEEDS_COMPILER = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler here")


@pytest.fixture(autouse=True)
def small_models_count(monkeypatch):
    """What auto takes where a block's input is large; those of the tests are not."""
    monkeypatch.setattr(inside_mlp, "FASTER_FROM", 0)


def blocks(model):
    return [module for module in model.modules() if isinstance(module, AdaptedBlock)]


def plain(name):
    return TINY[name](drop_path_rate=0.0)


def pair(name="vit", *, double=True, **config):
    """The same model in both forms, with random weights."""
    made = []
    for form in ("branch", "mlp"):
        settings = {"bottleneck": 4, "experts": EXPERTS, "scale": 0.7, **config}
        model = mosa.adapt(plain(name), mosa.MoSAConfig(form=form, **settings)).train()
        model = model.double() if double else model
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for adapter in adapters(model):
                for parameter in adapter.parameters():
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
        made.append(model)
    images = image(made[0].backbone, 2)
    return *made, images.double() if double else images


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(model, images, seed, views=2, run=None):
    model.zero_grad()
    logits = (model if run is None else run)(images, views=views, seed=seed)
    torch.nn.functional.cross_entropy(logits, torch.arange(len(logits)) % 10).backward()
    return logits.detach()


def assert_equal(found, expected, limit=1e-12):
    torch.testing.assert_close(found, expected, rtol=limit, atol=limit)


@pytest.mark.parametrize(
    "config",
    [
        {"share": "down"},
        {"share": "up", "scale": "trainable", "bias": "split"},
        {"share": "none", "merge": "joint"},
        {"share": "none", "dropout": 0.0, "experts": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", FAMILIES)
def test_both_forms_train_alike(name, config):
    branch, inside, images = pair(name, **config)
    assert all(why_branch(block) is None for block in blocks(inside))
    optimizers = [make_optimizer(model, lr=1e-3, weight_decay=0.1) for model in (branch, inside)]
    for number in range(STEPS if name == "vit" else 2):
        assert_equal(step(inside, images, number), step(branch, images, number))
        assert_equal(gradients(inside), gradients(branch))
        for optimizer in optimizers:
            optimizer.step()
    assert_equal(dict(inside.named_parameters()), dict(branch.named_parameters()))
    assert_equal(step(inside, images, 5, views=1), step(branch, images, 5, views=1))
    assert_equal(inside.eval()(images), branch.eval()(images))
    assert_equal(mosa.merge(inside)(images), branch(images))
    assert_equal(inside.forward_intermediates(images)[0], branch.forward_intermediates(images)[0])


def test_every_sample_can_have_its_own_experts():
    branch, inside, images = pair(share="none")
    experts = torch.randint(EXPERTS, (3, 3, 2), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    assert_equal(inside(images, experts=experts, seed=1), branch(images, experts=experts, seed=1))


def test_checkpointing_accumulation_and_disabling():
    branch, inside, images = pair()
    step(branch, images, 3)
    inside.set_grad_checkpointing()
    step(inside, images, 3)
    assert_equal(gradients(inside), gradients(branch))
    inside.zero_grad()
    for first in (0, 1):  # the parts of a batch
        seed = torch.tensor([3, first])
        logits = inside(images[first : first + 1], views=2, seed=seed)
        (torch.nn.functional.cross_entropy(logits, torch.arange(4)[first::2]) / 2).backward()
    assert_equal(gradients(inside), gradients(branch))
    with inside.disable_adapters(), branch.disable_adapters():
        assert_equal(inside(images), branch(images))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_agrees_within_rounding(dtype):
    branch, inside, images = pair(double=False)
    found = []
    for model in (branch, inside):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            step(model, images, 3)
        found.append(torch.cat([gradient.flatten() for gradient in gradients(model).values()]))
    difference = torch.linalg.vector_norm(found[0] - found[1]) / torch.linalg.vector_norm(found[0])
    assert difference < (1e-5 if dtype == torch.float32 else 5e-2)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, NEEDS_COMPILER])])
def test_one_compiled_graph_serves_every_draw(backend):
    branch, inside, images = pair(double=False)
    torch._dynamo.reset()  # what other tests compiled of the same code would be guarded against here
    compiler = CompileCounterWithBackend(backend)
    compiled = torch.compile(inside, fullgraph=True, backend=compiler)
    for seed in map(torch.tensor, ([1], [2], [3])):
        assert_equal(step(inside, images, seed, run=compiled), step(branch, images, seed), 1e-5)
        assert_equal(gradients(inside), gradients(branch), 1e-5)
    assert compiler.frame_count == 1
    assert "adapted_mlp" in str(compiler.graphs[0].graph)


def peak_memory(run):
    """The most bytes that a run has allocated at once, on top of what was there, by the allocator's own events."""
    gc.collect()  # what other tests left in cycles, freed meanwhile, would count against the run's own
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_needs_no_more_memory_than_with_the_branch(checkpointing):
    peaks = {}
    for form in ("branch", "mlp"):
        plain_model = timm.create_model("vit_tiny_patch16_224", img_size=64, embed_dim=64, num_heads=2, depth=3)
        model = mosa.adapt(plain_model, mosa.MoSAConfig(bottleneck=8, form=form)).train()
        if checkpointing:
            model.set_grad_checkpointing()
        images = torch.randn(8, 3, 64, 64)
        step(model, images, 0)  # what the first step makes and keeps
        model.zero_grad()  # the profile does not know the sizes of what was made before it, and counts some of them
        peaks[form] = peak_memory(lambda model=model, images=images: step(model, images, 1))
    assert 0 < peaks["mlp"] <= peaks["branch"]


def test_gradients_of_gradients_are_those_of_the_branch():
    branch, inside, images = pair(share="none", scale="trainable")
    for model in (branch, inside):
        for block in blocks(model):
            block.attn.fused_attn = False  # it has no second derivative
        images.requires_grad_()
        model.zero_grad()
        loss = model(images, views=2, seed=3).square().sum()
        (slope,) = torch.autograd.grad(loss, images, create_graph=True)
        (loss + slope.square().sum()).backward()
    assert_equal(gradients(inside), gradients(branch), 1e-10)


def test_adapter_files_are_the_same_in_both_forms(tmp_path):
    branch, inside, images = pair(double=False)
    for name, model in (("branch", branch), ("mlp", inside)):
        mosa.save_adapter(model, tmp_path / name)
    files = [read_adapter(tmp_path / name) for name in ("branch", "mlp")]
    assert files[0][1].to_dict() == files[1][1].to_dict()
    torch.testing.assert_close(files[0][0], files[1][0], rtol=0, atol=0)
    loaded = mosa.load_adapter(plain("vit"), tmp_path / "mlp").eval()
    assert_equal(loaded(images), branch.eval()(images), 1e-5)
    mosa.load_adapter(inside, tmp_path / "branch")
    bank = mosa.AdapterBank(plain("vit"), {"task": tmp_path / "mlp"})
    assert_equal(bank(images, tasks="task"), branch(images), 1e-5)
    assert_equal(mosa.fold(inside)(images), branch(images), 1e-5)


@pytest.mark.parametrize("name", [name for name in NO if name in TINY])
def test_a_model_where_it_is_not_exact_takes_the_branch(name):
    model = mosa.adapt(TINY[name](), mosa.MoSAConfig(bottleneck=4))
    assert NO[name] in str(why_branch(blocks(model)[-1]))
    with pytest.raises(ValueError, match=f"form mlp is not exact in a .*: .*{NO[name]}.*; use auto or branch"):
        mosa.adapt(TINY[name](), mosa.MoSAConfig(bottleneck=4, form="mlp"))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"placement": "pfeiffer"}, "a pfeiffer adapter does not read"),
        ({"placement": "houlsby"}, "a houlsby adapter does not read"),
        ({"activation": "relu"}, "the adapter's activation is relu"),
        ({"method": "lora"}, "low-rank pairs are in its attention"),
    ],
)
def test_other_adapters_are_refused(config, reason):
    with pytest.raises(ValueError, match=reason):
        mosa.adapt(TINY["vit"](), mosa.MoSAConfig(bottleneck=4, form="mlp", **config))


def wrapped(block):
    block.adapter = torch.compile(block.adapter, backend="eager")


class Silent(torch.nn.Module):
    """Lets nothing through, as a drop-path of somebody's own may do."""

    def forward(self, x):
        return 0 * x


class OtherNorm(torch.nn.LayerNorm):
    """A LayerNorm that computes something else."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda block: setattr(block.mlp.drop1, "p", 0.1), "dropout or drop-path"),
        (lambda block: setattr(block.block, "drop_path2", Silent()), "there is a .*Silent"),
        (lambda block: setattr(block.block, "ls2", Silent()), "there is a .*Silent"),
        (lambda block: setattr(block.block, "norm2", OtherNorm(block.norm2.weight.numel())), "its norm is a .*OtherN"),
        (lambda block: block.ls2.register_forward_hook(lambda *_: None), "hooks"),
        (lambda block: block.mlp.fc1.register_full_backward_pre_hook(lambda *_: None), "hooks"),
        (lambda block: setattr(block.mlp, "forward", block.mlp.forward), "hooks"),
        (lambda block: setattr(block.adapter, "norm", None), "its adapter's norm"),
        (lambda block: block.mlp.fc1.weight.requires_grad_(), "trained"),
        (lambda block: block.mlp.register_forward_hook(lambda *_: None), "hooks"),
        (lambda block: setattr(block.mlp, "act", torch.nn.ReLU()), "its activation is ReLU"),
        (lambda block: setattr(block.adapter.norm, "eps", 0.1), "the adapter's a LayerNorm"),
        (wrapped, "in place of its adapter there is a OptimizedModule"),
    ],
    ids=[
        *("dropout", "drop-path", "scale", "norm", "hook of the scale", "backward hook", "forward", "adapter's norm"),
        *("trained", "hooks", "activation", "eps", "wrapped"),
    ],
)
def test_what_changes_later_is_noticed(change, reason):
    model = mosa.adapt(TINY["vit"](), mosa.MoSAConfig(bottleneck=4, experts=EXPERTS)).train()
    block = blocks(model)[1]
    assert why_branch(block) is None
    change(block)
    assert re.search(reason, why_not_inside(block))
    assert re.search(reason, why_branch(block))
    model(image(model.backbone), views=2, seed=0).sum().backward()


def test_a_refused_form_puts_nothing_in():
    model = TINY["vit"](drop_path_rate=0.1)  # of the first block: none
    with pytest.raises(ValueError, match="drop-path"):
        mosa.adapt(model, mosa.MoSAConfig(bottleneck=4, form="mlp"))
    mosa.adapt(model, mosa.MoSAConfig(bottleneck=4, form="branch"))


@pytest.mark.parametrize("form", ["auto", "mlp"])
def test_derivatives_that_the_products_have_not_take_the_branch(form):
    model = mosa.adapt(plain("vit"), mosa.MoSAConfig(bottleneck=4, form=form)).eval()
    for block in blocks(model):
        torch.nn.init.normal_(block.adapter.up.weight)
        block.attn.fused_attn = False  # it has no forward-mode derivative
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(weights, images):
        return torch.func.functional_call(model, weights, (images[None],)).square().sum()

    def derivatives():
        _, tangent = torch.func.jvp(model, (images,), (torch.ones_like(images),))
        with torch.no_grad():  # where an operator that autograd does not see would have none, without a word
            _, unrecorded = torch.func.jvp(model, (images,), (torch.ones_like(images),))
        return {"jvp": tangent, "jvp without grad": unrecorded} | torch.func.vmap(torch.func.grad(loss), (None, 0))(
            weights, images
        )

    images = image(model.backbone, 2)
    found = derivatives()
    for block in blocks(model):
        block.form = "branch"
    expected = derivatives()
    assert all(
        expected[name].abs().max() > 0 for name in ("jvp", "jvp without grad", "backbone.blocks.1.adapter.up.weight")
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("init_values", [None, 0.3])
def test_a_new_adapter_changes_no_bit(init_values):
    plain_model = TINY["vit"](init_values=init_values).eval()
    images = image(plain_model)
    expected = plain_model(images)
    model = mosa.adapt(plain_model, mosa.MoSAConfig(bottleneck=4)).eval()
    assert why_branch(blocks(model)[0]) is None
    torch.testing.assert_close(model(images), expected, rtol=0, atol=0)


def test_changed_frozen_weights_are_what_is_computed_with():
    branch, inside, images = pair()
    for model in (branch, inside):
        model(images, seed=1)
        model.load_state_dict({name: 1.1 * t if t.is_floating_point() else t for name, t in model.state_dict().items()})
    assert_equal(inside(images, seed=1), branch(images, seed=1))
    assert_equal(inside.float()(images.float(), seed=1), branch.float()(images.float(), seed=1), 1e-5)


def test_auto_takes_the_branch_for_small_inputs(monkeypatch):
    model = mosa.adapt(TINY["vit"](), mosa.MoSAConfig(bottleneck=4)).eval()
    images, taken = image(model.backbone, 2), []
    for name in ("_run", "_run_inside"):
        run = getattr(AdaptedBlock, name)
        monkeypatch.setattr(AdaptedBlock, name, lambda *given, run=run, name=name: taken.append(name) or run(*given))
    block = blocks(model)[0]
    values = 2 * block.attn.qkv.in_features * model.patch_embed.num_patches  # and those of the class token
    for least, name in ((values, "_run_inside"), (2 * values, "_run")):
        monkeypatch.setattr(inside_mlp, "FASTER_FROM", least)
        model(images)
        assert set(taken) == {name}
        taken.clear()
    assert f"fewer than {2 * values:,} values" in why_branch(block, 2 * values - 1)
    assert why_branch(block) is None
    block.form = "mlp"
    assert why_branch(block, 1) is None
    block.form = "auto"
    model.train()(images, views=3, seed=0)  # the first block has one view's values, and counts those of all
    assert taken == ["_run_inside"] * 3


def test_a_recomputation_has_the_form_of_its_forward(monkeypatch):
    model = mosa.adapt(TINY["vit"](), mosa.MoSAConfig(bottleneck=4)).train()
    model.set_grad_checkpointing()
    loss = model(image(model.backbone, 2), views=2, seed=0).sum()
    monkeypatch.setattr(inside_mlp, "FASTER_FROM", 2**60)
    monkeypatch.delattr(AdaptedBlock, "_run")
    loss.backward()


def test_auto_leaves_the_choice_to_who_asked_for_a_backend_or_an_export():
    model = mosa.adapt(TINY["vit"](), mosa.MoSAConfig(bottleneck=4)).eval()
    block = blocks(model)[0]
    assert why_branch(block) is None
    with mosa.backend("reference"):
        assert "reference" in why_branch(block)
    program = torch.export.export(model, (image(model.backbone),))
    assert "mosa_fast" not in str(program.graph)
    assert "on meta" in why_branch(blocks(copy.deepcopy(model).to("meta"))[0])


def test_the_summary_says_which_form_each_block_has(monkeypatch):
    model = mosa.adapt(TINY["vit"](), mosa.MoSAConfig(bottleneck=4))
    blocks(model)[1].mlp.drop2.p = 0.5
    monkeypatch.setattr("mosa_fast.adapters.summary.FASTER_FROM", 1000)
    counts = mosa.summary(model)
    assert list(counts.branches) == ["blocks.0", "blocks.1", "blocks.2"]
    assert [counts.branches[f"blocks.{number}"] is None for number in range(3)] == [True, False, True]
    branches = "form branch (its MLP has dropout or drop-path): 1 block"
    assert f"; form mlp (for inputs of 1,000 values or more): 2 blocks; {branches}" in str(counts)
    chosen = mosa.adapt(TINY["vit"](), mosa.MoSAConfig(bottleneck=4, form="mlp"))
    assert "; form mlp: 3 blocks" in str(mosa.summary(chosen))
