"""sparse_lora's kernels in Triton's interpreter, against the reference in float64, and the registered operator."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import check, compare, error, make, poisoned, run, variant
from lora_cases import CASES, LoRACase

from mosa_fast.ops import backend, sparse_lora
from mosa_fast.ops.arguments import SparseLoRACall

DTYPES = [torch.float32, torch.float16]
BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients(case, dtype):
    check(case, dtype, "cpu")


@st.composite
def random_cases(draw):
    experts, groups = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    pair = st.tuples(st.integers(-1, experts - 1), st.integers(-1, experts - 1))
    ends = sorted(draw(st.lists(st.integers(0, 150), min_size=2, max_size=6, unique=True)))
    columns = tuple(zip(ends[::2], ends[1::2], strict=False))
    fork = draw(st.booleans())
    pairs = st.lists(pair, min_size=groups, max_size=groups).map(tuple)
    return LoRACase(
        "random",
        width=draw(st.integers(1, 140)),
        out_width=ends[-1] + draw(st.integers(0, 70)),
        columns=columns,
        rank=draw(st.integers(1, 20)),
        samples=draw(st.integers(1, 3)) * (1 if fork else groups),
        tokens=draw(st.integers(1, 40)),
        experts=tuple(draw(pairs) for _ in columns),
        num_experts=experts,
        split_down=draw(st.booleans()),
        split_up=draw(st.booleans()),
        init=draw(st.booleans()),
        fork=fork,
    )


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(random_cases(), st.sampled_from(DTYPES))
def test_shapes_and_options_at_random(case, dtype):
    check(case, dtype, "cpu")


def test_autocast_rounds_the_products_only():
    arguments = make(LoRACase("autocast", y_dtype=torch.float16), torch.float32, "cpu")
    oracle = run("reference", arguments, dtype=torch.float64)
    eager = run("reference", arguments, autocast=torch.float16)
    with poisoned():
        ours = run("triton", arguments, autocast=torch.float16)
    assert ours["out"].dtype == torch.float16
    assert ours["x"].dtype == ours["down_weight"].dtype == torch.float32
    compare(ours, eager, oracle, torch.float16)


def test_non_contiguous_and_expanded_inputs():
    arguments = make(CASES[0], torch.float32, "cpu")
    strided = dict(arguments)
    strided["x"] = arguments["x"].transpose(0, 1).contiguous().transpose(0, 1)
    strided["y"] = arguments["y"][:1].expand_as(arguments["y"])
    strided["up_weight"] = arguments["up_weight"].T.contiguous().T
    strided["down_owner"] = arguments["down_owner"].T.contiguous().T
    plain = {k: v.contiguous() if isinstance(v, torch.Tensor) else v for k, v in strided.items()}
    results, expected = run("triton", strided), run("triton", plain)
    for key, value in expected.items():
        assert torch.equal(results[key], value), key


def test_the_same_inputs_give_the_same_bits():
    arguments = make(CASES[0], torch.float16, "cpu")
    first, second = run("triton", arguments), run("triton", arguments)
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


def test_weights_that_nobody_in_the_batch_owns_get_a_zero_gradient():
    arguments = make(variant(CASES[0], experts=(((0, 2), (1, 2)), ((0, 2), (1, 2)))), torch.float32, "cpu")
    gradients = run("triton", arguments)
    assert not gradients["down_weight"][arguments["down_owner"] == 2].any()
    assert gradients["down_weight"][arguments["down_owner"] != 2].all()
    assert not gradients["up_weight"][arguments["up_owner"] != 2].any()
    assert gradients["up_weight"][arguments["up_owner"] == 2].all()


def test_the_output_shares_no_memory_and_nothing_is_written_to():
    arguments = make(CASES[0], torch.float32, "cpu")
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    arguments["x"].requires_grad_()
    with backend("triton"):
        out = sparse_lora(**arguments)
        first = torch.autograd.grad(out.sum(), arguments["x"], retain_graph=True)[0]
        second = torch.autograd.grad(out.sum(), arguments["x"])[0]
    assert torch.equal(first, second)
    with torch.no_grad():
        out.zero_()
    for key, value in before.items():
        assert torch.equal(arguments[key], value), key


def test_without_gradients_nothing_is_saved(monkeypatch):
    from mosa_fast.ops import sparse_lora_triton

    saves = []
    forward = sparse_lora_triton.forward

    def recorded(call, out, saved):
        saves.append(any(tensor.numel() for tensor in saved))
        forward(call, out, saved)

    monkeypatch.setattr(sparse_lora_triton, "forward", recorded)
    arguments = make(CASES[0], torch.float32, "cpu")
    with backend("triton"):
        plain = sparse_lora(**arguments)
        arguments["up_weight"].requires_grad_()
        trained = sparse_lora(**arguments)
    assert saves == [False, True]
    assert torch.equal(plain, trained)


def operator_arguments(case):
    """What the public function hands to torch.ops.mosa_fast.sparse_lora."""
    values = make(case, torch.float32, "cpu")
    scale, values["scale_tensor"] = values["scale"], None
    if isinstance(scale, torch.Tensor):
        values["scale_tensor"], values["scale"] = scale, 1.0
    values["columns"] = [column for columns in case.columns for column in columns]
    values["product_dtype"] = torch.float32
    for name in case.gradients:
        name = "scale_tensor" if name == "scale" else name
        if values[name] is not None:
            values[name].requires_grad_()
    return [values[name] for name in (*SparseLoRACall.TENSORS, *SparseLoRACall.OPTIONS)] + [True, "triton"]


SMALL = {"width": 32, "rank": 2, "samples": 2}


@pytest.mark.parametrize("name", ["q_and_v_of_a_fused_qkv", "fork", "trainable_scale", "dense", "empty_batch"])
def test_opcheck(name):
    arguments = operator_arguments(variant(BY_NAME[name], **SMALL | {"samples": BY_NAME[name].samples and 2}))
    torch.library.opcheck(torch.ops.mosa_fast.sparse_lora.default, arguments)


@pytest.mark.parametrize("name", ["q_and_v_of_a_fused_qkv", "fork", "trainable_scale"])
def test_opcheck_of_the_backward(name):
    case = variant(BY_NAME[name], gradients=(), **SMALL)
    arguments = operator_arguments(case)
    out, *saved = torch.ops.mosa_fast.sparse_lora(*arguments)
    names = tuple(SparseLoRACall.TENSORS)
    tensors, options = arguments[: len(names)], arguments[len(names) : -2]
    tensors[names.index("y")] = None
    needed = [True, case.fork, True, True, tensors[names.index("scale_tensor")] is not None]
    torch.library.opcheck(
        torch.ops.mosa_fast.sparse_lora_backward.default,
        [*tensors, *saved, torch.randn_like(out), *options, needed, torch.float32, "triton"],
    )


@pytest.mark.parametrize("autocast", [False, True])
def test_compile_without_graph_breaks(autocast):
    arguments = make(variant(BY_NAME["trainable_scale"], **SMALL), torch.float32, "cpu")
    linear = torch.nn.Linear(32, 192)

    others = {k: v for k, v in arguments.items() if k not in ("x", "y", "experts")}

    def projection(x, experts, trained):
        return sparse_lora(x, linear(x), experts=experts, **others | trained)

    compiled = torch.compile(projection, fullgraph=True)

    def step(function, experts):
        x = arguments["x"].clone().requires_grad_()
        trained = {k: arguments[k].clone().requires_grad_() for k in ("down_weight", "up_weight", "scale")}
        with backend("triton"), torch.autocast("cpu", torch.float16, enabled=autocast):
            out = function(x, torch.tensor(experts, dtype=torch.int32), trained)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *trained.values()])]

    for experts in ([[[0, 2], [1, 1]], [[2, 0], [0, 1]]], [[[2, -1], [0, 0]], [[-1, 1], [1, 2]]]):
        for ours, expected in zip(step(compiled, experts), step(projection, experts), strict=True):
            assert error(ours, expected.double()) < (5e-3 if autocast else 1e-5)


def test_a_second_derivative_is_refused():
    arguments = make(CASES[0], torch.float32, "cpu")
    arguments["x"].requires_grad_()
    with backend("triton"):
        (gradient,) = torch.autograd.grad(sparse_lora(**arguments).square().sum(), arguments["x"], create_graph=True)
        with pytest.raises(RuntimeError, match="sparse_lora's kernels have no second derivative"):
            gradient.sum().backward()
