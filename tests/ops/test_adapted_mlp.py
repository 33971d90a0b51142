"""The operator adapted_mlp is sparse_adapter with an MLP's branch as its skip: outputs and every gradient."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import mosa_fast.ops.adapted_mlp_flops  # noqa: F401
from mosa_fast.nn import SparseAdapter
from mosa_fast.ops import adapted_mlp_reference, registration
from mosa_fast.ops.arguments import AdaptedMLPCall
from mosa_fast.ops.reference import project
from mosa_fast.ops.registration import OPERATORS

WIDTH, BOTTLENECK, HIDDEN, SAMPLES, TOKENS, EXPERTS = 24, 5, 40, 4, 3, 3
AXES = (("down", "up", "none"), (False, True), (1, 2, SAMPLES), (False, True), (False, True), (0.3, "trainable"))
EPS = 1e-6


def frozen(dtype, layer_scale):
    """norm2, the MLP and LayerScale, as the operator takes them."""
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "mlp_norm_weight": (WIDTH,),
        "mlp_norm_bias": (WIDTH,),
        "fc1_weight": (HIDDEN, WIDTH),
        "fc1_bias": (HIDDEN,),
        "fc2_weight": (WIDTH, HIDDEN),
        "fc2_bias": (WIDTH,),
        "layer_scale": (WIDTH,),
    }
    made = {name: 0.3 * torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return made if layer_scale else made | {"layer_scale": None}


def adapter_of(dtype, **options):
    torch.manual_seed(0)
    adapter = SparseAdapter(WIDTH, BOTTLENECK, EXPERTS, **options).to(dtype).train()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return adapter


def branch(adapter, mlp, x, experts, **options):
    """The same by the operator that stands beside the MLP."""
    n = F.layer_norm(x, (WIDTH,), mlp["mlp_norm_weight"], mlp["mlp_norm_bias"], EPS)
    m = F.linear(F.gelu(F.linear(n, mlp["fc1_weight"], mlp["fc1_bias"])), mlp["fc2_weight"], mlp["fc2_bias"])
    m = m if mlp["layer_scale"] is None else mlp["layer_scale"] * m
    if adapter.norm is not None:
        return adapter(x, m, experts, **options)
    stream = x.repeat(len(experts), 1, 1) if options["fork"] else x
    return stream + adapter(n, m, experts, add_input=False, **options)


def inside(adapter, mlp, x, experts, **options):
    return adapter.with_mlp(x, mlp | {"eps": EPS}, experts, **options)


def outcome(compute, adapter, mlp, x, *arguments, autocast=False, **options):
    """The output and every gradient, by name."""
    x = x.detach().requires_grad_()
    adapter.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = compute(adapter, mlp, x, *arguments, **options)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype))
    return {"out": out.detach(), "x": x.grad, **{name: p.grad for name, p in adapter.named_parameters()}}


def stream(dtype=torch.float64):
    return 0.5 + torch.randn(SAMPLES, TOKENS, WIDTH, generator=torch.Generator().manual_seed(3)).to(dtype)


def assert_same(found, expected, limit):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        difference = torch.linalg.vector_norm(value.double() - expected[name].double())
        assert difference <= limit * torch.linalg.vector_norm(expected[name].double()), name


@pytest.mark.parametrize(("share", "fork", "views", "norm", "layer_scale", "scale"), list(itertools.product(*AXES)))
def test_it_computes_what_the_branch_does(share, fork, views, norm, layer_scale, scale):
    adapter = adapter_of(torch.float64, share=share, scale=scale, dropout=0.3, norm=norm)
    experts = torch.randint(EXPERTS, (views, 2), generator=torch.Generator().manual_seed(4), dtype=torch.int32)
    arguments = (adapter, frozen(torch.float64, layer_scale), stream(), experts)
    options = {"seed": torch.tensor([7, 3]), "fork": fork}
    assert_same(outcome(inside, *arguments, **options), outcome(branch, *arguments, **options), 1e-12)


@pytest.mark.parametrize("bias", ["per_expert", "split"])
def test_split_biases_merged_experts_and_no_dropout(bias):
    adapter = adapter_of(torch.float64, share="none", bias=bias, dropout=0.0)
    experts = torch.tensor([[-1, 0], [2, -1]], dtype=torch.int32)
    arguments = (adapter, frozen(torch.float64, True), stream(), experts)
    for fork in (False, True):
        found, expected = (outcome(f, *arguments, seed=0, fork=fork) for f in (inside, branch))
        assert_same(found, expected, 1e-12)


@pytest.mark.parametrize("fork", [False, True])
@pytest.mark.parametrize(
    ("dtype", "autocast", "limit"),
    [
        (torch.float32, False, 1e-5),
        (torch.float32, True, 2e-2),
        (torch.bfloat16, False, 2e-2),
        (torch.bfloat16, True, 2e-2),
    ],
)
def test_other_dtypes_and_autocast(dtype, autocast, limit, fork):
    adapter = adapter_of(torch.float32, share="none")
    arguments = (adapter, frozen(dtype, True), stream(dtype), torch.tensor([[0, 1], [2, 0]], dtype=torch.int32))
    options = {"seed": 5, "fork": fork, "autocast": autocast}
    assert_same(outcome(inside, *arguments, **options), outcome(branch, *arguments, **options), limit)


@pytest.mark.parametrize(
    ("dtype", "stored", "limit"),
    [
        (torch.bfloat16, torch.bfloat16, 2e-2),
        (torch.float32, torch.float16, 2e-3),
        (torch.float64, torch.float32, 1e-6),
    ],
)
def test_weights_of_another_dtype_than_sums(dtype, stored, limit):
    adapter = adapter_of(stored, share="none")
    arguments = (adapter, frozen(dtype, True), stream(dtype), torch.tensor([[0, 1], [2, 0]], dtype=torch.int32))
    options = {"seed": 5, "fork": False}
    assert_same(outcome(inside, *arguments, **options), outcome(branch, *arguments, **options), limit)


def assert_accurate_far_from_zero(limit):
    """In float32, for an x with a mean of 30 standard deviations."""
    adapter = adapter_of(torch.float32)
    x, experts = stream(torch.float32) + 30, torch.tensor([[0, 1]], dtype=torch.int32)
    options = {"seed": 0, "fork": False}
    found = outcome(inside, adapter, frozen(torch.float32, False), x, experts, **options)
    exact = outcome(branch, adapter.double(), frozen(torch.float64, False), x.double(), experts, **options)
    for name, value in found.items():
        error = torch.linalg.vector_norm(value.double() - exact[name]) / torch.linalg.vector_norm(exact[name])
        assert error < limit, name


def test_a_mean_far_from_zero_costs_little_accuracy():
    """The adapter's products read x itself, and its mean is taken off afterwards."""
    assert_accurate_far_from_zero(3e-5)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_products_that_round_do_not_read_the_mean(precision, monkeypatch):
    """Where float32 products may run in TF32 or bfloat16, on any machine: here those of the adapter are rounded."""
    monkeypatch.setattr(
        adapted_mlp_reference, "project", lambda x, weight: project(x.bfloat16().float(), weight.bfloat16().float())
    )
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert_accurate_far_from_zero(2e-2)
    finally:
        torch.set_float32_matmul_precision(before)


def operator_call(share="none", fork=False, input_gradient=True):
    adapter, mlp = adapter_of(torch.float32, share=share, scale="trainable"), frozen(torch.float32, True)
    caught = []
    operator = OPERATORS["adapted_mlp"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(operator), "__call__", lambda self, call, backend: caught.append(call) or call.x)
        x = stream(torch.float32).requires_grad_(input_gradient)
        inside(adapter, mlp, x, torch.tensor([[0, 1], [2, 0]], dtype=torch.int32), seed=5, fork=fork)
    return caught[0]


@pytest.mark.parametrize(("share", "fork"), [("none", False), ("down", True)])
def test_opcheck(share, fork):
    call = operator_call(share, fork)
    torch.library.opcheck(torch.ops.mosa_fast.adapted_mlp.default, [*call.values(), True, "reference"])


def test_opcheck_of_the_backward():
    call = operator_call()
    values = [v.detach() if isinstance(v, torch.Tensor) else v for v in call.values()]
    out, *saved = torch.ops.mosa_fast.adapted_mlp(*values, True, "reference")
    tensors, options = values[: len(call.TENSORS)], values[len(call.TENSORS) :]
    tensors[list(call.TENSORS).index("fc2_bias")] = None
    needed = [True] * sum(facts.gradient is not None for facts in AdaptedMLPCall.TENSORS.values())
    arguments = [*tensors, *saved, torch.randn_like(out), *options, needed, None, "reference"]
    torch.library.opcheck(torch.ops.mosa_fast.adapted_mlp_backward.default, arguments)


@pytest.mark.parametrize("fork", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_gradients_can_be_differentiated(norm, fork):
    adapter = adapter_of(torch.float64, share="none", scale="trainable", dropout=0.3, norm=norm)
    mlp, experts = frozen(torch.float64, True), torch.tensor([[0, 1], [2, 0]], dtype=torch.int32)
    found = []
    for compute in (inside, branch):
        start = stream().requires_grad_()
        out = compute(adapter, mlp, 2 * start, experts, seed=torch.tensor([7, 3]), fork=fork)
        inputs = [start, *adapter.parameters()]
        first = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), inputs)
        found.append({str(number): gradient for number, gradient in enumerate((*first, *second))})
    assert_same(*found, 1e-12)


def test_no_gradient_comes_twice_through_a_weight_that_was_made_from_the_input():
    adapter, mlp = adapter_of(torch.float64), frozen(torch.float64, False)
    found = []
    for compute in (inside, branch):
        x = stream().requires_grad_()
        weights = {"up.weight": adapter.up.weight + x.mean()}

        def run(adapter, compute=compute, x=x):
            return compute(adapter, mlp, x, torch.tensor([[0, 1]], dtype=torch.int32), seed=0, fork=False)

        out = torch.func.functional_call(Runner(adapter, run), {f"adapter.{n}": w for n, w in weights.items()}, ())
        (slope,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        found.append({"slope": slope, "second": torch.autograd.grad(slope.square().sum(), x)[0]})
    assert_same(*found, 1e-12)


class Runner(torch.nn.Module):
    """A function of an adapter as a module's forward, so that its weights can be given."""

    def __init__(self, adapter, run):
        super().__init__()
        self.adapter, self.run = adapter, run

    def forward(self):
        return self.run(self.adapter)


def test_nothing_is_kept_that_backward_does_not_need():
    for input_gradient in (False, True):
        call = operator_call(input_gradient=input_gradient)
        _, stats, pre, *_ = OPERATORS["adapted_mlp"].results(call, True)
        assert pre.shape == ((SAMPLES * TOKENS if input_gradient else 0), HIDDEN)
        assert stats.numel() == 2 * SAMPLES * TOKENS
    assert all(not tensor.numel() for tensor in OPERATORS["adapted_mlp"].results(call, False)[1:])


@pytest.mark.parametrize("input_gradient", [False, True])
@pytest.mark.parametrize("fork", [False, True])
@pytest.mark.parametrize("share", ["down", "none"])
def test_its_operations_are_counted_as_those_of_the_branch(share, fork, input_gradient):
    """Without the small products with which the branch's counted reference chooses every group's biases."""
    adapter, mlp = adapter_of(torch.float32, share=share, norm=False), frozen(torch.float32, True)
    experts = torch.tensor([[0, 1], [2, 0]], dtype=torch.int32)
    biases = 2 * len(experts) * EXPERTS * (WIDTH if share == "down" else WIDTH + BOTTLENECK)
    counts = []
    for compute, apart in ((inside, 0), (branch, biases)):
        x = stream(torch.float32).requires_grad_(input_gradient)
        with FlopCounterMode(display=False) as counter:
            out = compute(adapter, mlp, x, experts, seed=0, fork=fork)
            ahead = counter.get_total_flops()
            out.sum().backward()
        counts.append((ahead - apart, counter.get_total_flops() - ahead - apart))
    assert counts[0] == counts[1]


def test_an_empty_batch():
    adapter = adapter_of(torch.float64)
    x = stream()[:0].requires_grad_()
    out = inside(adapter, frozen(torch.float64, False), x, torch.zeros(1, 2, dtype=torch.int32), seed=0, fork=False)
    out.sum().backward()
    assert out.shape == x.shape
    assert all(not parameter.grad.any() for parameter in adapter.parameters())


def test_bad_arguments_are_named():
    adapter, mlp = adapter_of(torch.float64), frozen(torch.float64, False)
    experts = torch.zeros(1, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"fc2_weight must be floating point \[24, 40\], got float64 \[40, 24\]"):
        inside(adapter, mlp | {"fc2_weight": mlp["fc1_weight"]}, stream(), experts)
    with pytest.raises(ValueError, match="fc1_weight must be frozen"):
        inside(adapter, mlp | {"fc1_weight": mlp["fc1_weight"].requires_grad_()}, stream(), experts)
    adapter.up.bias = torch.nn.Parameter(torch.zeros(300, WIDTH).double())
    with pytest.raises(ValueError, match="up_bias is for 300 experts"):
        inside(adapter, frozen(torch.float64, False), stream(), experts)
    with pytest.raises(RuntimeError, match="backend 'triton' has no adapted_mlp kernels"):
        registration.launchers("adapted_mlp", "triton")


def test_other_derivatives_than_reverse_mode_are_refused():
    adapter, mlp, x = adapter_of(torch.float64, dropout=0.0), frozen(torch.float64, False), stream()

    def run(x):
        return inside(adapter, mlp, x, torch.zeros(1, 2, dtype=torch.int32), seed=0, fork=False)

    words = "adapted_mlp has reverse-mode derivatives only; .* use sparse_adapter on the reference backend"
    with pytest.raises(RuntimeError, match=words):
        torch.func.grad(lambda x: run(x).sum())(x)
    with pytest.raises(RuntimeError, match=words):
        torch.func.vmap(lambda x: run(x[None]))(x)
    with torch.no_grad(), pytest.raises(RuntimeError, match=words):
        torch.func.jvp(run, (x,), (x,))
    with torch.no_grad():  # nothing is recorded: torch maps the operator itself
        torch.testing.assert_close(torch.func.vmap(lambda x: run(x[None])[0])(x), run(x))
