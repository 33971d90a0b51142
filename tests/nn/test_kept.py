"""Evaluation computes with weights that were merged once, and merges them again when one of them changes."""

import copy
import pickle

import pytest
import torch

from mosa_fast import SparseAdapter, SparseLoRA
from mosa_fast.nn.projection import SparseProjection

IN, OUT, RANK = 12, 18, 4


class Layer:
    """A layer in evaluation, with random weights, and how it is called."""

    def __init__(self, kind):
        torch.manual_seed(0)
        self.lora = kind == "lora"
        if self.lora:
            self.module = SparseLoRA(IN, [(0, 6), (6, OUT)], RANK, 3, share="none", scale="trainable")
        else:
            self.module = SparseAdapter(IN, RANK, 3, share="none", bias=kind, scale="trainable")
        with torch.no_grad():
            for parameter in self.module.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        self.module.eval()
        self.x, self.y = torch.randn(2, 5, IN), torch.randn(2, 5, OUT)

    def __call__(self, module=None, x=None):
        module, x = self.module if module is None else module, self.x if x is None else x
        return module(x, self.y) if self.lora else module(x)

    def expected(self):
        """What the same layer gives that has kept nothing."""
        fresh = copy.deepcopy(self.module)
        fresh.merge()
        return self(fresh)


@pytest.fixture(params=["per_expert", "split", "lora"])
def layer(request):
    return Layer(request.param)


@pytest.fixture
def merges(monkeypatch):
    """Every projection that was merged, one after the other."""
    made, dense = [], SparseProjection.dense

    def counted(projection, *arguments):
        made.append(projection)
        return dense(projection, *arguments)

    monkeypatch.setattr(SparseProjection, "dense", counted)
    return made


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_weights_are_merged_once(layer, merges, context):
    with context():
        outs = [layer() for _ in range(3)]
    assert len(merges) == 2  # down and up
    assert all(torch.equal(out, layer.expected()) for out in outs)


def write(module):
    module.up.weight.mul_(2.0)


def load(module):
    module.load_state_dict({name: value + 1.0 if value.is_floating_point() else value for name, value in state(module)})


def assign(module):
    changed = {name: value + 1.0 if value.is_floating_point() else value.clone() for name, value in state(module)}
    module.load_state_dict(changed, assign=True)


def state(module):
    return module.state_dict().items()


def optimise(module, **options):
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(module.parameters(), lr=0.1, **options).step()


def another_type(module):
    module.bfloat16().float()


def through_data_and_mode(module):
    module.up.weight.data *= 2.0
    module.train()
    module.eval()


@pytest.mark.parametrize(
    "change",
    [write, load, assign, optimise, another_type, through_data_and_mode],
    ids=lambda f: f.__name__,
)
def test_they_are_merged_again_when_one_changes(layer, change):
    with torch.no_grad():
        before = layer()
        change(layer.module)
        after = layer()
    assert not torch.equal(after, before)
    assert torch.equal(after, layer.expected())


def test_later_tensors_with_the_same_address_are_not_taken_for_the_same(layer):
    name, base = "up.weight", layer.module.up.weight.detach().clone()
    arguments = (layer.x, layer.y) if layer.lora else (layer.x,)
    with torch.no_grad():
        for factor in (1.0, 2.0, 3.0, 4.0):
            out = torch.func.functional_call(layer.module, {name: base * factor}, arguments)
            layer.module.train().eval()
            assert torch.equal(out, torch.func.functional_call(layer.module, {name: base * factor}, arguments))
        for _ in range(8):
            other = torch.nn.Parameter(torch.randn_like(base))
            torch.utils.swap_tensors(layer.module.up.weight, other)
            del other
            assert torch.equal(layer(), layer.expected())


@pytest.mark.parametrize("given_experts", [False, True])
@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}], ids=str)
def test_training_in_evaluation_mode_is_seen(layer, options, given_experts):
    """Fused optimizers write without being counted."""
    with torch.no_grad():
        layer()
    draws = layer.module.draws
    experts = torch.zeros((draws, 1, 2) if layer.lora else (1, 2), dtype=torch.int32) if given_experts else None
    arguments = (layer.x, layer.y) if layer.lora else (layer.x,)
    out = layer.module(*arguments, experts=experts)
    with torch.no_grad():
        layer()
    out.sum().backward()
    torch.optim.AdamW(layer.module.parameters(), lr=0.1, **options).step()
    layer.module.zero_grad()
    with torch.no_grad():
        torch.testing.assert_close(layer(), layer.expected())


def test_gradients_in_evaluation_go_to_the_weights_themselves(layer, merges):
    with torch.no_grad():
        kept = layer()
    merges.clear()
    out = layer()
    torch.testing.assert_close(out, kept)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.module.parameters())
    assert not merges


def test_what_inference_mode_kept_serves_gradients_of_the_input(layer):
    layer.module.requires_grad_(False)
    with torch.inference_mode():
        layer()
    x = layer.x.clone().requires_grad_()
    layer(x=x).sum().backward()
    assert x.grad.isfinite().all()


def test_copies_and_pickles_do_not_carry_it(layer, merges):
    with torch.no_grad():
        before = layer()
        for other in (copy.deepcopy(layer.module), pickle.loads(pickle.dumps(layer.module))):
            merges.clear()
            assert torch.equal(layer(other), before)
            assert len(merges) == 2


def test_weights_whose_writes_nobody_counts_are_merged_each_time(merges):
    with torch.inference_mode():
        layer = Layer("per_expert")  # all its tensors are inference tensors
        before = layer()
        layer.module.up.weight.mul_(2.0)
        assert not torch.equal(layer(), before)
    assert not merges


def test_weights_put_in_for_one_call_are_used(layer):
    with torch.no_grad():
        before = layer()
        changed = {name: 2 * parameter for name, parameter in layer.module.named_parameters()}
        arguments = (layer.x, layer.y) if layer.lora else (layer.x,)
        other = torch.func.functional_call(layer.module, changed, arguments)
        assert not torch.equal(other, before)
        batched = {name: torch.stack([value, value]) for name, value in changed.items()}
        both = torch.func.vmap(lambda weights: torch.func.functional_call(layer.module, weights, arguments))(batched)
        torch.testing.assert_close(both[1], other)
        assert torch.equal(layer(), before)


def test_compiled_code_merges_the_weights_that_are_there(layer):
    torch._dynamo.reset()
    compiled = torch.compile(layer.module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(layer(compiled), layer.expected())
            layer.module.up.weight.data *= 2.0


def test_a_fixed_expert_is_kept_as_it_is(merges):
    torch.manual_seed(0)
    adapter = SparseAdapter(IN, RANK, 3, share="none", routing="fixed").eval()
    with torch.no_grad():
        adapter.up.weight.normal_()
        x = torch.randn(2, 5, IN)
        out = adapter(x)
        torch.testing.assert_close(out, adapter(x, experts=torch.zeros(1, 2, dtype=torch.int32)))
        assert torch.equal(out, adapter(x))
    assert len(merges) == 2
