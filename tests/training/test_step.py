import copy
import shutil

import pytest
import torch
from tiny_vit import make_tiny_vit
from torch import nn

import mosa_fast as mosa
from mosa_fast.config import LossConfig
from mosa_fast.data.loading import Batch
from mosa_fast.training.distributed import Ranks
from mosa_fast.training.optim import make_optimizer, make_schedule
from mosa_fast.training.position import Position
from mosa_fast.training.precision import store_frozen
from mosa_fast.training.step import GraphedStep, Objective, TrainStep

BATCHES = [
    (torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(i)), torch.tensor([0, 1, 2, 3, 4, i % 5]))
    for i in range(4)
]


# Rounding errors of a gradient near zero become errors of a learning rate under AdamW.
LEARNING_RATE = 2e-4


def make_step(
    precision="fp32", device="cpu", graphed=False, compiled=None, checkpointing=False, depth=3, **settings
) -> TrainStep:
    model = mosa.adapt(make_tiny_vit(depth=depth), mosa.MoSAConfig(bottleneck=4, scale=1.0)).train()
    store_frozen(model, precision)
    model.to(device).set_grad_checkpointing(checkpointing)
    optimizer = make_optimizer(model, LEARNING_RATE, 0.01, graphed=graphed)
    objective = Objective(model, LossConfig(deep_reg=True), precision)
    if compiled:
        objective.compile(fullgraph=True, backend=compiled)
    return TrainStep(
        objective,
        optimizer,
        make_schedule(optimizer, 10, 2),
        Position(images=60, batch_size=6, epochs=1),
        Ranks(0, 1, torch.device(device)),
        seed=3,
        scale_loss=precision == "fp16-mixed",
        **settings,
    )


def whole_batch(images, labels):
    """A batch of a run with one process."""
    return Batch(images, labels, first=0, count=len(labels), total=len(labels))


def losses(step, batches=BATCHES, device="cpu", eager=None):
    """The mean loss of each batch, training on them in order."""
    found, eager = [], eager or step
    for images, labels in batches:
        step(whole_batch(images, labels).to(device))
        found.append(eager.sums[0].item() / len(labels))
        eager.sums.zero_()
    return found


@pytest.fixture(scope="module")
def plain():
    step = make_step()
    return losses(step), {name: p.detach().clone() for name, p in step.objective.named_parameters()}


@pytest.mark.parametrize("settings", [{"accumulate": 2}, {"accumulate": 4}, {"checkpointing": True}])
def test_accumulation_and_gradient_checkpointing_change_nothing(plain, settings):
    """Dropout included: 6 images in 4 parts are of 2, 2, 1 and 1."""
    step = make_step(**settings)
    assert losses(step) == pytest.approx(plain[0], abs=1e-6)
    for name, parameter in step.objective.named_parameters():
        torch.testing.assert_close(parameter, plain[1][name], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler here")
def test_compiled_without_graph_breaks_the_losses_are_the_same():
    """The second batch is smaller, as the last of an epoch is; one block, because compiling takes long."""
    batches = [BATCHES[0], (BATCHES[1][0][:4], BATCHES[1][1][:4])]
    compiled = losses(make_step(compiled="inductor", depth=1), batches)
    assert compiled == pytest.approx(losses(make_step(depth=1), batches), abs=1e-5)


def test_only_what_is_trained_gets_a_gradient_and_nothing_before_the_first_adapter_is_in_the_graph():
    step = make_step()
    model = step.objective.model
    seen = []
    model.blocks[0].mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    model.blocks[1].norm1.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    losses(step, BATCHES[:1])
    assert seen == [False, True]
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.parametrize("precision", ["fp32", "fp16-mixed"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(precision, value):
    step = make_step(precision)
    losses(step, BATCHES[:2])
    step.bad.zero_()  # the loss scale may have been too large at first
    before = copy.deepcopy(step.parameters)
    state = copy.deepcopy(step.optimizer.state_dict()["state"])
    poisoned = BATCHES[2][0].clone()
    poisoned[0, 0, 0, 0] = value
    for _ in range(2):
        assert losses(step, [(poisoned, BATCHES[2][1])]) == [0.0]
    assert step.bad.tolist() == [2, 2, 2]
    assert all(torch.equal(a, b) for a, b in zip(before, step.parameters, strict=True))
    for index, values in step.optimizer.state_dict()["state"].items():
        assert all(torch.equal(tensor, state[index][key]) for key, tensor in values.items())
    losses(step, BATCHES[3:])
    assert step.bad.tolist() == [0, 2, 2]
    assert not torch.equal(before[0], step.parameters[0])


@pytest.mark.parametrize("precision", ["bf16-mixed", "fp16-mixed", "bf16-true"])
def test_half_precision_stores_frozen_weights_once_and_trains_in_float32(plain, precision):
    step = make_step(precision)
    model = step.objective.model
    half = torch.float16 if precision.startswith("fp16") else torch.bfloat16
    stream = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert model.blocks[0].attn.qkv.weight.dtype == model.patch_embed.proj.weight.dtype == half
    assert model.blocks[0].norm1.weight.dtype == model.pos_embed.dtype == stream
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    dtypes = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    found = losses(step)
    assert set(dtypes) == {stream}
    state = step.optimizer.state_dict()["state"].values()
    assert {tensor.dtype for values in state for tensor in values.values()} == {torch.float32}
    assert found[0] == pytest.approx(plain[0][0], rel=2e-2)  # the eight bits of a bfloat16, times a few layers
    assert found[0] != plain[0][0]


def test_frozen_weights_are_not_cast_in_a_step():
    """Autocast leaves a weight that has its dtype alone: only trained ones are cast."""
    step = make_step("bf16-mixed")
    casts = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and isinstance(args[0], nn.Parameter):
                casts.append(args[0])
            return function(*args, **(kwargs or {}))

    with Watch():
        losses(step, BATCHES[:1])
    assert all(parameter.requires_grad for parameter in casts)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "fp16-mixed", "bf16-true"])
def test_a_step_never_waits_for_the_gpu(precision):
    step = make_step(precision, device="cuda")
    batches = [whole_batch(images.cuda(), labels.cuda()) for images, labels in BATCHES]
    step(batches[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            step(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_captured_step_gives_the_losses_of_an_eager_one(precision, accumulate):
    """Ten steps, with a smaller batch before and after the capture."""
    small = (BATCHES[0][0][:3], BATCHES[0][1][:3])
    batches = [small, *BATCHES, small, *BATCHES]
    eager = make_step(precision, device="cuda", accumulate=accumulate)
    captured = make_step(precision, device="cuda", accumulate=accumulate, graphed=True)
    graphed = GraphedStep(captured)
    expected = losses(eager, batches, "cuda")
    assert losses(graphed, batches, "cuda", eager=captured) == pytest.approx(expected, rel=1e-4)
    assert graphed.graph is not None
